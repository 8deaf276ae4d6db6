"""From a recipe to an engine plan: which tensors, from which models, with which parameters.

Everything is decided from headers. `models:` is one slice of all layers; slices stack their layers
one after another under new numbers; parameters are looked up for every tensor and model, and one
merger is built for each distinct set of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from pluribus.core.chain import as_merger
from pluribus.core.depth import depth_map
from pluribus.core.dtypes import dtype as dtype_of
from pluribus.core.errors import InputError, MismatchError, RecipeError, listing, nearest
from pluribus.core.merger import Facts, facts, stages
from pluribus.core.registry import MERGERS
from pluribus.core.source import Source, TensorSpec
from pluribus.core.weights import Weights
from pluribus.engine.plan import Job, Plan
from pluribus.recipe import config as configs
from pluribus.recipe.donor import Opener, donor_of, donor_text
from pluribus.recipe.layout import Item, Layers, OutSlice, Part, Section, lay_out
from pluribus.recipe.rows import (
    Rounded,
    Vocabulary,
    aligned,
    is_vocabulary_name,
    vocabulary_of,
)
from pluribus.recipe.schema import Entry, Module, Recipe, Slice, SliceSource
from pluribus.recipe.settings import Parameter, evaluate, parameters_of
from pluribus.tokenizer import Alignment, align_models, load_vocab, tokenizer_config

# What may differ between tensors although a fold holds for the whole model.
LOCAL = ("weight", "scale", "lambda")


@dataclass(frozen=True)
class Tokens:
    """A vocabulary alignment and the folders its tokenizers stand in."""

    alignment: Alignment
    folders: tuple[Path, ...]
    donor: Path | None


@dataclass(frozen=True)
class Expanded:
    """A recipe laid out: the plan, and what the files beside the tensors depend on."""

    recipe: Recipe
    plan: Plan
    parameters: tuple[Mapping[str, Any] | None, ...]  # of each job; None: copied
    models: tuple[str, ...]  # labels, in the recipe's order
    folders: tuple[Path, ...]  # of the models that have one
    tokens: Tokens | None


class _Method:
    """The merge method of a recipe: named with settings, or a chain that holds its own."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        text = recipe.merge_method
        self.whole = None
        if text in MERGERS or not ("(" in text or ">>" in text):
            self.cls = MERGERS[text]  # raises with the nearest name
            self.facts: Facts = facts(self.cls)
            self.parameters = parameters_of(self.cls)
        else:
            self.whole = as_merger(text)
            self.facts, self.parameters = facts(self.whole), {}
        self.name = text
        self._built: dict[Any, Any] = {}

    @property
    def alone(self) -> bool:
        """Whether it takes a single model, whose own parameters are then the method's."""
        return self.facts.experts[1] == 1 and self.facts.base == "ignored"

    def check_names(self, scope: Mapping[str, Any], where: str, *, of_model: bool) -> None:
        """Raise RecipeError for a parameter the method lacks, or that is not a model's own."""
        known = {name: p for p in self.parameters.values() for name in p.names}
        for name in scope:
            if self.whole is not None:
                raise RecipeError(
                    f"{where}: the parameters of a chain stand inside it "
                    f"({self.name}), so {name!r} cannot be set here"
                )
            at = self.recipe.lined(where, name)
            if name not in known:
                raise RecipeError(
                    f"{at}: {self.name} has no parameter {name!r}; it has: "
                    f"{', '.join(known) or 'none'}.{nearest(name, known)}"
                )
            if of_model and not (known[name].per_expert or self.alone):
                raise RecipeError(
                    f"{at}: {name} of {self.name} is one value for all models; move it to the "
                    "parameters of the recipe or slice"
                )

    def values(self, item: Item) -> dict[str, Any]:
        """Return the parameters that are set for one tensor."""
        out: dict[str, Any] = {}
        t = 1.0 if item.tail and self.recipe.gradient_tail == "last" else item.t
        for parameter in self.parameters.values():
            shared = self._scopes(item)
            if not (parameter.per_expert or self.alone):
                value = self._look(parameter, shared, item.name, t)
                if value is None and parameter.default is MISSING:
                    raise RecipeError(self._unset(parameter, item.name, None))
                if value is not None:
                    out[parameter.name] = self._placed(value) if parameter.beside else value
                continue
            found = []
            for i in experts_of(item.slice_, self.facts):
                part = item.slice_.parts[i]
                value = self._look(parameter, [part.parameters, *shared], item.inputs[i], t)
                if value is None and parameter.default is MISSING:
                    raise RecipeError(self._unset(parameter, item.inputs[i], part.model))
                found.append(value)
            if all(value is None for value in found):
                continue
            default = parameter.default
            whole = [default if value is None else value for value in found]
            if len(set(whole)) == 1:
                out[parameter.name] = whole[0]
            else:
                if parameter.numeric:
                    whole = [float(v) if v is not None else v for v in whole]
                out[parameter.name] = tuple(whole)
        return out

    def _placed(self, path: str) -> str:
        """Return a path beside the recipe if there is such a file, else as it is written."""
        folder = self.recipe.folder
        beside = folder is not None and (folder / path).exists()
        return str((folder / path).resolve()) if beside and folder is not None else path

    def build(self, item: Item, values: Mapping[str, Any]) -> Any:
        """Return the merger for a set of values; equal sets share one."""
        if self.whole is not None:
            return self.whole
        key = tuple(values.items())
        if key not in self._built:
            try:
                self._built[key] = self.cls(**values)
            except InputError as error:
                raise RecipeError(f"{self.recipe.where}: {error} (tensor {item.name})") from None
        return self._built[key]

    def _scopes(self, item: Item) -> list[Mapping[str, Any]]:
        return [item.slice_.parameters, item.slice_.module, self.recipe.parameters]

    def _look(
        self, parameter: Parameter, scopes: Sequence[Mapping[str, Any]], tensor: str, t: float
    ) -> Any:
        for scope in scopes:
            for name in parameter.names:
                if name in scope:
                    try:
                        value = evaluate(scope[name], tensor, t, parameter.read)
                    except RecipeError as error:
                        where = self.recipe.lined(self.recipe.where, name)
                        raise RecipeError(f"{where}: {self.name}: {error}") from None
                    if value is not None:
                        return value
        return None

    def _unset(self, parameter: Parameter, tensor: str, model: str | None) -> str:
        whose = f" of {model}" if model else ""
        place = f"the parameters{whose or ' of the recipe'}"
        return (
            f"{self.recipe.where}: {self.name} needs {parameter.name}, and no setting of it holds "
            f"for tensor {tensor!r}{whose}; set {parameter.name} in {place}"
        )

    def check_whole_model(self, mergers: Sequence[Any]) -> None:
        """Raise RecipeError if tensors differ in what a fold over the whole model depends on."""
        distinct = list({id(merger): merger for merger in mergers}.values())
        scoped = [
            m for m in distinct if any(f.scope == "model" for s in stages(m) for f in s.values())
        ]
        if not scoped:
            return
        for other in distinct:
            for item in dataclasses.fields(other):
                mine, first = getattr(other, item.name), getattr(scoped[0], item.name)
                if mine != first and item.name not in LOCAL:
                    raise RecipeError(
                        f"{self.recipe.where}: {self.name} looks at the whole model, so "
                        f"{item.name} cannot differ between tensors ({first} and {mine}); give it "
                        'one value, or set scope: "tensor"'
                    )


