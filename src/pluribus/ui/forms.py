"""The commands that a page may start, as forms: an allow-list."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "lines", "number", "flag", "choice"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One argument. Without `option` it is positional."""

    name: str
    label: str
    kind: Kind = "text"
    option: str = ""
    required: bool = False
    default: str = ""
    hint: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Form:
    """A command that may be started. `outputs` are arguments that name a place in its folder."""

    name: str
    command: tuple[str, ...]
    title: str
    fields: tuple[Field, ...]
    outputs: tuple[tuple[str, str], ...] = ()  # option, or nothing for a positional; name
    fixed: tuple[str, ...] = ()  # options that are always given
    cards: tuple[str, ...] = ()  # families and systems on whose cards it is offered
    verdict: str = ""  # what exit code 1 means once there is a report


RECIPE = Field(name="recipe", label="Recipe (a YAML file)", required=True)
MEMORY = Field(name="memory", label="Memory", option="--memory", default="512MB")
PAGE = ("--html", "report.html")
FORMS: tuple[Form, ...] = (
    Form(
        name="claims",
        command=("claims",),
        title="Measure the claim",
        fields=(
            Field(name="claim", label="Claim", required=True),
            Field(
                name="seeds",
                label="Seeds",
                option="--seeds",
                default="0,1,2",
                hint="whole numbers with commas between them",
            ),
        ),
        outputs=(("--out", "records"), PAGE),
        verdict="measured: the claim does not hold",
    ),
    Form(
        name="inspect",
        command=("inspect",),
        title="Look for interference",
        fields=(
            Field(
                name="base", label="Base model", required=True, hint="a folder, file or hub name"
            ),
            Field(name="experts", label="Experts, one a line", kind="lines", required=True),
            Field(
                name="density", label="Density", kind="number", option="--density", default="0.2"
            ),
            Field(
                name="score",
                label="Tasks to score on",
                option="--score",
                hint="language models; sst2,trec",
            ),
            Field(name="tries", label="Methods to try", kind="number", option="--try"),
            Field(name="limit", label="Examples a task", kind="number", option="--limit"),
        ),
        outputs=(PAGE,),
        cards=("merge", "tune", "compress", "inspect", "interpolate"),
    ),
    Form(
        name="merge",
        command=("merge",),
        title="Merge by a recipe",
        fields=(
            RECIPE,
            MEMORY,
            Field(name="dry_run", label="Only plan it", kind="flag", option="--dry-run"),
        ),
        outputs=(("", "merged"),),
        cards=("merge", "interpolate"),
    ),
    Form(
        name="tune",
        command=("tune",),
        title="Tune by a recipe",
        fields=(RECIPE,),
        outputs=(("", "tuned"), PAGE),
        cards=("tune",),
    ),
    Form(
        name="compress",
        command=("compress",),
        title="Compress by a recipe",
        fields=(RECIPE,),
        outputs=(("", "store"),),
        cards=("compress",),
    ),
    Form(
        name="eval",
        command=("eval",),
        title="Score models on tasks",
        fields=(
            Field(name="models", label="Models, one a line", kind="lines", required=True),
            Field(name="tasks", label="Tasks", option="--tasks", required=True, hint="sst2,trec"),
            Field(name="limit", label="Examples a task", kind="number", option="--limit"),
        ),
        outputs=(PAGE,),
        cards=("tasks",),
    ),
    Form(
        name="generate",
        command=("generate",),
        title="Write with one model, or several as one",
        fields=(
            Field(name="model", label="Model, stack or composite", required=True),
            Field(name="prompt", label="Prompt", required=True),
            Field(
                name="tokens",
                label="Tokens, at most",
                kind="number",
                option="--max-new-tokens",
                default="100",
            ),
        ),
        outputs=(PAGE,),
        cards=("decode.fusers", "eft", "logits-fusion"),
    ),
    Form(
        name="hogwild",
        command=("hogwild",),
        title="Let workers solve a problem",
        fields=(
            Field(name="model", label="Model", required=True),
            Field(name="problem", label="Problem", required=True),
            Field(name="workers", label="Workers", kind="number", option="--workers", default="2"),
        ),
        fixed=("--quiet",),  # the view of the workers redraws a whole screen
        cards=("hogwild",),
    ),
    Form(
        name="scale",
        command=("scale",),
        title="Measure what more samples buy",
        fields=(
            Field(name="model", label="Model", required=True),
            Field(
                name="task",
                label="Task",
                option="--task",
                required=True,
                hint="a .jsonl file, or gsm8k",
            ),
            Field(
                name="strategies",
                label="Strategies",
                option="--strategies",
                default="sample,self_consistency",
            ),
            Field(name="n", label="Samples, at most", kind="number", option="--n", default="16"),
            Field(name="limit", label="Problems, at most", kind="number", option="--limit"),
        ),
        outputs=(PAGE,),
        cards=("decode.scaling.strategies", "test-time-scaling"),
    ),
    Form(
        name="think",
        command=("think",),
        title="Measure whether thinking pays",
        fields=(
            Field(name="model", label="Model", required=True),
            Field(
                name="task",
                label="Task",
                option="--task",
                required=True,
                hint="a .jsonl file, gsm8k, or grammar",
            ),
            Field(name="price", label="Price of a token", kind="number", option="--price"),
        ),
        outputs=(("--out", "policy.json"), PAGE),
        cards=("selective-cot",),
    ),
    Form(
        name="circuits",
        command=("circuits", "discover"),
        title="Find the circuit of a task",
        fields=(
            Field(name="model", label="Model", required=True),
            Field(name="task", label="Task", required=True, hint="ioi"),
        ),
        outputs=(("--out", "circuit.json"), PAGE),
        cards=("circuit-reuse",),
    ),
    Form(
        name="demo",
        command=("demo",),
        title="Run the demo: eight specialists, ten ways to combine them",
        fields=(Field(name="seed", label="Seed", kind="number", option="--seed", default="0"),),
        outputs=(("--out", "demo"),),
        cards=("merge", "compress", "tune"),
    ),
)
