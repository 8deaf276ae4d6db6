"""LoRA: a base plus low-rank deltas, read block by block; adapters as PEFT reads and writes them.

Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685, section 4.1; DoRA: Liu et al., ICML 2024,
https://arxiv.org/abs/2402.09353, equation 5; rank-stabilised scale: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732.

    W' = W + s B A,  s = alpha / r  (rsLoRA: alpha / sqrt(r))        (R, c), (R, r), (r, c)
    DoRA: W' = m * (W + s B A) / |W + s B A|, the norm of each row   (R, 1)

The whole delta never exists: an element of B A is summed over r in one order, whatever range is
read, and W' is rounded once, to the base's type. PEFT rounds the delta first, so 16-bit bases may
differ from `merge_and_unload` in the last place.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pluribus.core import formats
from pluribus.core.dtypes import narrow
from pluribus.core.errors import FormatError, InputError, MismatchError, MissingError, nearest
from pluribus.core.recent import Recent
from pluribus.core.source import ArraySource, Source, TensorSpec
from pluribus.core.weights import Weights, numpy_view

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is
REFUSED = {  # configuration key -> what it would need
    "layer_replication": "copies layers of the base",
    "target_parameters": "adapts parameters that are not a module's weight",
    "trainable_token_indices": "replaces single rows of the embedding",
    "alora_invocation_tokens": "is switched on by tokens",
    "arrow_config": "routes between adapters",
    "use_qalora": "pools its input",
    "use_bdlora": "has block-diagonal factors",
    "kasa_config": "changes the base's singular values",
    "monteclora_config": "draws its factors at random",
    "megatron_config": "is split over machines",
}
_factors = Recent(128 << 20)  # float32 factors of the tensors in work
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B|"
    r"magnitude_vector)(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)


class Factors(NamedTuple):
    """A low-rank delta `scale * b @ a` in the layout of the tensor it is added to."""

    a: Source  # (r, c), or (r, c, ...) for a convolution
    b: Source  # (R, r)
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of `b`."""
        return self.b.spec.shape[1]

    @property
    def transposed(self) -> "Factors":
        """The factors of the transposed delta."""
        return Factors(Transposed(self.b), Transposed(self.a), self.scale)


class Transposed(Source):
    """A small matrix with its axes exchanged; each read loads all of it."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner
        self.spec = TensorSpec(inner.spec.dtype, inner.spec.shape[::-1])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        size = self.spec.kind.size
        flat = numpy_view(self.inner).T.reshape(-1)
        out[...] = flat.view(np.uint8)[start * size : stop * size]

    @property
    def fingerprint(self) -> str:
        """The inner tensor's."""
        return f"transposed {self.inner.fingerprint}"