def experts_of(out: OutSlice, known: Facts) -> list[int]:
    """Return the positions of a slice's experts: all inputs but the base, if the method has one."""
    skip = None if known.base == "ignored" else out.base
    return [i for i in range(len(out.parts)) if i != skip]


def expand(recipe: Recipe, open_model: Opener, *, allow_crimes: bool = False) -> Expanded:
    """Lay a recipe out.

    Raises RecipeError, InputError or MismatchError, each with what was given and what to do.
    """
    method = _Method(recipe)
    notes = list(recipe.notes)
    builder = _Sections(recipe, method, open_model, notes)
    sections = builder.sections()
    parts = [part for s in sections for out in s.slices for part in out.parts]
    reference, label = parts[0].weights, parts[0].model
    if recipe.base_model is not None:
        reference, label = open_model(recipe.base_model), str(recipe.base_model)
    by_label = {part.model: part.weights for part in parts}
    if label not in by_label:
        by_label = {**by_label, label: reference}
    overrides = {str(ref): ref.override_architecture for ref in recipe.references}
    ordered = [label, *(name for name in by_label if name != label)]
    notes += configs.compare(
        [(name, by_label[name].config(), overrides.get(name)) for name in ordered],
        allow_crimes=allow_crimes or recipe.allow_crimes,
    )

    vocabularies = _Vocabularies(recipe, by_label, open_model)
    layout = lay_out(sections, reference, vocabularies.lookup)
    notes += layout.notes
    changes, more = configs.restacked(reference.config(), layout.stacks)
    notes += more
    if vocabularies.tokens is not None:
        base_config = {**reference.config(), **changes}
        changes |= configs.with_vocabulary(base_config, vocabularies.tokens.alignment.rows)
        notes += vocabularies.tokens.alignment.warnings
    aliases = _aliases(layout.items)
    heads = [item.name for item in layout.items if item.name not in aliases]
    if reference.config().get("tie_word_embeddings") and vocabularies.untied(heads):
        changes["tie_word_embeddings"] = False
        notes.append("the output has a head of its own: tie_word_embeddings is now false")
    out = recipe.out_dtype or recipe.dtype
    if out is not None:
        changes["dtype"] = dtype_of(out).torch

    jobs, parameters = _jobs(recipe, method, layout.items, aliases, vocabularies, reference)
    if all(job.merger is None for job in jobs):
        raise InputError("none of the models' tensors is floating point: there is nothing to merge")
    method.check_whole_model([job.merger for job in jobs if job.merger is not None])
    depth = depth_map({job.name: job.spec for job in jobs})
    jobs = [dataclasses.replace(job, layer=depth.layers[job.name]) for job in jobs]
    plan = Plan(
        tuple(jobs),
        recipe.drawn_seed,
        depth.count,
        aliases,
        recipe.plain(),
        reference.folder,
        changes,
        tuple(dict.fromkeys(notes)),
    )
    folders = [w.folder for w in by_label.values() if w.folder is not None]
    return Expanded(
        recipe, plan, tuple(parameters), tuple(by_label), tuple(folders), vocabularies.tokens
    )


