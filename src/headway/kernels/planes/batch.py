"""Batch norm of a training pass through the plane operators: x is read twice and kept, nothing else of its size is.

    y = weight * (x - mean) / sqrt(var + eps) + bias        mean, var: of all samples and positions of a channel

The same equation as ``torch.nn.functional.batch_norm``, whose CPU body sums a channel serially.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.library import below_autograd
from headway.kernels.planes import _backward_op, _moments_op, _norm_op, _statistics_op, even_shares


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        with below_autograd():
            moments = _moments_op(x)
            statistics = _statistics_op(moments, None, None)
            y = _norm_op(x, moments, statistics, weight, bias, None, None, 0, eps, 0.0)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.eps = eps
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, gy: Tensor, _: Any) -> Any:  # type: ignore[override]
        x, weight, bias, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            with torch.enable_grad():
                y = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
                wanted = [t for t, need in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if need]
                found = iter(torch.autograd.grad(y, wanted, gy, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None
        with below_autograd():
            # any point may stand for the planes' means; that of the channel need not be kept twice
            centres = statistics[:, None, :].expand(2, x.shape[0], x.shape[1]).contiguous()
            gx, gw, gb, *_ = _backward_op(
                gy.to(x.dtype), x, centres, statistics, even_shares(x, x.shape[0]), weight, bias, None, None, None, None,
                0, ctx.eps, 0.0,
            )  # fmt: skip
        cast = (None if p is None else g.to(p.dtype) for g, p in ((gw, weight), (gb, bias)))
        return gx, *cast, None


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised x (samples, channels, space) and the batch's mean and biased variance, (2, channels) float64, which carry no
    gradient. Differentiable any number of times."""
    return _BatchNorm.apply(x.contiguous(), weight, bias, eps)  # type: ignore[return-value]