class LowRankSum(Source):
    """`base + scale * b @ a`, rounded once to the base's type (or to `dtype`).

    `magnitude` (one value a row) makes it a DoRA. The first axis of `base` are the rows of `b`, its
    other axes, flattened, the columns of `a`. Raises MismatchError if the shapes do not fit.
    """

    def __init__(
        self,
        base: Source,
        a: Source,
        b: Source,
        scale: float = 1.0,
        *,
        magnitude: Source | None = None,
        dtype: str | None = None,
        name: str = "tensor",
    ) -> None:
        shape = base.spec.shape
        if not fits(shape, a, b):
            raise MismatchError(
                f"{name}: the base is {list(shape)}, but the adapter's B {list(b.spec.shape)} @ "
                f"A {list(a.spec.shape)} makes {[*b.spec.shape[:1], *a.spec.shape[1:]]}; the "
                "adapter was trained on a model of another shape"
            )
        if magnitude is not None and magnitude.spec.size != shape[0]:
            raise MismatchError(
                f"{name}: the base has {shape[0]} rows, the DoRA magnitude "
                f"{list(magnitude.spec.shape)}"
            )
        self.base, self.a, self.b, self.scale, self.magnitude = base, a, b, scale, magnitude
        self.cols = base.spec.size // max(shape[0], 1)
        self.spec = TensorSpec(dtype or base.spec.dtype, shape)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        if stop > start:
            out[...] = narrow(self.values(start, stop), self.spec.kind)

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) unrounded, as float32 (float64 if the base is)."""
        if self.magnitude is None:
            return self._sum(start, stop)
        first, last = start // self.cols, -(-stop // self.cols)
        rows = self._sum(first * self.cols, last * self.cols).reshape(last - first, self.cols)
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
        wanted = self.magnitude.floats(first, last, np.float64)
        rows *= (wanted / np.where(norms == 0, 1, norms)).astype(rows.dtype)[:, None]
        return rows.reshape(-1)[start - first * self.cols : stop - first * self.cols]

    def _sum(self, start: int, stop: int) -> np.ndarray:
        from pluribus.kernels.lowrank import add_low_rank

        wide = np.float64 if self.base.spec.dtype == "F64" else np.float32
        values = self.base.floats(start, stop, wide)
        b, a = _factors.get(self, lambda: self._load(wide))
        add_low_rank(values, start, b, a, wide(self.scale), np.empty(self.cols, wide))
        return values

    def _load(self, wide: type) -> tuple[np.ndarray, np.ndarray]:
        rank = self.a.spec.shape[0]
        return (
            self.b.floats(wide=wide).reshape(-1, rank),
            self.a.floats(wide=wide).reshape(rank, -1),
        )

    @property
    def fingerprint(self) -> str:
        """Those of its parts."""
        parts = [self.base, self.a, self.b, *([self.magnitude] if self.magnitude else [])]
        return " ".join(["lora", repr(self.scale), *(part.fingerprint for part in parts)])


def fits(shape: tuple[int, ...], a: Source, b: Source) -> bool:
    """Return whether `b @ a` has `shape`, up to how the axes behind the first are written."""
    a_shape, b_shape = a.spec.shape, b.spec.shape
    return (
        bool(shape)
        and len(a_shape) >= 2
        and len(b_shape) >= 2
        and a_shape[0] == math.prod(b_shape[1:])
        and shape[0] == b_shape[0]
        and math.prod(shape[1:]) == math.prod(a_shape[1:])
        and (len(a_shape) == 2 or a_shape[1:] == shape[1:])
    )


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA by the base's tensor names.

    `replaced` are whole tensors (modules_to_save, biases), `magnitudes` the DoRA row norms, and
    `embeddings` and `transposed` the names whose factors lie transposed in the file.
    """

    factors: Mapping[str, Factors]
    config: Mapping[str, Any]
    folder: Path
    replaced: Mapping[str, Source] = field(default_factory=dict)
    magnitudes: Mapping[str, Source] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()


def adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT LoRA folder from its configuration and the header of its weights.

    Raises MissingError if it is not one, FormatError for another kind of adapter or a variant whose
    merged weights are not base + delta, MismatchError if a tensor contradicts the configuration.
    """
    folder = Path(folder)
    config = _config(folder)
    opened = _opened(folder)
    parts: dict[str, dict[str, Source]] = {}
    replaced: dict[str, Source] = {}
    for key, source in opened.items():
        clean = key.replace(".base_layer.", ".")
        found = _KEY.fullmatch(clean)
        if found:
            module, part, leaf = found["module"], found["part"], found["leaf"]
            parts.setdefault(module, {})[part + (".bias" if leaf == "bias" else "")] = source
        elif ".lora_" in key:
            raise FormatError(f"{folder}: {key!r} is not a LoRA tensor that is known here")
        else:
            clean = clean.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
            replaced[clean.replace(".default.", ".")] = source
    if not parts and not replaced:
        raise FormatError(f"{folder}: the adapter holds no tensors")
    factors: dict[str, Factors] = {}
    magnitudes: dict[str, Source] = {}
    embeddings, transposed = set(), set()
    for module, has in parts.items():
        name = f"{module}.weight"
        factors[name] = _factors_of(folder, module, has, config)
        if "embedding_A" in has:
            embeddings.add(name)
        elif config.get("fan_in_fan_out"):
            transposed.add(name)
        if name in embeddings or name in transposed:
            factors[name] = factors[name].transposed
        if "magnitude_vector" in has:
            if name in embeddings or name in transposed or len(has["A"].spec.shape) > 2:
                raise FormatError(
                    f"{folder}: DoRA of {name!r}, which is not a plain linear layer, is not "
                    "supported; merge it with PEFT and give the merged model"
                )
            magnitudes[name] = has["magnitude_vector"]
        if "B.bias" in has:
            bias, one = has["B.bias"], ArraySource.of(np.ones((1, 1), np.float32), "F32")
            column = _Reshaped(bias, (bias.spec.size, 1))
            factors[f"{module}.bias"] = Factors(one, column, factors[name].scale)
    if config.get("use_dora") and len(magnitudes) < len(parts):
        lacks = [m for m in parts if f"{m}.weight" not in magnitudes]
        raise FormatError(f"{folder}: use_dora, but {lacks[0]!r} has no lora_magnitude_vector")
    return Adapter(
        factors, config, folder, replaced, magnitudes, frozenset(embeddings), frozenset(transposed)
    )


def _factors_of(
    folder: Path, module: str, has: Mapping[str, Source], config: Mapping[str, Any]
) -> Factors:
    names = ("embedding_A", "embedding_B") if "embedding_A" in has else ("A", "B")
    absent = [name for name in names if name not in has]
    if absent:
        raise FormatError(f"{folder}: {module!r} has no lora_{absent[0]}")
    a, b = has[names[0]], has[names[1]]
    if len(a.spec.shape) < 2 or len(b.spec.shape) < 2:
        raise FormatError(f"{folder}: lora_A {a.spec} and lora_B {b.spec} of {module!r}: 1-D")
    rank = _number(folder, "r", _pattern(folder, config, "rank_pattern", module, config["r"]))
    if a.spec.shape[0] != rank or math.prod(b.spec.shape[1:]) != rank:
        raise MismatchError(
            f"{folder}: {module!r} has lora_A {list(a.spec.shape)} and lora_B "
            f"{list(b.spec.shape)}, but its rank in {CONFIG} is {rank:g}"
        )
    alpha = _pattern(folder, config, "alpha_pattern", module, config["lora_alpha"])
    scale = _number(folder, "lora_alpha", alpha, least=-math.inf)
    return Factors(a, b, scale / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(folder: Path, config: Mapping[str, Any], key: str, module: str, usual: Any) -> Any:
    """Return the value of the first pattern that matches a module, as PEFT matches them."""
    try:
        for pattern, value in (config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    except (re.error, AttributeError, TypeError) as error:
        raise FormatError(f"{folder / CONFIG}: {key} is not usable ({error})") from None
    return usual


def _number(folder: Path, key: str, value: Any, least: float = 1) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e9:
        raise FormatError(f"{folder / CONFIG}: {key} = {value!r} is not a usable number")
    return float(value)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file; a LoRA is a folder saved by PEFT") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: not a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FormatError(
            f"{path}: peft_type is {kind!r}; only LORA adapters are base + delta. Merge this one "
            "with PEFT (merge_and_unload) and give the merged model"
        )
    for key, why in REFUSED.items():
        if config.get(key):
            raise FormatError(
                f"{path}: {key} is set: this adapter {why}, which is not supported; merge it with "
                "PEFT (merge_and_unload) and give the merged model"
            )
    if config.get("init_lora_weights") not in STARTS:
        raise FormatError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the "
            "base; save it with path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    return {"r": 8, "lora_alpha": 8} | config


def _opened(folder: Path) -> dict[str, Source]:
    """Return an adapter's tensors, those stored once under several names too."""
    for name in FILES:
        if (folder / name).is_file():
            opened = formats.read(folder / name)
            shared = {k: opened.sources[to] for k, to in opened.aliases.items()}
            return opened.sources | shared
    raise MissingError(f"{folder}: has {CONFIG}, but neither {' nor '.join(FILES)}")