# -- inputs ----------------------------------------------------------------------------------------


class _Sections:
    """Turns models, slices and modules into sections of slices, with every model opened."""

    def __init__(
        self, recipe: Recipe, method: _Method, open_model: Opener, notes: list[str]
    ) -> None:
        self.recipe, self.method, self.open, self.notes = recipe, method, open_model, notes
        self._layers: dict[int, Layers] = {}
        method.check_names(recipe.parameters, f"{recipe.where}: parameters", of_model=False)

    def sections(self) -> list[Section]:
        """Return the recipe's sections; a recipe without modules is one called default."""
        recipe = self.recipe
        modules = recipe.modules
        if modules is None:
            modules = {"default": Module(models=recipe.models, slices=recipe.slices)}
        return [self._section(name, module) for name, module in modules.items()]

    def _section(self, name: str, module: Module) -> Section:
        where = "" if self.recipe.modules is None else f"modules.{name}."
        self.method.check_names(
            module.parameters, f"{self.recipe.where}: {where}parameters", of_model=False
        )
        if module.slices is None:
            assert module.models is not None
            sources = [_whole(entry) for entry in module.models]
            slices = [(Slice(sources=sources), f"{where}models")]
        else:
            slices = [(s, f"{where}slices[{i}]") for i, s in enumerate(module.slices)]
        return Section(
            name, tuple(self._slice(s, module, f"{self.recipe.where}: {at}") for s, at in slices)
        )

    def _slice(self, given: Slice, module: Module, where: str) -> OutSlice:
        known = self.method.facts
        self.method.check_names(given.parameters, f"{where}.parameters", of_model=False)
        if given.residual_weight is not None:
            self.notes.append(f"{where}: residual_weight has no effect, here or in mergekit")
        base = given.base_model or self.recipe.base_model
        sources = list(given.sources)
        refs = [source.model for source in sources]
        twice = [str(ref) for i, ref in enumerate(refs) if ref in refs[:i]]
        if twice:
            raise RecipeError(f"{where}: {listing(twice)} is given twice")
        if known.base == "ignored":
            if base is not None and base not in refs:
                self.notes.append(
                    f"{self.method.name} has no base, so {base} lends the output only its "
                    "configuration and tokenizer; list it under models to merge it in"
                )
            base = None
        elif base is not None and base not in refs:
            ranges = {source.layer_range for source in sources}
            if len(ranges) > 1:
                raise RecipeError(
                    f"{where}: which layers of the base {base} belong here? The sources have "
                    f"different layer_ranges, so list the base among them with its own"
                )
            sources.append(SliceSource(model=base, layer_range=sources[0].layer_range))
            refs.append(base)
        position = refs.index(base) if base is not None else None
        parts = []
        for i, source in enumerate(sources):
            at = f"{where}: parameters of {source.model}"
            if i == position:
                if source.parameters:
                    self.notes.append(f"{at}: it is the base, so they are not used")
            else:
                self.method.check_names(source.parameters, at, of_model=True)
            weights = self.open(source.model)
            parts.append(
                Part(
                    str(source.model),
                    weights,
                    self._layers_of(weights),
                    source.layer_range,
                    source.parameters,
                    {key: self.open(ref) for key, ref in source.extras.items()},
                )
            )
        out = OutSlice(tuple(parts), position, given.parameters, module.parameters, where)
        self._check_inputs(out)
        return out

    def _layers_of(self, weights: Weights) -> Layers:
        if id(weights) not in self._layers:
            self._layers[id(weights)] = Layers.of(weights)
        return self._layers[id(weights)]

    def _check_inputs(self, out: OutSlice) -> None:
        known, name = self.method.facts, self.method.name
        if known.base == "required" and out.base is None:
            raise RecipeError(f"{out.where}: {name} needs a base model; give base_model")
        experts = experts_of(out, known)
        low, high = known.experts
        if len(experts) < low or (high is not None and len(experts) > high):
            wanted = (
                str(low) if high == low else f"{low} or more" if high is None else f"{low}-{high}"
            )
            beside = " beside the base" if out.base is not None else ""
            raise RecipeError(
                f"{out.where}: {name} takes {wanted} model(s){beside}, but {len(experts)} are given"
            )
        if len(experts) == 1 and high != 1:
            self.notes.append(
                f"{out.where}: {name} is given a single model: there is nothing to reconcile"
            )
        for need in known.needs:
            without = [out.parts[i].model for i in experts if need not in out.parts[i].extras]
            if without:
                raise RecipeError(
                    f"{out.where}: {name} needs '{need}' of every model, and {listing(without)} "
                    f"has none; write extras: {{{need}: path}} beside the model"
                )


