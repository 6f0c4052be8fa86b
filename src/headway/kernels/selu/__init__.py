"""SELU with a backward that needs only the output, and alpha dropout in one pass with one saved bit an entry.

What a linear layer in front computes is not kept by :func:`selu`, and the output is what the next layer keeps anyhow: a deep net
holds half of what it holds with ``torch.nn.functional.selu``. The C++ body of alpha dropout draws its bits as it goes, where plain
torch fills and reads a tensor of floats. Under ``torch.compile`` the plain equations run, which the compiler fuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.library import define, load
from headway.kernels.selu import reference

_NATIVE = load("selu")


class _SELU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: float, scale: float) -> Tensor:
        return torch.ops.aten.elu(x, alpha, scale, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.settings = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        alpha, scale = ctx.settings
        return torch.ops.aten.elu_backward(gy, alpha, scale, 1.0, True, y), None, None


def selu(x: Tensor, alpha: float, scale: float, inplace: bool) -> Tensor:
    """See :func:`headway.weights.self_normalizing.selu`; the arguments are not checked here."""
    if inplace:
        return torch.ops.aten.elu_(x, alpha, scale, 1.0)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.aten.elu(x, alpha, scale, 1.0)
    return _SELU.apply(x, alpha, scale)  # type: ignore[return-value]


def _dropout_plain(x, seed, p, gain, shift, low):
    kept = reference.kept_bits(x.numel(), seed, p).view(x.shape)
    return reference.alpha_dropout(x, kept, gain, shift, low).contiguous(), reference.pack(kept)


def _backward_plain(gy, bits, gain):
    return torch.where(reference.unpack(bits, gy.numel()).view(gy.shape), gy * gain, 0).to(gy.dtype).contiguous()


def _packed(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.gain = inputs[3]


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.gain = inputs[2]


_backward_op = define(
    "alpha_dropout_backward(Tensor gy, Tensor bits, float gain) -> Tensor",
    _backward_plain,
    lambda gy, bits, gain: _packed(gy),
    _setup_backward,
    lambda ctx, gg: (_backward_op(gg, ctx.saved_tensors[0], ctx.gain), None, None),
)
_dropout_op = define(
    "alpha_dropout(Tensor x, int seed, float p, float gain, float shift, float low) -> (Tensor, Tensor)",
    _dropout_plain,
    lambda x, *_: (_packed(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)),
    _setup,
    lambda ctx, gy, _: (_backward_op(gy, ctx.saved_tensors[0], ctx.gain), None, None, None, None, None),
)


def alpha_dropout(x: Tensor, p: float, gain: float, shift: float, low: float, kept: Tensor | None = None) -> Tensor:
    """Keeps each entry with probability 1 - p (or where ``kept``) as ``gain * x + shift``; the others become
    ``gain * low + shift``. The randomness is that of torch's generator."""
    fused = _NATIVE and kept is None and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if fused and not torch._C._functorch.is_functorch_wrapped_tensor(x):  # type: ignore[attr-defined]
        seed = int(torch.empty((), dtype=torch.int64).random_())
        return _dropout_op(x, seed, p, gain, shift, low)[0]
    if kept is None:
        kept = torch.rand(x.shape, device=x.device) >= p
    return reference.alpha_dropout(x, kept, gain, shift, low).to(x.dtype)
