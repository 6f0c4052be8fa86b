"""Norms of weights, and weights back to them, wherever their parts lie: one process, or several (``DTensor``).

A weight that FSDP2 or tensor parallelism cuts keeps the norm of the whole: processes add up their sums of squares, one number a
tensor (or a row), in one vector for all weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels import sphere
from headway.kernels.radial import runs_of_rows
from headway.kernels.sphere import reference
from headway.optim.sharded import cuts, exchange, here, is_spread

_HALF_STEP = 2.0**-8
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def served(p: Tensor) -> str:
    """What projects this weight: "spread" (parts in several processes), "native" (the C++ body) or "plain"."""
    if is_spread(p):
        return "spread"
    native = sphere.built and p.device.type == "cpu" and p.dtype in _TYPES and not torch.compiler.is_compiling()
    return "native" if native and runs_of_rows(p) else "plain"


def norm(p: Any, rows: bool) -> Tensor:
    """The Frobenius norm of a weight, 0-dim, or with ``rows`` that of every row of its first axis, (n,). Summed in float64: over
    a large weight a sum in float32 is off by more than a projection may be."""
    if not is_spread(p):
        exact = reference.norms_type(p) if p.device.type == "mps" else torch.float64
        return reference.norm(p, rows, exact).to(reference.norms_type(p))
    found: Any = _spread_norms([p], rows)[0]
    if not rows:
        return found
    whole = torch.zeros(len(p), dtype=found.dtype, device=found.device)
    whole[_own_rows(p)] = found
    # a row that other processes hold is zero here; replicas hold the same
    return exchange([whole], [[group for group, _ in cuts(p)]], lambda parts: parts.amax(0))[0]


def square(p: Any) -> Tensor:
    """The sum of squares of a vector, 0-dim and the same in every process."""
    found: Any = p.to(reference.norms_type(p)).square().sum()
    return found.full_tensor() if is_spread(found) else found


def project_(params: list[Tensor], rho: list[Tensor], missed: Tensor, rows: bool) -> None:
    """W <- rho W / ||W|| for weights of one device, dtype and kind (:func:`served`)."""
    near = _HALF_STEP if params[0].dtype in (torch.bfloat16, torch.float16) else 0.0
    kind = served(params[0])
    if kind == "native":
        sphere.to_sphere_(params, rho, missed, near, rows)
    elif kind == "plain":
        reference.to_sphere_(params, rho, missed, near, rows)
    else:
        for p, own, found in zip(params, rho, _spread_norms(params, rows), strict=True):
            wanted = own.to(found.device, found.dtype)
            by, count = reference.factor(wanted[_own_rows(p)] if rows else wanted, found, near)
            missed += count
            part = here(p)
            part.mul_(by.view(-1, *[1] * (p.dim() - 1)) if rows else by)


def _spread_norms(params: list[Any], rows: bool) -> list[Tensor]:
    """Norms of the whole weights; with ``rows`` of those rows that this process has a part of."""
    squares = [reference.norm(here(p), rows).square() for p in params]
    groups = [[group for group, inside in cuts(p) if inside or not rows] for p in params]
    return [s.sqrt() for s in exchange(squares, groups, lambda parts: parts.sum(0))]


def _own_rows(p: Any) -> slice:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return slice(offset[0], offset[0] + shape[0])
