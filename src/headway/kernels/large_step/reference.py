"""One iteration of (Normalized) LR+GD in plain torch, block of rows by block of rows: the truth, and what runs on a GPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 1 << 21
"""Rows of Z that are read once from memory for both products of an iteration."""


def margins_and_step(Z: Tensor, u: Tensor, gamma: float, normalized: bool) -> tuple[Tensor, Tensor]:
    """As :func:`headway.kernels.large_step.margins_and_step`.

    The weights of Normalized LR+GD are a softmax, whose running maximum is kept while blocks are added up; so it never overflows
    and is never 0/0, whatever gamma.
    """
    rows = max(1, BLOCK_BYTES // max(1, Z.shape[1] * Z.element_size()))
    margins, step, total, top = [], torch.zeros_like(u), 0.0, -math.inf
    for block in Z.split(rows):
        m = block @ u
        margins.append(m)
        if math.isinf(gamma):
            share = (m <= 0).to(m.dtype)
            total += float(share.sum())
        elif normalized:
            log_wrong = F.logsigmoid(-gamma * m)
            high = float(log_wrong.max())
            if high > top:
                step, total, top = step * math.exp(top - high), total * math.exp(top - high), high
            share = (log_wrong - top).exp()
            total += float(share.sum())
        else:
            share = torch.sigmoid(-gamma * m)
        step.addmv_(block.t(), share)
    return torch.cat(margins), step / (total if normalized and total else len(Z))
