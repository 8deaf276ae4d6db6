"""`Fused`: several causal language models that write as one.

    log P~(y | x, y_<t) = fuser({role: logits of the role's model at its own prefix})       (b, v)

Each role has its own key-value cache and, if it is given one, its own prompt; the tokens written
are common to all. It is a transformers model: generation (greedy, sampling, beams, streaming,
assisted), pipelines and evaluation take it as they take any. Its logits are log-probabilities in
float32, and it is always in eval mode.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, nearest
from pluribus.core.optional import optional
from pluribus.core.shapes import Int
from pluribus.decode._align import aligned
from pluribus.decode._cache import FusedCache
from pluribus.decode._config import FusedConfig, FusedOutput
from pluribus.decode._limits import Watch, check_room
from pluribus.decode._members import leaders, member_of, room, scored
from pluribus.decode._prompts import Own, check_templates, own_prompts, repeated
from pluribus.decode._step import fuse, step
from pluribus.decode.fusers import settings_of

hf = optional("transformers", "hf", "fusing language models")


class Fused(hf.PreTrainedModel, hf.GenerationMixin):
    """Models in roles, and a fuser that makes one distribution of theirs.

    `models` maps roles to transformers models; one model in two roles is kept once, and run once
    where both read the same. `tokenizers` (by role) let the token maps be compared: `align` says
    whether they must be the same, or may append tokens (`prefix`). `devices` places roles.

    Raises InputError for no or unsuitable models and roles, MismatchError for vocabularies that
    differ.
    """

    config_class = FusedConfig
    main_input_name = "input_ids"
    _no_split_modules = ()

    def __init__(
        self,
        models: Mapping[str, Any],
        fuser: Any,
        tokenizers: Mapping[str, Any] | None = None,
        align: str = "same",
        devices: Mapping[str, Any] | None = None,
    ) -> None:
        if not models:
            raise InputError("there is no model to fuse; give {role: model}")
        members = {role: member_of(role, model) for role, model in models.items()}
        for role in devices or {}:
            if role not in members:
                raise InputError(
                    f"devices places {role!r}; roles are {', '.join(members)}."
                    f"{nearest(role, members)}"
                )
        sizes = {role: scored(one) for role, one in members.items()}
        shared = aligned(sizes, tokenizers, align)
        fuser.check_roles(list(members))
        rooms = [(found, role) for role, one in members.items() if (found := room(one))]
        self_config = FusedConfig(
            vocab_size=shared.size,
            max_position_embeddings=min(rooms)[0] if rooms else None,
            roles=list(members),
            align=align,
        )
        super().__init__(self_config)
        self.members_by_role = members
        self.members = nn.ModuleList({id(m.module): m.module for m in members.values()}.values())
        self.shortest = min(rooms)[1] if rooms else None
        self.vocabulary_checked = shared.checked
        self.tokenizers = dict(tokenizers or {})
        self.prompts: dict[str, str] = {}  # templates by role, of a stack
        self.watch = Watch()
        for role, device in (devices or {}).items():
            members[role].module.to(device)
        self.register_buffer("fusing", torch.zeros(0, dtype=torch.uint8))
        self.fuser = fuser
        self.generation_config = self._ends(shared.size)
        self.post_init()
        self.train(False)

    # -- what it is --------------------------------------------------------------------------------

    @property
    def roles(self) -> tuple[str, ...]:
        """The members' roles, in order."""
        return tuple(self.members_by_role)

    @property
    def fuser(self) -> Any:
        """What combines the members; it may be replaced between calls."""
        return self._fuser

    @fuser.setter
    def fuser(self, fuser: Any) -> None:
        """Combine the members by another one. Raises InputError if the roles are not its."""
        fuser.check_roles(list(self.members_by_role))
        object.__setattr__(self, "_fuser", fuser)
        try:
            settings = settings_of(fuser)
        except InputError:  # one of the user's own, which only saving needs in words
            settings = {"kind": type(fuser).__qualname__}
        self.config.fuser = json.loads(json.dumps(settings))
        said = json.dumps(settings, sort_keys=True).encode()  # so that digests tell fusers apart
        self.fusing = torch.frombuffer(bytearray(said), dtype=torch.uint8).to(self.device)

    def set_weights(self, weights: float | Mapping[str, float]) -> None:
        """Use other weights from now on: a dial. Raises InputError if the fuser has none to set."""
        for name in ("weights", "alpha"):
            if hasattr(self.fuser, name):
                given = dict(weights) if isinstance(weights, Mapping) else weights
                self.fuser = replace(self.fuser, **{name: given})
                return
        raise InputError(f"{type(self.fuser).__name__} has no weights to set: it finds them")

    def set_prompts(self, templates: Mapping[str, str]) -> None:
        """Give roles templates of their own for `encode`: a text with {prompt}, or "chat".

        Raises InputError for an unknown role, or a template without a place for the prompt.
        """
        check_templates(templates, self.roles)
        self.prompts = dict(templates)

    def train(self, mode: bool = True) -> "Fused":
        """Stay in eval mode: dropout in one member would be noise in all."""
        return super().train(False)

    def init_weights(self) -> None:
        """Leave the members' weights as they are."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Leave the members' ties as they are."""

    def _ends(self, size: int) -> Any:
        """Return generation settings: any member's end token ends, if all can say it."""
        ends: list[int] = []
        pad = None
        for one in self.members_by_role.values():
            own: Any = getattr(one.runs, "generation_config", None)
            found = getattr(own, "eos_token_id", None)
            ends += found if isinstance(found, list) else [] if found is None else [found]
            pad = getattr(own, "pad_token_id", None) if pad is None else pad
        ends = [token for token in dict.fromkeys(ends) if token < size]
        return hf.GenerationConfig(
            eos_token_id=ends if len(ends) > 1 else ends[0] if ends else None,
            pad_token_id=pad if pad is not None else ends[0] if ends else None,
        )

    # -- running -----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "b s"] | None = None,
        attention_mask: Int[Tensor, "b a"] | None = None,
        position_ids: Int[Tensor, "_ s"] | None = None,
        cache: FusedCache | None = None,
        past_key_values: FusedCache | None = None,
        labels: Int[Tensor, "b s"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        member_inputs: Mapping[str, Any] | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Return fused log-probabilities (b, s, v) as `logits`, weights, and the loss of `labels`.

        `attention_mask` covers what the cache holds too. With `member_inputs`, by role
        `{"input_ids", "attention_mask"}`, roles read their own prompt instead, and only the last
        position of this first call is given. Raises InputError for what cannot be run so.
        """
        for name, value in others.items():
            if value is not None and value is not False:
                raise InputError(f"a fused model has no {name}; members share ids and logits alone")
        if input_ids is None:
            raise InputError("give input_ids: members have their own embeddings")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = cache is not None or labels is None
        if not use_cache and cache is not None:
            raise InputError("a cache is given, but use_cache is False; give one or neither")
        if cache is not None and not isinstance(cache, FusedCache):
            raise InputError(f"a {type(cache).__name__} is another model's cache; give none")
        if use_cache and cache is None:
            cache = FusedCache()
        own = self._own(input_ids, cache, member_inputs, labels, logits_to_keep)
        self.fits(input_ids, attention_mask, cache, own)
        self._begin(cache, own, input_ids)
        leader = leaders(self.members_by_role, own, self.roles) if cache is None else cache.leader
        by_leader = {}
        for role in dict.fromkeys(leader.values()):
            keep = 1 if own else logits_to_keep
            by_leader[role] = step(
                self,
                role,
                input_ids,
                attention_mask,
                position_ids,
                cache,
                own,
                keep,
            )
        if cache is not None:
            cache.length += input_ids.shape[1]
        logits, weights, _ = fuse(self, {role: by_leader[leader[role]] for role in self.roles})
        if cache is not None:
            cache.note(list(weights), torch.stack(list(weights.values()), -1))
        loss = None
        if labels is not None:
            ahead = labels[:, 1:].to(logits.device)
            loss = nn.functional.nll_loss(
                logits[:, :-1].flatten(0, 1), ahead.flatten(), ignore_index=-100
            )
        out = FusedOutput(loss=loss, logits=logits, weights=weights, **{_CACHE: cache})
        return out.to_tuple() if return_dict is False else out

    def _own(
        self,
        ids: Tensor,
        cache: FusedCache | None,
        given: Mapping[str, Any] | None,
        labels: Tensor | None,
        keep: int | Tensor,
    ) -> dict[str, Own]:
        """Return own prompts if they are to be read now: not once the cache has begun."""
        if not given or (cache is not None and cache.length):
            return {}
        if labels is not None or (isinstance(keep, int) and keep > 1):
            raise InputError(
                "with prompts of roles positions of the prompt have no common logits; "
                "score(prompt, continuation) gives those of a continuation"
            )
        if cache is None:
            raise InputError("prompts of roles need the cache; leave use_cache on")
        return own_prompts(given, self.roles, len(ids))

    def _begin(self, cache: FusedCache | None, own: Mapping[str, Own], ids: Tensor) -> None:
        if cache is None or cache.leader:
            return
        found = leaders(self.members_by_role, own, self.roles)
        masks = {role: own[role].mask for role in dict.fromkeys(found.values()) if role in own}
        cache.start(found, masks, ids.shape[1])

    def fits(
        self,
        ids: Int[Tensor, "b s"],
        mask: Int[Tensor, "b a"] | None,
        cache: FusedCache | None,
        own: Mapping[str, Own],
        more: int = 0,
    ) -> None:
        """Raise InputError if these tokens, and `more`, are too many for the shortest member."""
        limit = self.config.max_position_embeddings
        check_room(limit, self.shortest, ids.shape[1], mask, cache, own, more)

    # -- writing -----------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Write, as transformers models do; also with `member_inputs` (see `forward`).

        With `return_dict_in_generate=True` the result has `fusion_weights`: for each role (b, new),
        the weight with which each returned token was chosen; NaN after a beam's end.
        """
        given = kwargs.get("member_inputs")
        if given is not None and kwargs.get("prefill_chunk_size") is not None:
            raise InputError("prompts of roles are read whole: leave prefill_chunk_size out")
        out = super().generate(*args, **kwargs)
        kept_cache = getattr(out, _CACHE, None)
        if isinstance(kept_cache, FusedCache):
            out.fusion_weights = kept_cache.by_token(getattr(out, "beam_indices", None))
        return out

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any, **named: Any
    ) -> None:
        """Put an empty cache where there is none; and check that there is room."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation={generation_config.cache_implementation!r}: members make "
                "their own caches; leave it out"
            )
        kept_cache = model_kwargs.get(_CACHE)
        own = model_kwargs.get("member_inputs") or {}
        past = 0 if kept_cache is None else kept_cache.get_seq_length()
        length = model_kwargs["position_ids"].shape[-1]
        check_room(
            self.config.max_position_embeddings,
            self.shortest,
            length - past,
            model_kwargs.get("attention_mask"),
            kept_cache,
            own,
            generation_config.max_length - length,
        )
        if generation_config.use_cache is not False and kept_cache is None:
            model_kwargs[_CACHE] = FusedCache()
            if getattr(generation_config, "is_assistant", False):
                model_kwargs[_CACHE].activate_past_recording()

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("member_inputs")
        rows = len(kwargs["input_ids"])
        ids, kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        if given:
            own = own_prompts(given, self.roles, rows)
            kwargs["member_inputs"] = repeated(own, len(ids) // rows)
        return ids, kwargs

    # -- more, in files of their own ---------------------------------------------------------------

    def score(self, prompt: Any, continuation: Any, **settings: Any) -> Any:
        """Return what all members and the fusion of them say of a continuation: see `_score`."""
        from pluribus.decode._score import score

        return score(self, prompt, continuation, **settings)

    def encode(self, prompts: str | Sequence[str]) -> dict[str, Any]:
        """Return the inputs of texts, with roles' own prompts where there are templates."""
        from pluribus.decode._score import encode

        return encode(self, [prompts] if isinstance(prompts, str) else list(prompts))

    def save_pretrained(self, folder: Any, **settings: Any) -> None:  # type: ignore[override]
        """Write a folder that opens as a model: see `pluribus.decode._save.save`."""
        from pluribus.decode._save import save

        save(self, folder, **settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> "Fused":  # type: ignore[override]
        """Read a folder that `save_pretrained` wrote: see `pluribus.decode._save.load`."""
        from pluribus.decode._save import load

        return load(folder, **settings)


# What transformers calls the cache, as an argument and in outputs: it was renamed.
_CACHE = (
    "cache"
    if "cache" in inspect.signature(hf.GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
hf.AutoConfig.register(FusedConfig.model_type, FusedConfig, exist_ok=True)
hf.AutoModelForCausalLM.register(FusedConfig, Fused, exist_ok=True)
