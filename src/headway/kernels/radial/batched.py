"""The end of a step over many tensors at once, in plain torch: a handful of small kernels a tensor, no question to the device.

The four sums of every row are taken tensor by tensor; everything that follows from them is done on one vector of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headway.kernels.radial.reference import CHANNEL, LAYER, kept, likeness, row_sums


def radial_step_(
    params: list[Tensor],
    grads: list[Tensor],
    updates: list[Tensor],
    steps: Sequence[Any],
    decay: Any,
    delta: float,
    wd_ratio: float,
    eps: float,
    keep: bool,
) -> Tensor:
    """As :func:`headway.kernels.radial.reference.radial_step_`, for real tensors of one device and dtype. ``steps`` are numbers
    or 0-dim tensors; ``decay`` a number or a tensor."""
    kinds = torch.zeros(len(params), dtype=torch.int8, device=params[0].device)
    updates = list(updates)
    chosen = [i for i, p in enumerate(params) if p.dim() > 1 and p.numel()] if delta > 0 else []
    if chosen:
        p, g, u = ([ts[i] for i in chosen] for ts in (params, grads, updates))
        coefficients, found = _decide(p, g, u, delta, eps)
        each = dict(zip(chosen, found.unbind(), strict=True))
        kinds = torch.stack([each.get(i, kinds[i]) for i in range(len(params))])
        radial = torch._foreach_mul(p, coefficients)
        projected = torch._foreach_sub(u, radial)
        for place, i in enumerate(chosen):
            updates[i] = updates[i].copy_(projected[place]) if keep else projected[place]
    if isinstance(decay, Tensor) or decay > 0:
        torch._foreach_mul_(params, list(kept(kinds > 0, decay, wd_ratio, params[0]).unbind()))
    if isinstance(steps[0], Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(updates, list(steps)))
    elif all(step == steps[0] for step in steps):
        torch._foreach_add_(params, updates, alpha=-steps[0])
    else:
        torch._foreach_sub_(params, torch._foreach_mul(updates, list(steps)))
    return kinds


def _decide(p: list[Tensor], g: list[Tensor], u: list[Tensor], delta: float, eps: float) -> tuple[list[Tensor], Tensor]:
    """The coefficient of every row of every tensor, shaped to multiply it, and the kind of every tensor."""
    counts = [len(t) for t in p]
    sums = [row_sums(*each) for each in zip(p, g, u, strict=True)]
    rows = torch.cat(sums, 1)
    whole = torch.stack([s.sum(1) for s in sums], 1)
    most = [part.amax() for part in likeness(rows, eps).split(counts)]
    widths = [math.sqrt(t.numel() / n) for t, n in zip(p, counts, strict=True)]
    channel = torch.stack(torch._foreach_mul(most, widths)) < delta
    sizes = [math.sqrt(t.numel()) for t in p]
    layer = ~channel & (torch.stack(torch._foreach_mul(list(likeness(whole, eps).unbind()), sizes)) < delta)
    by_row = rows[3] / (rows[2].sqrt() + eps).square()
    by_layer = torch.where(layer, whole[3] / (whole[2].sqrt() + eps).square(), 0.0)
    spread = torch.cat([by_layer[i].expand(n) for i, n in enumerate(counts)])
    by_channel = torch.cat([channel[i].expand(n) for i, n in enumerate(counts)])
    parts = torch.where(by_channel, by_row, spread).split(counts)
    shaped = [c.view(-1, *[1] * (t.dim() - 1)) for c, t in zip(parts, p, strict=True)]
    return shaped, (CHANNEL * channel + LAYER * layer).to(torch.int8)
