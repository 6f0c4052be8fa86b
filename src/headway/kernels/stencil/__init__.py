"""A convolution with one output channel, as attention maps over an image are made with, without the detour of a general one.

A 7x7 window over one or two planes is a few dozen multiply-adds a pixel, which general convolutions, made for many channels, take
ten times as long for, above all backward.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.library import Function, below_autograd, define, needs_grad
from headway.kernels.stencil import reference

_forward = define(
    "stencil(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference.stencil,
    lambda x, weight, bias: x.new_empty((x.shape[0], 1, *x.shape[2:])),
    native="stencil",
)
_backward = define(
    "stencil_backward(Tensor gy, Tensor x, Tensor weight, bool has_bias) -> (Tensor, Tensor, Tensor)",
    reference.stencil_backward,
    lambda gy, x, weight, has_bias: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        *(x.new_empty((n,), dtype=reference.wide(x.dtype)) for n in (weight.numel(), int(has_bias))),
    ),
)


def _quiet() -> Any:
    """Inside a ``Function`` autograd has nothing to do; a compiler must see the operators as they are."""
    return nullcontext() if torch.compiler.is_compiling() else below_autograd()


class _Stencil(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        with _quiet():
            return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx, gy):  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # to be differentiated itself
            asked = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(reference.stencil(x, weight, bias), asked, gy, create_graph=True))
            gx, gw, gb = (next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias))
            return gx, gw, gb
        with _quiet():
            gx, gw, gb = _backward(gy.to(x.dtype), x, weight, bias is not None)
        return gx, gw.reshape(weight.shape).to(weight.dtype), None if bias is None else gb.to(bias.dtype)


def stencil(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(samples, 1, H, W): the convolution of x (samples, channels, H, W) with weight (1, channels, k, k), k 3 or 7, zeros around it."""
    x = x.contiguous()
    if torch.compiler.is_compiling() or needs_grad(x, weight, bias):
        return _Stencil.apply(x, weight, bias)  # type: ignore[return-value]
    with below_autograd():
        return _forward(x, weight, bias)


class StencilConv2d(nn.Conv2d):
    """``nn.Conv2d`` with one output channel, a window of 3x3 or 7x7 and the size kept; computed in float32 at least, in the input's type
    whatever the weights' is."""

    def __init__(self, in_channels: int, kernel_size: int, bias: bool = True, **made: Any) -> None:
        super().__init__(in_channels, 1, kernel_size, padding=kernel_size // 2, bias=bias, **made)

    def forward(self, input: Tensor) -> Tensor:
        return stencil(input, self.weight, self.bias)
