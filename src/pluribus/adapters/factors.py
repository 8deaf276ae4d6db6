"""Algebra of low-rank products b @ a, (R, r) @ (r, c), that never forms the (R, c) matrix."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pluribus.core.errors import InputError, OutputError, nearest
from pluribus.core.lowrank import Factors
from pluribus.core.spectral import CUT

if TYPE_CHECKING:
    from torch import Tensor


DTYPES = ("float32", "bfloat16", "float16", "float64")  # that an adapter may be stored in


class Product(NamedTuple):
    """A low-rank matrix b @ a in float64."""

    b: "Tensor"  # (R, r)
    a: "Tensor"  # (r, c)

    @property
    def energy(self) -> float:
        """Squared Frobenius norm: the sum of (b^T b) * (a a^T)."""
        return max(0.0, float(((self.b.mT @ self.b) * (self.a @ self.a.mT)).sum()))


def product(factors: Factors, weight: float = 1.0) -> Product:
    """Read factors, with their scale and a weight taken into b."""
    import torch

    a = torch.from_numpy(factors.a.floats()).double().reshape(factors.a.spec.shape[0], -1)
    b = torch.from_numpy(factors.b.floats()).double().reshape(-1, a.shape[0])
    return Product(b * (factors.scale * weight), a)


def stacked(parts: list[Product]) -> Product:
    """Return the sum of products as one product of summed rank."""
    import torch

    return Product(torch.cat([p.b for p in parts], 1), torch.cat([p.a for p in parts], 0))


def minus(one: Product, other: Product) -> Product:
    """Return one - other."""
    return stacked([one, Product(-other.b, other.a)])


def truncated(of: Product, rank: int | None = None, energy: float | None = None) -> Product:
    """Return the best product of lower rank, by the SVD of the small core between two QRs."""
    import torch

    q, left = torch.linalg.qr(of.b)
    p, right = torch.linalg.qr(of.a.mT)
    u, s, vh = torch.linalg.svd(left @ right.mT)
    # Updates that cancel leave rounding noise, small beside the factors it comes from.
    k = chosen(s, rank, energy, epsilon=1e-12 * float(left.norm() * right.norm()))
    return balanced(q @ u[:, :k], s[:k], vh[:k] @ p.mT)


def chosen(s: "Tensor", rank: int | None, energy: float | None, epsilon: float = 0.0) -> int:
    """Return how many of the falling singular values `s` to keep.

    At most `rank`, no more than reach `energy` of the sum of squares, only those above `epsilon`
    and above rounding noise.
    """
    if s.numel() == 0 or float(s[0]) == 0:
        return 0
    k = int((s > max(epsilon, CUT * float(s[0]))).sum())
    if energy is not None:
        squares = s.square().cumsum(0)
        k = min(k, 1 + int((squares < energy * squares[-1]).sum()))
    return k if rank is None else min(k, rank)


def balanced(u: "Tensor", s: "Tensor", vh: "Tensor", distribute: bool = True) -> Product:
    """Return u diag(s) vh as a product; signs are fixed, so that any LAPACK gives the same.

    `distribute` gives both factors the roots of the singular values; else a carries them all.
    """
    import torch

    if u.shape[1]:
        peak = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
        sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
        u, vh = u * sign, vh * sign[:, None]
    root = s.sqrt()
    if not distribute:
        return Product(u, s[:, None] * vh)
    return Product(u * root, root[:, None] * vh)


def shaped(of: Product, shape: tuple[int, ...], dtype: str) -> "tuple[Tensor, Tensor]":
    """Return (A, B) as PEFT stores them for a weight of `shape`: kernels keep their axes in A."""
    import torch

    kind = getattr(torch, dtype)
    k = of.a.shape[0]
    ones = (1,) * (len(shape) - 2)
    a = of.a.reshape(k, *shape[1:]).to(kind).contiguous()
    return a, of.b.reshape(shape[0], k, *ones).to(kind).contiguous()


def check_sizes(rank: int | None, energy: float | None) -> None:
    """Raise InputError for a rank below 1 or a share of energy outside (0, 1]."""
    if rank is not None and rank < 1:
        raise InputError(f"rank = {rank}: give at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy = {energy}: give a share in (0, 1]")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise InputError unless `value` is one of the choices."""
    if value not in choices:
        raise InputError(
            f"{name} = {value!r}: give {' or '.join(choices)}.{nearest(value, choices)}"
        )


def check_place(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return where an adapter goes. Raises OutputError if it would replace what it must not."""
    out = Path(os.path.expanduser(out))
    if out.exists() and not overwrite:
        raise OutputError(
            f"{out}: exists; give another name, or overwrite=True (--overwrite) to replace it"
        )
    if out.exists() and not (out / "adapter_config.json").is_file():
        raise OutputError(f"{out}: exists and is not an adapter; it is not replaced")
    return out


def published(out: str | os.PathLike[str], write: Callable[[Path], None], overwrite: bool) -> Path:
    """Let `write` fill a temporary folder, and give it its name when it is whole.

    Raises OutputError if something is there already and `overwrite` is not set.
    """
    out = check_place(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        write(part)
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            os.rename(out, old)
            os.rename(part, out)
            shutil.rmtree(old)
        else:
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out
