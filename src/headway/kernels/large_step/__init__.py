"""One iteration of large-step logistic regression in one reading of the data.

    m = Z u,   share_i = sigma(-gamma m_i) (1 or 0 by the sign of m_i for gamma = inf),   step = Z^T share / n or / sum(share)

Two matrix products read Z twice. The C++ body takes eight rows at a time: their dot products bring them from memory, adding them up
finds them in the nearest caches, and rows that are all right (gamma = inf) are not added up at all. At best half the time of two
readings, for a Z that no cache holds. :mod:`.reference` is the truth it is tested against.

Operator: ``margins_and_step(Z (n, d), u (d,), gamma, normalized) -> (margins (n,), step (d,))``, float64 in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.large_step import reference
from headway.kernels.library import define, load

built = load("large_step")
"""Whether the C++ body is there."""


def _shapes(Z: Tensor, u: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return Z.new_empty(len(Z)), torch.empty_like(u)


margins_and_step = define(
    "margins_and_step(Tensor Z, Tensor u, float gamma, bool normalized) -> (Tensor, Tensor)",
    reference.margins_and_step,
    _shapes,
)
