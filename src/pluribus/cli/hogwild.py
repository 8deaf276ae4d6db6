"""`pluribus hogwild`: workers of one model solve a problem at the same time."""

from typing import Annotated, Literal

import typer

from pluribus.cli._common import Json, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(hogwild)


def hogwild(
    model: Annotated[
        str, typer.Argument(help="A model folder, BASE+ADAPTER or hub name, with rotary positions.")
    ],
    problem: Annotated[str, typer.Argument(help="What the workers are to solve.")],
    workers: Annotated[int, typer.Option(help="How many write at once.", min=1)] = 2,
    layout: Annotated[
        Literal["combined", "interleaved", "contiguous"],
        typer.Option(help="Where a worker sees the others' words; see docs/hogwild.md."),
    ] = "combined",
    max_steps: Annotated[int, typer.Option(help="Tokens for each worker, at most.", min=1)] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest; default: the model's own.", min=0)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of likely tokens to draw from.", min=0, max=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    answer_tokens: Annotated[
        int, typer.Option(help="For a last answer, if none was given by then; 0: none.", min=0)
    ] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Element type of the model.")] = "float32",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No view of the workers.")] = False,
) -> None:
    """Let workers of one model write at once, each reading the others' words as they appear.

    On a terminal each worker has a column. All that was written is printed at the end, and the
    answer that somebody gave as \\boxed{answer}, or that was asked for when steps ran out.

    Example: pluribus hogwild ./model "Compute f(x) = 3x + 1 for x = 1..8." --workers 4
    """
    from dataclasses import replace

    from pluribus.cli._columns import Columns
    from pluribus.decode.hogwild import HogwildEngine, Sampling
    from pluribus.decode.stack import open_reference

    opened = open_reference(model, device, dtype)
    engine = HogwildEngine(
        opened.model, opened.tokenizer, layout, workers, answer_tokens=answer_tokens
    )
    sampling = Sampling.of(opened.model)
    given = {"temperature": temperature, "top_p": top_p}
    sampling = replace(sampling, **{n: value for n, value in given.items() if value is not None})
    with Columns(engine.names, show=not (as_json or quiet)) as view:
        out = engine.run(problem, max_steps, sampling=sampling, seed=seed, on_token=view.add)
    if as_json:
        show_json(out.to_dict())
        return
    print(out.text)
    rate = out.tokens / out.seconds if out.seconds else 0.0
    by = f" ({out.answered_by})" if out.answered_by else ""
    print(f"\nanswer: {out.answer if out.answer is not None else 'none'}{by}")
    print(f"{out.steps} steps, {out.tokens} tokens of {len(engine.names)}, {rate:.1f} tokens/s")
