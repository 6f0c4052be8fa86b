"""The weight compander in plain torch: w = a arctan(v / b), its gradients, and the other maps behind the same interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type the map is computed in."""
    return torch.promote_types(dtype, torch.float32)


def compand(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a * arctan(v / b)`` in at least float32, in the type of ``v``."""
    x = v.to(wide(v.dtype))
    return (a.to(x.dtype) * torch.atan(x / b.to(x.dtype))).to(v.dtype)


def compand_backward(g: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of v, a and b, the latter two summed in float64."""
    x, gw, a_, b_ = (t.to(wide(v.dtype)) for t in (v, g, a, b))
    r = x / b_
    q = 1 / (1 + r * r)
    gv = gw * (a_ / b_) * q
    ga = _sum_like(gw * torch.atan(r), a)
    gb = _sum_like(-gv * r, b)
    return gv.to(v.dtype), ga, gb


def _sum_like(x: Tensor, like: Tensor) -> Tensor:
    return x.double().sum_to_size(like.shape).to(like.dtype)


@dataclass(frozen=True)
class Map:
    """A map of r = v / b: w = a * f(r).

    Attributes:
        f, inverse: of each other.
        bound: the supremum of |f|.
    """

    f: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    bound: float = math.inf


POWER = 0.8
# keeps the slope of the power at 0 finite, so that a weight that is exactly 0 can leave it
_TINY = 1e-12


def _mu_law(r: Tensor) -> Tensor:
    # two halves, because sign(r) log(1 + |r|) would have no slope at 0
    return torch.where(r >= 0, torch.log1p(r.clamp(min=0)), -torch.log1p((-r).clamp(min=0)))


MAPS: dict[str, Map] = {
    "arctan": Map(torch.atan, torch.tan, math.pi / 2),
    "tanh": Map(torch.tanh, torch.atanh, 1.0),
    "softsign": Map(lambda r: r / (1 + r.abs()), lambda u: u / (1 - u.abs()), 1.0),
    "mu-law": Map(_mu_law, lambda u: u.sign() * torch.expm1(u.abs())),
    "power": Map(lambda r: r * (r.abs() + _TINY) ** (POWER - 1), lambda u: u.sign() * u.abs() ** (1 / POWER)),
    "identity": Map(lambda r: r, lambda u: u),
}
