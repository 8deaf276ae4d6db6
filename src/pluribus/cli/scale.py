"""`pluribus scale`: what more samples, votes and searches buy on a task, and what they cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pluribus.cli._common import Json, Quiet, check_page, show_json, steps

if TYPE_CHECKING:
    from pluribus.decode.scaling import Generator

Verifiers = Literal["exact", "unit_tests", "majority", "judge", "head", "implicit_reward"]
Continuation = Literal["none", "continue_final_message", "prefix"]
BATCH = 32  # samples in a request to a local model


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(scale)


def scale(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, stack, composite or hub name; or its name there."),
    ],
    task: Annotated[
        str, typer.Option(help="FILE.jsonl with question and answer, or a task such as gsm8k.")
    ],
    strategies: Annotated[
        str, typer.Option(help="With commas; parameters as in beam_search(n=8, width=2).")
    ] = "sample, self_consistency",
    n: Annotated[int, typer.Option(help="Samples, beams, particles ... at most.", min=1)] = 16,
    verifier: Annotated[
        Verifiers | None, typer.Option(help="Who judges, for strategies that need it.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="File of --verifier head, trained on this model.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Problems, at most.", min=1)] = None,
    budget_tokens: Annotated[
        int | None, typer.Option(help="Tokens that may be written for one problem.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one completion. Default: the task's.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of what is drawn.", min=0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from this share of likely tokens.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 42,
    extract: Annotated[
        str | None,
        typer.Option(help="Where the answer stands: final, number, boxed, line, first_line, text."),
    ] = None,
    template: Annotated[str, typer.Option(help="A prompt with {question}, for a file.")] = "",
    pool: Annotated[
        Path | None, typer.Option(help="Keep samples in this file, and go on from it.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Samples in one request, of several problems if it has room for all of theirs; "
            f"a kill loses one request. Default: {BATCH}, of an endpoint 1.",
            min=1,
        ),
    ] = None,
    subsets: Annotated[int, typer.Option(help="Subsets of samples for each size.", min=1)] = 16,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask this endpoint, such as http://localhost:8000/v1.")
    ] = None,
    continuation: Annotated[
        Continuation, typer.Option(help="How the endpoint goes on with a message.")
    ] = "none",
    html: Annotated[Path | None, typer.Option(help="Write a page with the plot.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Element type of a plain model.")] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare ways to spend tokens at test time: accuracy against cost, from one pool of samples.

    Example: pluribus scale model/ --task sums.jsonl --strategies sample,self_consistency --n 16
    """
    from dataclasses import replace

    from pluribus import report
    from pluribus.decode.scaling import Budget, Pool
    from pluribus.decode.scaling.compare import check, compare
    from pluribus.decode.scaling.problems import load
    from pluribus.decode.scaling.spelled import strategies as spelled

    check_page(html)
    budget = Budget(tokens=budget_tokens)
    found = load(task, limit=limit, template=template, extract=extract)
    changed: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    if max_tokens is not None:
        changed["max_tokens"] = max_tokens
    found = found._replace(sampling=replace(found.sampling, **changed))
    wanted = spelled(strategies, n=n, sampling=found.sampling)
    generator = _generator(model, endpoint, continuation, device, dtype)
    judge = _verifier(verifier, generator, head)
    check(wanted, found, generator, judge)
    kept = None if pool is None else Pool(found.sampling, model=model, path=pool)
    try:
        done = compare(
            wanted,
            found,
            generator,
            judge,
            model=model,
            budget=budget,
            pool=kept,
            batch=batch or (BATCH if endpoint is None else 1),
            subsets=subsets,
            told=steps(quiet),
        )
    finally:
        if kept is not None:
            kept.close()
    if html is not None:
        report.save(html, done.page())
    if as_json:
        show_json(done.to_dict())
        return
    print(done.table())
    if html is not None:
        print(f"\n{html}: written")


def _generator(
    model: str, endpoint: str | None, continuation: Continuation, device: str, dtype: str
) -> "Generator":
    from pluribus.agents import LocalModel, OpenAICompatible

    if endpoint is not None:
        return OpenAICompatible(endpoint, model, continuation=continuation)
    return LocalModel.open(model, device, dtype)


def _verifier(name: Verifiers | None, generator: "Generator", head: Path | None) -> Any:
    from pluribus.agents import LocalModel
    from pluribus.core.errors import InputError
    from pluribus.decode.scaling import VERIFIERS
    from pluribus.decode.scaling.verifiers import facts

    if (name == "head") != (head is not None):
        raise InputError("--verifier head and --head FILE belong together; give both")
    if name is None:
        return None
    found: Any = VERIFIERS[name]
    needs = facts(found).needs
    if needs in ("head", "fused") and not isinstance(generator, LocalModel):
        raise InputError(f"--verifier {name} looks into a local model; leave --endpoint out")
    if isinstance(generator, LocalModel) and needs == "head":
        return found.load(generator, head)
    if isinstance(generator, LocalModel) and needs == "fused":
        return found.of(generator.model)
    return found(generator) if needs == "generator" else found()