class _Reshaped(Source):
    """The same elements under another shape."""

    def __init__(self, inner: Source, shape: tuple[int, ...]) -> None:
        self.inner, self.spec = inner, TensorSpec(inner.spec.dtype, shape)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        self.inner.read(start, stop, out)

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint


def with_adapter(
    base: Weights, folder: str | os.PathLike[str] | Adapter, label: str | None = None
) -> Weights:
    """Return `base` with a LoRA added to it, lazily.

    A tensor that the base ties to another is untied if the adapter changes one of them alone, which
    is refused if the base's configuration would tie them again. Raises MismatchError naming the
    tensor, both shapes and the nearest name if the adapter is for another model.
    """
    lora = folder if isinstance(folder, Adapter) else adapter(folder)
    sources = {name: base.source(name) for name in base}
    saved = lora.config.get("modules_to_save") or ()
    for name, source in lora.replaced.items():
        if name in sources:
            if sources[name].spec.shape != source.spec.shape:
                raise MismatchError(
                    f"{name!r} is {sources[name].spec} in {base.label}, but {source.spec} in "
                    f"{lora.folder}; if the vocabulary was enlarged, enlarge the base's first"
                )
        elif not any(part in saved for part in name.split(".")):
            raise MismatchError(_unknown(base, lora, name))
        sources[name] = source
    for name, delta in lora.factors.items():
        if name not in sources:
            raise MismatchError(_unknown(base, lora, name))
        turned = delta.transposed if len(delta.a.spec.shape) == 2 else delta
        if not fits(sources[name].spec.shape, delta.a, delta.b) and fits(
            sources[name].spec.shape, turned.a, turned.b
        ):
            delta = turned  # one flag for Conv1D and Linear: PEFT lets the layer decide
        sources[name] = LowRankSum(
            sources[name], *delta, magnitude=lora.magnitudes.get(name), name=repr(name)
        )
    _check_ties(base, lora)
    return Weights(sources, label=label or f"{base.label}+{lora.folder}", folder=base.folder)


def _unknown(base: Weights, lora: Adapter, name: str) -> str:
    spec = lora.replaced[name].spec if name in lora.replaced else None
    shape = spec.shape if spec else (*lora.factors[name].b.spec.shape[:1],)
    if spec is None:
        shape = (*shape, *lora.factors[name].a.spec.shape[1:])
    tied = ""
    if name == "lm_head.weight":
        tied = " If the base ties it to the embedding, untie it there first."
    return (
        f"{lora.folder} changes {name!r} {list(shape)}, which {base.label} does not have."
        f"{nearest(name, base)}{tied} The adapter was trained on "
        f"{lora.config.get('base_model_name_or_path')!r}"
    )


def _check_ties(base: Weights, lora: Adapter) -> None:
    changed = {*lora.replaced, *lora.factors}
    for name, target in base.aliases.items():
        if not base.config().get("tie_word_embeddings", False):
            continue
        if name in changed or target in changed:
            raise MismatchError(
                f"{lora.folder} changes {name if name in changed else target!r}, which "
                f"{base.label} ties to {target if name in changed else name!r}; the merged model "
                "could not be loaded with its ties. Untie the base first (store both tensors, set "
                "tie_word_embeddings to false)"
            )


def open_adapter(folder: str | os.PathLike[str]) -> Weights:
    """Return an adapter's base, found by its configuration, with the adapter added to it.

    The base is looked for beside the adapter, then in the working directory, then on the hub.
    Raises MissingError if it is not there.
    """
    lora = adapter(folder)
    where = lora.config.get("base_model_name_or_path")
    if not isinstance(where, str) or not where:
        raise MissingError(
            f"{lora.folder}: {CONFIG} does not say which model it is for; write BASE+{lora.folder}"
        )
    beside = lora.folder / os.path.expanduser(where)
    _check_ends(lora.folder)
    try:
        if beside.exists():
            base = Weights.open({"model": {"path": str(beside)}})
        else:
            revision = lora.config.get("revision")
            base = Weights.open({"model": {"path": where, "revision": revision}})
    except MissingError as error:
        raise MissingError(
            f"{lora.folder} is a LoRA on {where!r}, which was not found ({error}); write "
            f"BASE+{lora.folder} with the path of the base"
        ) from None
    return with_adapter(base, lora, label=str(lora.folder))


