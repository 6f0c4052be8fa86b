"""ReLU whose backward needs one bit an entry instead of its output.

Where the layer behind it keeps its input anyhow, the output of a ReLU costs nothing; where that layer is frozen and keeps nothing
(:mod:`headway.learning.batchnorm_only`), the bits are all that stays: a thirty-second of a float32 tensor. Under ``torch.compile``
torch's own ReLU runs, which the compiler fuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.library import Function, below_autograd, define, needs_grad
from headway.kernels.relu import reference


def _bits(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


_relu_op = define(
    "relu_bits(Tensor x) -> (Tensor, Tensor)",
    reference.relu_bits,
    lambda x: (x.new_empty(x.shape), _bits(x)),
    native="relu",
)
_relu_op_ = define("relu_bits_(Tensor(a!) x) -> Tensor", reference.relu_bits_, _bits)
_keep_op = define(
    "keep_bits(Tensor gy, Tensor bits) -> Tensor", reference.keep_bits, lambda gy, _: gy.new_empty(gy.shape)
)


def _in_order(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` with its axes in the order of its memory, or of the memory of the tensor it belongs to."""
    return x.permute(0, 2, 3, 1) if channels_last else x


def _back(x: Tensor, channels_last: bool) -> Tensor:
    return x.permute(0, 3, 1, 2) if channels_last else x


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.channels_last = channels_last
        with below_autograd():
            return _back(_keep_op(_in_order(gy, channels_last), bits), channels_last)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> Any:  # type: ignore[override]
        return _Keep.apply(gg, ctx.saved_tensors[0], ctx.channels_last), None, None


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        ctx.channels_last = (
            x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        )
        with below_autograd():
            dense = _in_order(x, ctx.channels_last)
            if inplace and dense.is_contiguous():
                ctx.mark_dirty(x)
                bits, y = _relu_op_(dense), x
            else:
                y, bits = _relu_op(dense)
                y = _back(y, ctx.channels_last)
                if inplace:
                    ctx.mark_dirty(x)
                    y = x.copy_(y)
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        (bits,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            return _Keep.apply(gy, bits, ctx.channels_last), None
        return _back(_keep_op(_in_order(gy, ctx.channels_last), bits), ctx.channels_last), None


def relu_bits(x: Tensor, inplace: bool = False) -> Tensor:
    """``torch.relu(x)`` (over ``x`` itself with ``inplace``), differentiable any number of times."""
    plain = torch.compiler.is_compiling() or not needs_grad(x) or not x.is_floating_point()
    if plain or torch._C._functorch.is_functorch_wrapped_tensor(x):  # type: ignore[attr-defined]
        return torch.relu_(x) if inplace else torch.relu(x)
    return _ReLU.apply(x, inplace)  # type: ignore[return-value]