def _whole(entry: Entry) -> SliceSource:
    return SliceSource(model=entry.model, parameters=entry.parameters, extras=entry.extras)


# -- vocabularies ----------------------------------------------------------------------------------


class _Vocabularies:
    """Finds token-indexed tensors, aligns them if the recipe says so, and unties heads."""

    def __init__(self, recipe: Recipe, models: Mapping[str, Weights], open_model: Opener) -> None:
        self.models = models
        self._found: dict[int, Vocabulary | None] = {}
        self._matrices: dict[str, list[Source]] = {}
        self._aligned: dict[tuple[str, int], Source] = {}
        self.tokens: Tokens | None = None
        config = tokenizer_config(recipe.tokenizer, donor_text(recipe))
        if config is None:
            return
        labels = list(models)
        donor, vocab = donor_of(config.source, labels, open_model)
        vocabs, folders = [], []
        for label, weights in models.items():
            if weights.folder is None:
                raise RecipeError(
                    f"{recipe.where}: {label} is a bare file without a tokenizer, so vocabularies "
                    "cannot be aligned; name the model's folder, or leave tokenizer out"
                )
            rows = vocabulary_of(weights).rows
            vocabs.append(load_vocab(weights.folder, label=label, rows=rows))
            folders.append(weights.folder)
        base = labels.index(str(recipe.base_model)) if recipe.base_model is not None else None
        alignment = align_models(config, vocabs, base=base, donor=vocab)
        self.tokens = Tokens(alignment, tuple(folders), donor)

    def of(self, weights: Weights) -> Vocabulary | None:
        """Return a model's vocabulary tensors, or None if it has none."""
        if id(weights) not in self._found:
            try:
                self._found[id(weights)] = vocabulary_of(weights)
            except MismatchError:
                self._found[id(weights)] = None
        return self._found[id(weights)]

    def lookup(self, weights: Weights, name: str) -> str | None:
        """Return the name of a tensor in a model; a head that is not there is its embedding."""
        if name in weights:
            return name
        found = self.of(weights)
        if (
            found is None
            or not is_vocabulary_name(name)
            or not name.endswith(".weight")
            or len(found.inputs) != 1
            or any(output.endswith(".weight") for output in found.outputs)
        ):
            return None
        for other in self.models.values():
            theirs = self.of(other)
            if name in other and theirs is not None and name in theirs.outputs:
                return found.inputs[0]
        return None

    def untied(self, names: Sequence[str]) -> bool:
        """Return whether a head is among the output's own tensors."""
        heads = {
            n for w in self.models.values() if (v := self.of(w)) is not None for n in v.outputs
        }
        return any(name in heads and name.endswith(".weight") for name in names)

    def source(self, weights: Weights, label: str, name: str, out: str) -> Source:
        """Return a model's tensor, with the output's rows if tokens index it."""
        own = weights.source(name)
        found = self.of(weights)
        if self.tokens is None or found is None or name not in found.names:
            return own
        position = list(self.models).index(label)
        key = (out, position)
        if key not in self._aligned:
            maps = dict(enumerate(self.tokens.alignment.maps))
            self._aligned[key] = aligned(out, self._all(out), maps, position)
        return self._aligned[key]

    def _all(self, out: str) -> list[Source]:
        """Return every model's matrix for the output tensor `out`."""
        if out not in self._matrices:
            found = []
            for label, weights in self.models.items():
                name = self.lookup(weights, out)
                if name is None:
                    raise MismatchError(
                        f"{label} lacks {out}, which other models index by tokens; its rows are "
                        "needed to align the vocabularies"
                    )
                found.append(weights.source(name))
            self._matrices[out] = found
        return self._matrices[out]