def _check_ends(folder: Path) -> None:
    """Follow local adapters from base to base; raise FormatError if they lead back."""
    seen = {folder.resolve()}
    while (folder / CONFIG).is_file():
        where = str(_config(folder).get("base_model_name_or_path"))
        folder = folder / os.path.expanduser(where)
        if folder.resolve() in seen:
            raise FormatError(f"{folder}: adapters that are each other's base")
        seen.add(folder.resolve())


def save_adapter(
    folder: str | os.PathLike[str],
    factors: Mapping[str, Factors | tuple[Any, Any]],
    *,
    base_model: str | None = None,
    alpha: float | None = None,
    embeddings: Iterable[str] = (),
    transposed: Iterable[str] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write factors by base tensor name as a folder that PEFT and `open_adapter` read.

    A pair (A, B) of arrays, tensors or sources has scale `alpha / rank` (default 1); `Factors` have
    their own. Ranks and scales may differ between tensors. `embeddings` and `transposed` are
    Adapter's. `config` adds to adapter_config.json or overrides it. Raises InputError for a name
    that is not a module's weight, MismatchError if A and B do not fit.
    """
    if not factors:
        raise InputError("an adapter needs the factors of at least one tensor")
    embeddings, transposed = set(embeddings), set(transposed)
    tensors: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, pair in factors.items():
        module = name.removesuffix(".weight")
        if module == name:
            raise InputError(f"{name!r} is not a module's weight; LoRA is added to those only")
        one = Weights.of({"a": pair[0], "b": pair[1]})
        delta = Factors(one.source("a"), one.source("b"), pair.scale if len(pair) == 3 else 1.0)
        rank = ranks[module] = delta.a.spec.shape[0]
        if not fits((delta.b.spec.shape[0], *delta.a.spec.shape[1:]), delta.a, delta.b):
            raise MismatchError(
                f"{name!r}: A {list(delta.a.spec.shape)} and B {list(delta.b.spec.shape)} do not "
                "multiply; A is (r, c), B is (R, r)"
            )
        alphas[module] = delta.scale * rank if len(pair) == 3 or alpha is None else alpha
        stem = f"base_model.model.{module}.lora_"
        if name in embeddings:
            delta = delta.transposed
            tensors |= {f"{stem}embedding_A": delta.a, f"{stem}embedding_B": delta.b}
        else:
            delta = delta.transposed if name in transposed else delta
            tensors |= {f"{stem}A.weight": delta.a, f"{stem}B.weight": delta.b}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    usual = Counter(alphas.values()).most_common(1)[0][0]
    table = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": usual,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != usual},
        "target_modules": list(ranks),
        "fan_in_fan_out": bool(transposed),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    } | dict(config or {})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    Weights(_apart(tensors)).save(folder / FILES[0], {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(table, indent=2) + "\n", "utf-8")


def _apart(tensors: dict[str, Source]) -> dict[str, Source]:
    """Give shared factors an identity each: PEFT wants every tensor in the file."""
    return {name: _Reshaped(source, source.spec.shape) for name, source in tensors.items()}


def extract(delta: Any, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return A (rank, c) and B (R, rank), float32, the best approximation B @ A of `delta` (R, c).

    Both carry the square roots of the singular values. Signs are fixed: the largest entry of each
    column of B is positive. Raises InputError if the rank exceeds that of the shape.
    """
    import torch

    matrix = torch.as_tensor(delta)
    if matrix.ndim != 2 or not 1 <= rank <= min(matrix.shape):
        raise InputError(f"no rank-{rank} factors of a delta of shape {list(matrix.shape)}")
    u, s, vh = torch.linalg.svd(matrix.detach().cpu().to(torch.float64), full_matrices=False)
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    peak = b.gather(0, b.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return (a * sign.T).float().numpy(), (b * sign).float().numpy()
