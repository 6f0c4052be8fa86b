"""Weights back to their norms in plain torch: the truth, what ``torch.compile`` fuses, and what runs on a GPU.

Nothing here asks a tensor for its value, so that a projection on a GPU never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 1e-12


def norms_type(p: Tensor) -> torch.dtype:
    """The type norms are taken in: float64 for float64, float32 for what is smaller."""
    return torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32


def norm(p: Tensor, rows: bool, dtype: torch.dtype | None = None) -> Tensor:
    """The Frobenius norm, 0-dim; with ``rows`` that of every row, (n,). ``dtype``: what it is summed in."""
    dtype = dtype or norms_type(p)
    if p.is_complex():
        p = torch.view_as_real(p)
    return (
        torch.linalg.vector_norm(p.flatten(1), dim=1, dtype=dtype) if rows else torch.linalg.vector_norm(p, dtype=dtype)
    )


def factor(rho: Tensor, norms: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """What brings norms back to ``rho``, and how many norms were not finite (those keep their tensors as they are)."""
    finite = torch.isfinite(norms)
    found = torch.where(finite & (norms > 0), rho / norms.clamp(min=_SMALL), 1.0)
    # a factor this near to 1 would round away: wait until the norm has moved further
    found = torch.where((found - 1).abs() > near, found, 1.0) if near else found
    return found, (~finite).sum()


def to_sphere_(params: Sequence[Tensor], rho: Sequence[Tensor], missed: Tensor, near: float, rows: bool) -> None:
    """As :func:`headway.kernels.sphere.to_sphere_`; the parameters are of one device and dtype."""
    if not params:
        return
    if rows or params[0].is_complex():
        found = [factor(r.to(p.device), norm(p, rows), near) for r, p in zip(rho, params, strict=True)]
        shaped = [f.view(-1, *[1] * (p.dim() - 1)) if rows else f for (f, _), p in zip(found, params, strict=True)]
        missed += torch.stack([count for _, count in found]).sum()
        torch._foreach_mul_(list(params), shaped)
        return
    wide = None if params[0].dtype in (torch.float32, torch.float64) else torch.float32
    norms = torch.stack(torch._foreach_norm(list(params), 2, dtype=wide))
    factors, count = factor(torch.stack([r.to(norms.device, norms.dtype) for r in rho]), norms, near)
    missed += count
    torch._foreach_mul_(list(params), list(factors.unbind()))


def adam_to_sphere_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rho: Sequence[Tensor],
    missed: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    rows: bool,
) -> None:
    """As :func:`headway.kernels.sphere.adam_to_sphere_`: a step of Adam without weight decay, and back to the spheres."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        k = float(step)
        g = -g if maximize else g
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_((1 - beta2**k) ** 0.5).add_(eps), value=-lr / (1 - beta1**k))
    to_sphere_(params, rho, missed, 0.0, rows)