# -- jobs ------------------------------------------------------------------------------------------


def _aliases(items: Sequence[Item]) -> dict[str, str]:
    """Return output names whose inputs all share another output's memory."""
    made = {(id(item.slice_), item.inputs): item.name for item in items}
    aliases = {}
    for item in items:
        parts = item.slice_.parts
        targets = tuple(
            part.weights.aliases.get(name, name)
            for part, name in zip(parts, item.inputs, strict=True)
        )
        if all(a != b for a, b in zip(targets, item.inputs, strict=True)):
            target = made.get((id(item.slice_), targets))
            if target is not None:
                aliases[item.name] = target
    return aliases


def _jobs(
    recipe: Recipe,
    method: _Method,
    items: Sequence[Item],
    aliases: Mapping[str, str],
    vocabularies: _Vocabularies,
    reference: Weights,
) -> tuple[list[Job], list[Mapping[str, Any] | None]]:
    jobs: list[Job] = []
    parameters: list[Mapping[str, Any] | None] = []
    for item in items:
        if item.name in aliases:
            continue
        parts = item.slice_.parts
        sources = [
            vocabularies.source(part.weights, part.model, name, item.name)
            for part, name in zip(parts, item.inputs, strict=True)
        ]
        _check_shapes(item, sources, vocabularies.tokens is not None)
        lead = item.slice_.base if item.slice_.base is not None else 0
        spec = sources[lead].spec
        floating = spec.kind.is_float
        if floating:
            sources = [_rounded(source, recipe) for source in sources]
        if floating and item.name in reference:
            own = reference.source(item.name).spec
            spec = TensorSpec(own.dtype if own.kind.is_float else spec.dtype, spec.shape)
        out = recipe.out_dtype or recipe.dtype
        kind = dtype_of(out).name if out and floating else spec.dtype
        experts = experts_of(item.slice_, method.facts) if floating else list(range(len(parts)))
        base = item.slice_.base if floating and method.facts.base != "ignored" else None
        values = method.values(item) if floating else None
        order = ([base] if base is not None else []) + experts
        jobs.append(
            Job(
                item.name,
                TensorSpec(kind, spec.shape),
                method.build(item, values) if values is not None else None,
                sources[base] if base is not None else None,
                tuple(sources[i] for i in experts),
                _extras(item, method, experts) if floating else {},
                None,
                tuple(parts[i].model for i in order),
                len(jobs),
            )
        )
        parameters.append(values)
    return jobs, parameters


def _rounded(source: Source, recipe: Recipe) -> Source:
    """Return an input as the arithmetic sees it: rounded if asked, wide if dtype is float64."""
    kind = dtype_of(recipe.dtype).name if recipe.dtype else source.spec.dtype
    if kind == source.spec.dtype or not (recipe.round_inputs or kind == "F64"):
        return source
    return Rounded(source, kind)


def _extras(item: Item, method: _Method, experts: Sequence[int]) -> dict[str, tuple[Source, ...]]:
    found = {}
    for need in method.facts.needs:
        given = [(item.slice_.parts[i].extras[need], item.inputs[i]) for i in experts]
        if all(name in weights for weights, name in given):
            found[need] = tuple(weights.source(name) for weights, name in given)
    return found


def _check_shapes(item: Item, sources: Sequence[Source], with_tokens: bool) -> None:
    first = sources[0].spec
    for part, source in zip(item.slice_.parts[1:], sources[1:], strict=True):
        spec = source.spec
        if spec.shape == first.shape and spec.kind.is_float == first.kind.is_float:
            continue
        one = item.slice_.parts[0].model
        told = f"tensor {item.name!r} is {first} in {one}, but {spec} in {part.model}"
        rows_only = spec.shape[1:] == first.shape[1:] and is_vocabulary_name(item.name)
        if rows_only and not with_tokens:
            raise MismatchError(
                f"{told}: the vocabularies differ. Add 'tokenizer_source: union' (or base) to the "
                "recipe, and rows are matched by token"
            )
        raise MismatchError(f"{told}; only models of one architecture can be merged")
