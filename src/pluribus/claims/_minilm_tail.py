"""The last layers of MiniLM, on hidden states that were made before, for claims that adapt them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pluribus.core.shapes import Float, Int
from pluribus.tasks.encoders import minilm
from pluribus.tasks.zoos import text6


def encoder_of() -> minilm.MiniLM:
    """Return the encoder as it was published, frozen, with features as long as text6's."""
    encoder = minilm.MiniLM(scale=text6.SCALE)
    encoder.load_state_dict(minilm.pretrained())
    return encoder.eval().requires_grad_(False)


class Tail(nn.Module):
    """The last layers of MiniLM, from hidden states that were made before."""

    def __init__(self, encoder: minilm.MiniLM, first: int) -> None:
        super().__init__()
        self.layer = encoder.encoder.layer[first:]
        self.scale = encoder.scale

    def forward(
        self, hidden: Float[Tensor, "b s d"], attention_mask: Int[Tensor, "b s"]
    ) -> Float[Tensor, "b d"]:
        """Return the features, as the whole encoder does."""
        unseen = torch.zeros_like(hidden[:, :, 0]).masked_fill(attention_mask == 0, float("-inf"))
        for layer in self.layer:  # type: ignore[union-attr]
            hidden = layer(hidden, unseen[:, None, None])
        real = attention_mask[:, :, None]
        return self.scale * normalize((hidden * real).sum(1) / real.sum(1), dim=1)


def lower(encoder: minilm.MiniLM, ids: Int[Tensor, "b s"], first: int) -> dict[str, Tensor]:
    """Return what `Tail` takes: hidden states (b, s, d) before layer `first`, and the mask."""
    mask = (ids != minilm.PADDING).long()
    hidden = torch.zeros(*ids.shape, encoder.width)
    with torch.no_grad():
        for rows in mask.sum(1).argsort().split(64):
            length = int(mask[rows].sum(1).max())
            seen = mask[rows, :length]
            unseen = torch.zeros(seen.shape).masked_fill(seen == 0, float("-inf"))
            x = encoder.embeddings(ids[rows, :length])
            for layer in encoder.encoder.layer[:first]:
                x = layer(x, unseen[:, None, None])
            hidden[rows, :length] = x
    return {"hidden": hidden, "attention_mask": mask}
