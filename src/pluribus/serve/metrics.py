"""Prometheus metrics: requests, tokens, what runs and waits, and how long things take, by model."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """What one server measures, in a registry of its own.

    Models are those that are served: what clients name otherwise is counted as `unknown`.
    """

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.registry = CollectorRegistry()
        self.known = frozenset(members)
        made: dict[str, Any] = {"registry": self.registry, "namespace": "pluribus"}
        self._requests = Counter(
            "requests", "Requests answered", ["model", "endpoint", "status"], **made
        )
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", ["model"], **made)
        self._written = Counter("completion_tokens", "Tokens written", ["model"], **made)
        self._cancelled = Counter("cancelled", "Requests whose client left", ["model"], **made)
        self._broken = Counter("broken", "Streams that broke off", ["model"], **made)
        self._latency = Histogram(
            "request_seconds",
            "From a request to the end of its answer",
            ["model", "endpoint"],
            buckets=SECONDS,
            **made,
        )
        self._first = Histogram(
            "first_token_seconds", "To the first token", ["model"], buckets=SECONDS, **made
        )
        self._step = Histogram(
            "step_seconds", "Between two tokens", ["model"], buckets=TOKEN_SECONDS, **made
        )
        self.registry.register(_Engines(members))
        for name, one in members.items():
            engine = getattr(one, "engine", None)
            if engine is not None and one.part is None:  # a part shares its composite's
                observe = self._step.labels(name).observe
                engine.counts.on_step = lambda seconds, rows, observe=observe: observe(seconds)

    def name(self, model: str) -> str:
        """Return a model's label."""
        return model if model in self.known else "unknown"

    def answered(self, model: str, endpoint: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(self.name(model), endpoint, str(status)).inc()
        self._latency.labels(self.name(model), endpoint).observe(seconds)

    def tokens(self, model: str, prompt: int, written: int) -> None:
        """Count tokens."""
        self._prompt.labels(model).inc(prompt)
        self._written.labels(model).inc(written)

    def first(self, model: str, seconds: float) -> None:
        """Note how long a first token took."""
        self._first.labels(model).observe(seconds)

    def left(self, model: str) -> None:
        """Count a client that left."""
        self._cancelled.labels(self.name(model)).inc()

    def broke(self, model: str) -> None:
        """Count a stream that ended with an error."""
        self._broken.labels(self.name(model)).inc()

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self.registry)


class _Engines:
    """Reads what the engines do when it is asked for."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.members = members

    def describe(self) -> list[Any]:
        """Return nothing: names are known from what is collected."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the gauges."""
        engines = {
            name: one.engine
            for name, one in self.members.items()
            if hasattr(one, "engine") and one.part is None
        }
        waiting = GaugeMetricFamily("pluribus_waiting", "Answers that wait", labels=["model"])
        running = GaugeMetricFamily("pluribus_running", "Answers in the batch", labels=["model"])
        steps = CounterMetricFamily("pluribus_steps", "Passes that wrote tokens", labels=["model"])
        for name, engine in engines.items():
            waiting.add_metric([name], engine.counts.waiting)
            running.add_metric([name], engine.counts.running)
            steps.add_metric([name], engine.counts.steps)
        yield from (waiting, running, steps)
