"""Whether two classes can be separated by a hyperplane, with a certificate either way.

Gilbert's algorithm looks for the point nearest to the origin in the convex hull of z_i = y_i a_i. Where it stays away from the
origin, that point is a separator, and its margin is certified by the samples; where it comes to the origin, the weights of the
samples are a certificate that no separator exists. Gilbert, "An iterative procedure for computing the minimum of a quadratic form
on a convex set", 1966.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.optim.normalized_gd import signed
from headway.optim.sparse_rows import norms, row


@dataclass(frozen=True)
class Separability:
    """What is known about a data set.

    Attributes:
        separable: True, False, or None where ``max_iter`` steps did not decide.
        theta: (d,) the nearest point found; a separator where ``separable``.
        margin: the smallest margin of theta / ||theta||; at most the best one, mu.
        weights: (n,) a convex combination of the samples; near the origin where not separable.
        distance: norm of that combination; the best margin mu is at most that.
        n_iter: steps taken.
    """

    separable: bool | None
    theta: Tensor
    margin: float
    weights: Tensor
    distance: float
    n_iter: int


def separability(A: Any, y: Any, tol: float = 1e-9, max_iter: int = 100000, gap: float = 1e-3) -> Separability:
    """Certifies that a hyperplane through the origin separates the data, or that none does (append a column of ones for an
    intercept).

    Args:
        A: (n, d), dense or sparse; y: (n,), two values.
        tol: a combination of norm below tol * max ||a_i|| counts as the origin.
        gap: once separated, go on until margin >= (1 - gap) distance, so that ``margin`` is that near to the best one.

    Raises:
        ValueError: as for ``large_step_gd``.
    """
    Z = signed(A, y)
    scale = float(norms(Z, 1).max())
    share = torch.zeros(len(Z), dtype=torch.float64)
    share[0] = 1.0
    w, t = row(Z, 0).clone(), 0
    m = Z @ w
    for t in range(max_iter + 1):
        m = Z @ w
        size = float(w @ w)
        worst = int(m.argmin())
        if size <= (tol * scale) ** 2 or (float(m[worst]) > 0 and float(m[worst]) >= (1 - gap) * size) or t == max_iter:
            break
        # away from the sample of the largest margin in use, or towards the one of the smallest: whichever gains more
        used = torch.where(share > 0, m, -torch.inf)
        far = int(used.argmax())
        towards, away = size - float(m[worst]), float(m[far]) - size
        if towards >= away or float(share[far]) >= 1:
            d, most, at, sign = row(Z, worst) - w, 1.0, worst, 1.0
        else:
            d, most, at, sign = w - row(Z, far), float(share[far]) / (1 - float(share[far])), far, -1.0
        step = min(max(-float(w @ d) / max(float(d @ d), 1e-300), 0.0), most)
        w = w + step * d
        share = share * (1 - sign * step)
        share[at] += sign * step
        share.clamp_(min=0)
    size, low = float(w.norm()), float(m.min())
    separable = True if low > 0 else False if size <= tol * scale else None
    return Separability(separable, w, low / max(size, 1e-300), share, size, t)
