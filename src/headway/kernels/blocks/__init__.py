"""Products of many small square blocks with wide matrices: W z, a b^T, and z z^T with half the work in its backward pass.

    block_product   (K, n, n), (K, n, P) -> (K, n, P)
    block_outer     (K, n, P), (K, n, P) -> (K, n, n)
    block_gram      (K, n, P) -> (K, n, n), symmetric: the gradient of z is (G + G^T) z, one product instead of two

In float32 on a CPU large blocks go through oneDNN one by one, which takes half the time of the batched product that PyTorch has; small
ones do not pay for the calls. Each derivative is made of the same operations, so that there are derivatives of every order.
:mod:`.reference` is the truth they are tested against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.blocks import reference
from headway.kernels.library import define
from headway.kernels.products import has_onednn, linear

_LARGE, _WIDE = 64, 2048


def _one_by_one(x: Tensor, small: int) -> bool:
    n, p = x.shape[1:]
    return has_onednn(x) and x.numel() > 0 and n >= small and (n >= _LARGE or p >= _WIDE)


def _product(W: Tensor, z: Tensor) -> Tensor:
    if not _one_by_one(z, _LARGE):
        return reference.block_product(W, z)
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    for w, part, y in zip(W.unbind(), z.unbind(), out.unbind(), strict=True):
        y.copy_(linear(w, part.T))
    return out


def _outer(a: Tensor, b: Tensor) -> Tensor:
    if not _one_by_one(a, _LARGE // 2):
        return reference.block_outer(a, b)
    return torch.stack([linear(x, y) for x, y in zip(a.unbind(), b.unbind(), strict=True)])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    W, z = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return block_outer(g, z) if wanted[0] else None, block_product(W.mT, g) if wanted[1] else None


def _outer_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return block_product(g, b) if wanted[0] else None, block_product(g.mT, a) if wanted[1] else None


def _gram_backward(ctx: Any, g: Tensor) -> Tensor:
    return block_product(g + g.mT, *ctx.saved_tensors)


_product_op = define(
    "block_product(Tensor W, Tensor z) -> Tensor",
    _product,
    lambda W, z: z.new_empty(z.shape),
    _keep,
    _product_backward,
)
_outer_op = define(
    "block_outer(Tensor a, Tensor b) -> Tensor",
    _outer,
    lambda a, b: a.new_empty((a.shape[0], a.shape[1], b.shape[1])),
    _keep,
    _outer_backward,
)
_gram_op = define(
    "block_gram(Tensor z) -> Tensor",
    lambda z: _outer(z, z),
    lambda z: z.new_empty((z.shape[0], z.shape[1], z.shape[1])),
    _keep,
    _gram_backward,
)


def block_product(W: Tensor, z: Tensor) -> Tensor:
    """W z: (K, n, n) and (K, n, P) -> (K, n, P)."""
    return _product_op(W, z)


def block_outer(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: (K, n, P) twice -> (K, n, n)."""
    return _outer_op(a, b)


def block_gram(z: Tensor) -> Tensor:
    """z z^T: (K, n, P) -> (K, n, n)."""
    return _gram_op(z)
