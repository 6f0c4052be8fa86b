"""Batch norm of a training pass as one operator each way, together with the ReLU behind it where there is one.

    z = weight * (x - mean) / sqrt(var + eps) + bias        mean, var: of all samples and positions of a channel
    y = max(z, 0)                                           where ``rectified``

One channel is worked off at a time: its statistics bring it into the caches, where the output and, on the way back, the gradient read
it again. x alone is kept: what the ReLU let through follows from it. ``torch.nn.functional.batch_norm`` on a CPU reads x three times
and adds a channel up serially; a ReLU of its own reads and writes the tensor once more each way and keeps its output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.batch_norm import reference
from headway.kernels.library import Function, below_autograd, define


def _numbers(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


_op = define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, float rate, float eps, "
    "bool rectified) -> (Tensor, Tensor)",
    reference.batch_norm,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty((2, x.shape[1]), dtype=torch.float64)),
    native="batch_norm",
)
_backward_op = define(
    "batch_norm_backward(Tensor gy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, float eps, bool rectified) "
    "-> (Tensor, Tensor, Tensor)",
    reference.batch_norm_backward,
    lambda gy, x, *_: (x.new_empty(x.shape), _numbers(x), _numbers(x)),
)


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, running: Any, rate: float, eps: float, rectified: bool
    ) -> Tensor:
        with below_autograd():
            y, statistics = _op(x, weight, bias, *running, rate, eps, rectified)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.settings = eps, rectified
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, statistics = ctx.saved_tensors
        eps, rectified = ctx.settings
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
            y = y.relu() if rectified else y
            wanted = [t for t, need in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(y, wanted, gy, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), *(None,) * 4
        with below_autograd():
            gx, gw, gb = _backward_op(
                gy if gy.dtype == x.dtype else gy.to(x.dtype), x, statistics, weight, bias, eps, rectified
            )
        cast = (
            None if p is None else g if g.dtype == p.dtype else g.to(p.dtype) for g, p in ((gw, weight), (gb, bias))
        )
        return gx, *cast, *(None,) * 4


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    rate: float = 0.1,
    eps: float = 1e-5,
    rectified: bool = False,
) -> Tensor:
    """The normalised x, with a ReLU where ``rectified``. Differentiable any number of times.

    Args:
        x: (samples, channels, space...), not empty.
        running: mean and variance, (channels,) float32 or float64, moved in place towards the batch's mean and unbiased variance.
        rate: by which share of the way.

    Raises:
        RuntimeError: an empty x.
    """
    y: Any = _BatchNorm.apply(x.contiguous().flatten(2), weight, bias, running, rate, eps, rectified)
    return y.view(x.shape)
