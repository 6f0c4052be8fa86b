"""Products of many small square blocks with wide matrices: W z, a b^T, and z z^T with half the work in its backward pass.

    block_product   (K, n, n), (K, n, P) -> (K, n, P)
    block_outer     (K, n, P), (K, n, P) -> (K, n, n)
    block_gram      (K, n, P) -> (K, n, n), symmetric: the gradient of z is (G + G^T) z, one product instead of two

and ``color_blocks``, the forward pass of a block of :class:`headway.norms.GDWCT`: y = x + A z + shift and z z^T of z = x - mean, read
once and written once by the C++ body, which keeps the tile of z that both products need in the caches.

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

_LARGE, _WIDE, _FUSED = 64, 2048, 128


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


def _color(x: Tensor, mean: Tensor, change: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[1] <= _FUSED:
        return _color_float_op(x, mean, change, shift)
    z = x.to(mean.dtype) - mean[..., None]
    y = _product(change.to(x.dtype), z.to(x.dtype)).add_(x).add_(shift.to(x.dtype)[..., None])
    return y, _outer(z, z)


def _color_backward(ctx: Any, gy: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, change = ctx.saved_tensors
    z, S = x.to(mean.dtype) - mean[..., None], g + g.mT
    back = block_product(change.to(gy.dtype).mT, gy)
    whole = block_product(S, z)
    g_mean = -back.sum(2).to(mean.dtype)
    if torch.is_grad_enabled():  # the sum over z is 0, its derivative is not
        g_mean = g_mean - whole.sum(2)
    g_change = block_outer(gy, z.to(gy.dtype)).to(change.dtype)
    return whole.to(x.dtype) + back + gy, g_mean, g_change, gy.sum(2, dtype=mean.dtype)


def _keep_three(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])


def _fake_color(x: Tensor, mean: Tensor, change: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), mean.new_empty(change.shape)


_color_float_op = define(
    "color_blocks_float(Tensor x, Tensor mean, Tensor change, Tensor shift) -> (Tensor, Tensor)",
    reference.color_blocks,
    _fake_color,
    native="blocks",
)
_color_op = define(
    "color_blocks(Tensor x, Tensor mean, Tensor change, Tensor shift) -> (Tensor, Tensor)",
    _color,
    _fake_color,
    _keep_three,
    _color_backward,
)
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


def color_blocks(x: Tensor, mean: Tensor, change: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """x + A z + shift (K, n, P) and z z^T (K, n, n) of z = x - mean.

    Args:
        x: (K, n, P).
        mean: (K, n), float32 or wider, of which z's own mean is to be 0 together with the other blocks': no gradient of z z^T goes
            through it.
        change: A, (K, n, n). shift: (K, n).
    """
    return _color_op(x, mean, change, shift)
