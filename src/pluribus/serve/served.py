"""Models that run here, opened and ready to be asked: an engine each, and embeddings."""

import inspect
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pluribus.core.errors import PluribusError
from pluribus.core.optional import optional
from pluribus.decode.stack import Stack, build, open_reference
from pluribus.serve.config import Endpoint, Server
from pluribus.serve.engine import Engine
from pluribus.serve.errors import wrong
from pluribus.serve.recipes import Hogwild, Scale
from pluribus.serve.remote import Remote

if TYPE_CHECKING:
    from pluribus.serve.composed import Composed

TOKENS = 4096  # of one pass for embeddings, padding included


class Served:
    """One local model under its name."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        rows: int = 16,
        embed: str = "mean",
        writes: bool = True,
        engine: Engine | None = None,
        part: str | None = None,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.created = int(time.time())
        self.embed_how, self.writes = embed, writes
        self.part = part  # of a composite, whose engine it shares
        ends = ends_of(model, tokenizer) if writes else []
        self.engine = engine or Engine(model, tokenizer, ends, rows, name)
        config: Any = getattr(model, "config", None)
        self.room: int | None = getattr(config, "max_position_embeddings", None)
        self.width: int | None = getattr(config, "hidden_size", None) if self.embeds else None
        self.vocabulary = int(getattr(config, "vocab_size", None) or len(tokenizer))

    def close(self) -> None:
        """Cut off what runs."""
        self.engine.close()

    def specialists(self, known: Collection[str], rows: int = 16) -> dict[str, "Served"]:
        """Return the models inside, as NAME:PART: parts of a composite, or a stack's members.

        Names that are `known` already are left out.
        """
        made = {}
        if hasattr(self.model, "route") and hasattr(self.model, "sites"):
            for part in self.model.names:
                if (name := f"{self.name}:{part}") not in known:
                    made[name] = Served(
                        name, self.model, self.tokenizer, embed="no", engine=self.engine, part=part
                    )
        for role, one in getattr(self.model, "members_by_role", {}).items():
            name = f"{self.name}:{role}"
            if one.runs is one.module and name not in known:
                words = self.model.tokenizers.get(role, self.tokenizer)
                made[name] = Served(name, one.module, words, rows=rows)
        return made

    @property
    def embeds(self) -> bool:
        """Whether it has hidden states to make embeddings of."""
        return self.embed_how == "mean" and not hasattr(self.model, "members_by_role")

    def portions(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return which rows of ids are embedded in one pass, the longest first."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        made = []
        while order:
            count = max(1, TOKENS // len(rows[order[0]]))
            made.append(order[:count])
            order = order[count:]
        return made

    @torch.inference_mode()
    def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the mean of the last hidden states of each row of ids, scaled to length 1."""
        device = next(self.model.parameters()).device
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        seen = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(list(row))
            seen[i, : len(row)] = 1
        given: dict[str, Any] = {"output_hidden_states": True}
        runs = getattr(self.model, "base", self.model) if self.writes else self.model
        if "logits_to_keep" in inspect.signature(runs.forward).parameters:
            given["logits_to_keep"] = 1
        out = self.model(input_ids=ids.to(device), attention_mask=seen.to(device), **given)
        states = getattr(out, "hidden_states", None)
        if not states:
            raise wrong(f"the model {self.name!r} tells no hidden states to make embeddings of")
        weights = seen.to(device)[..., None].float()
        mean = (states[-1].float() * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().tolist()


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: those of the model's settings, and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = list(own) if isinstance(own, list) else [] if own is None else [own]
    found.append(getattr(tokenizer, "eos_token_id", None))
    return [token for token in dict.fromkeys(found) if token is not None]


def open_all(
    server: Server, told: Callable[[str], None] = lambda name: None
) -> "dict[str, Composed | Remote | Served]":
    """Open all models of a server's file. Raises what opening raises, with the model's name.

    Strategies are made last, over what is open by then.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in server.models}
    late = [name for name, one in server.models.items() if isinstance(one, Scale)]
    try:
        for name in [*(n for n in server.models if n not in late), *late]:
            told(name)
            try:
                every = {key: one for group in found.values() for key, one in group.items()}
                found[name][name] = one = _opened(server, name, every)
                if server.specialists and isinstance(one, Served):
                    found[name] |= one.specialists(server.models, server.limits.rows)
            except PluribusError as error:
                if len(server.models) == 1:
                    raise
                raise type(error)(f"models.{name}: {error}") from None
    except BaseException:
        for group in found.values():
            for one in group.values():
                one.close()
        raise
    return {key: one for group in found.values() for key, one in group.items()}


def _opened(server: Server, name: str, members: Mapping[str, Any]) -> "Composed | Remote | Served":
    from pluribus.serve import composed

    member, rows = server.models[name], server.limits.rows
    if isinstance(member, Endpoint):
        return Remote(name, member)
    if isinstance(member, Stack):
        device = None if server.device == "cpu" else server.device
        return Served(name, *build(member, device), rows=rows)
    if isinstance(member, Scale):
        head = None if member.head is None else server.place(member.head)
        recipe = member.model_copy(update={"head": head})
        return composed.Scaled(name, composed.over(name, member, members), recipe, rows)
    written = member.hogwild if isinstance(member, Hogwild) else member.reference
    reference = "+".join(server.place(part) for part in written.split("+"))
    device, dtype = member.device or server.device, member.dtype or server.dtype
    if isinstance(member, Hogwild):
        return composed.Together(name, *open_reference(reference, device, dtype), member)
    if (encoder := _encoder(reference, device, dtype)) is not None:
        return Served(name, *encoder, rows=rows, embed=member.embed, writes=False)
    opened = open_reference(reference, device, dtype)
    return Served(name, *opened, rows=rows, embed=member.embed)


def _encoder(reference: str, device: str, dtype: str) -> tuple[Any, Any] | None:
    """Open a folder whose model reads but does not write; None for any other reference."""
    path = Path(reference).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None  # whoever opens models says what is wrong with it
    kinds = told.get("architectures") or [] if isinstance(told, dict) else []
    hf = optional("transformers", "hf", "serving a model")
    known = hf.models.auto.modeling_auto
    names = {*known.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()}
    encoders = set(known.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    read_only = told.get("model_type") in encoders if isinstance(told, dict) else False
    if not read_only or not any(k in names or k.endswith("Model") for k in kinds):
        return None
    from pluribus.tasks.device import usable

    usable(device)
    kind = getattr(torch, dtype, torch.float32)
    model = hf.AutoModel.from_pretrained(path.parent, dtype=kind, local_files_only=True)
    tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, local_files_only=True)
    return model.to(device).eval(), tokenizer
