"""Weights as ``a * f(v / b)``: one pass forward and one backward, where plain autograd takes two and six and keeps a tensor more.

Only ``v`` is kept for the backward; the sums for ``a`` and ``b`` are taken in float64 in the same pass. Under ``torch.compile``
the plain equation runs, which the compiler fuses. "Weight Compander" (Cakaj et al.), 2023, arXiv 2306.16993.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.compander import reference
from headway.kernels.compander.reference import MAPS
from headway.kernels.library import Function, below_autograd, define, load

_NATIVE = load("compander")
_FAST = (torch.float32, torch.bfloat16, torch.float16)


def _rows(v: Tensor, a: Tensor) -> Tensor:
    """a, one number a row of v, in the shape that broadcasts."""
    return a.view(-1, *[1] * (v.dim() - 1)) if a.numel() != 1 else a.view(())


def _plain(v, a, b):
    return reference.compand(v, _rows(v, a), _rows(v, b)).contiguous()


def _backward_plain(g, v, a, b, want):
    gv, ga, gb = reference.compand_backward(g, v, _rows(v, a), _rows(v, b))
    return gv.contiguous(), torch.stack([ga.flatten(), gb.flatten()])


def _packed(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_op = define("compand(Tensor v, Tensor a, Tensor b) -> Tensor", _plain, lambda v, a, b: _packed(v))
_backward_op = define(
    "compand_backward(Tensor g, Tensor v, Tensor a, Tensor b, bool want) -> (Tensor, Tensor)",
    _backward_plain,
    lambda g, v, a, b, want: (_packed(v), v.new_empty((2, a.numel()), dtype=torch.float64)),
)


def _fused(v: Tensor, a: Tensor) -> bool:
    """Whether the C++ body takes it: on a CPU, up to float32, a and b one number or one a row."""
    rows = a.numel() == 1 or (a.dim() == v.dim() and a.numel() == v.shape[0] == a.shape[0])
    known = _NATIVE and v.device.type == "cpu" and v.dtype in _FAST and rows
    return known and not torch._C._functorch.is_functorch_wrapped_tensor(v)  # type: ignore[attr-defined]


def _flat(a: Tensor) -> Tensor:
    return a.detach().double().reshape(-1)


def _forward(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if not _fused(v, a):
        return reference.compand(v, a, b)
    with below_autograd():
        return _op(v, _flat(a), _flat(b))


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    v, a, b = ctx.saved_tensors
    if torch.is_grad_enabled() or not _fused(v, a) or g.dtype != v.dtype:
        # with gradients of gradients the plain equations are differentiated once more
        return reference.compand_backward(g, v, a, b)
    want = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    with below_autograd():
        gv, ab = _backward_op(g, v, _flat(a), _flat(b), want)
    return (gv, ab[0].view(a.shape).to(a.dtype), ab[1].view(b.shape).to(b.dtype)) if want else (gv, None, None)


class _Compand(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(v, a, b)
        return _forward(v, a, b)

    backward = staticmethod(_backward)  # type: ignore[assignment]


class _TransformedCompand(torch.autograd.Function):
    """The same for functorch's transforms, whose way into a function costs as much as a small weight's map."""

    generate_vmap_rule = True
    forward = staticmethod(_forward)  # type: ignore[assignment]
    backward = staticmethod(_backward)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


def compand(v: Tensor, a: Tensor, b: Tensor, map: str) -> Tensor:
    """See :func:`headway.weights.compander.compand`; the arguments are not checked here."""
    if map == "arctan":
        if torch.compiler.is_compiling():
            return reference.compand(v, a, b)
        transformed = torch._C._are_functorch_transforms_active()
        return (_TransformedCompand if transformed else _Compand).apply(v, a, b)  # type: ignore[return-value]
    if map == "identity":
        return v
    x = v.to(reference.wide(v.dtype))
    return (a.to(x.dtype) * MAPS[map].f(x / b.to(x.dtype))).to(v.dtype)


def inverse(w: Tensor, a: Tensor, b: Tensor, map: str) -> Tensor:
    """The v with ``compand(v, a, b, map)`` = w, computed in float64; |w| must lie within the bound."""
    if map == "identity":
        return w
    return (b.double() * MAPS[map].inverse(w.double() / a.double())).to(w.dtype)
