"""Normalisation of images inside and outside a hole (arXiv 1911.10375), and mean and maximum over the channels.

    y = gain (x - mean) / sqrt(var + e) + offset        mean, var: of the pixel's own region, in its plane or its channel

Gain and offset are one a region and channel, or one a pixel. For the backward pass the input and the mask are kept, beside three
numbers a region. A second derivative is taken through the equations in :mod:`.reference`, which are also the truth the C++ is tested
against, and compute what has a soft mask (weights instead of True and False).
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.kernels.library import Function, below_autograd, define, needs_grad
from headway.kernels.region import reference

Pair = tuple[Tensor | None, Tensor | None]
_NONE: Pair = (None, None)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _wide(x: Tensor, of: Tensor | None) -> Tensor:
    return x.new_empty((0 if of is None else of.numel(),), dtype=reference.wide(x.dtype))


def _groups(x: Tensor, batch: bool) -> Any:
    return x.shape[1] if batch else x.shape[0] * x.shape[1]


_norm = define(
    "region_norm(Tensor x, Tensor mask, Tensor? hole_weight, Tensor? hole_bias, Tensor? valid_weight, Tensor? valid_bias, "
    "Tensor? pixel_weight, Tensor? pixel_bias, Tensor? given, bool batch, float unit, bool shared, float eps, bool released) "
    "-> (Tensor, Tensor)",
    reference.norm,
    lambda x, mask, hw, hb, vw, vb, pw, pb, given, batch, *_: (
        _like(x),
        x.new_empty((3, 2, _groups(x, batch)), dtype=torch.float64),
    ),
    native="region",
)
_norm_backward = define(
    "region_norm_backward(Tensor gy, Tensor x, Tensor mask, Tensor kept, Tensor? hole_weight, Tensor? hole_bias, "
    "Tensor? valid_weight, Tensor? valid_bias, Tensor? pixel_weight, Tensor? pixel_bias, Tensor? whole, bool batch, float unit, "
    "bool shared) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.norm_backward,
    lambda gy, x, mask, kept, hw, hb, vw, vb, pw, pb, *_: (_like(x), *(_wide(x, p) for p in (hw, hb, vw, vb, pw, pb))),
)
_pool = define(
    "channel_pool(Tensor x) -> (Tensor, Tensor)",
    reference.pool,
    lambda x: (
        x.new_empty((x.shape[0], 2, x.shape[2:].numel())),
        x.new_empty((x.shape[0], x.shape[2:].numel()), dtype=torch.int32),
    ),
)
_pool_backward = define(
    "channel_pool_backward(Tensor gradient, Tensor index, int channels) -> Tensor",
    reference.pool_backward,
    lambda gradient, index, channels: gradient.new_empty((gradient.shape[0], channels, index.shape[1])),
)
_pool_backward_ = define(
    "channel_pool_backward_(Tensor(a!) gx, Tensor gradient, Tensor index) -> ()",
    reference.pool_backward_,
    lambda *_: None,
)


def _quiet() -> Any:
    """Inside a ``Function`` autograd has nothing to do; a compiler must see the operators as they are."""
    return nullcontext() if torch.compiler.is_compiling() else below_autograd()


def _twice() -> bool:
    """Whether this backward pass is itself to be differentiated."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


def _again(plain: Any, given: tuple[Tensor | None, ...], gy: Tensor) -> list[Tensor | None]:
    """Gradients that can be differentiated: through the plain equations. None where a tensor is absent or takes no part."""
    asked = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(plain(*given), asked, gy, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in given]


def _everywhere(x: Tensor, mask: Tensor, eps: float, released: bool) -> Tensor:
    """Statistics of both regions over the batches of all processes; one without a pixel of a region joins all the same."""
    a = reference.planes(x)
    mean, var, pixels = reference.moments(a, reference.regions(mask, a), True)
    own = torch.stack([mean.flatten(1), var.flatten(1), pixels.flatten(1).expand(2, a.shape[1])]).double()
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own.contiguous())
    means, variances, counts = torch.stack(parts).unbind(1)
    count = counts.sum(0)
    share = counts / count.where(count > 0, 1)
    # what a region without a pixel says of itself does not count, not even as NaN
    means, variances = (torch.where(counts > 0, v, 0) for v in (means, variances))
    mean = (share * means).sum(0)
    # Chan's merge: what the means are apart belongs to the variance
    var = (share * (variances + (means - mean).square())).sum(0)
    return reference.statistics_of(mean, var, count, count.sum(0).clamp(min=1), eps, released)


class _RegionNorm(Function):
    @staticmethod
    def forward(ctx, x, hw, hb, vw, vb, pw, pb, mask, batch, unit, shared, eps, released, sync):
        with _quiet():
            given = _everywhere(x, mask, eps, released) if sync else None
            y, kept = _norm(x, mask, hw, hb, vw, vb, pw, pb, given, batch, unit, shared, eps, released)
        ctx.save_for_backward(x, hw, hb, vw, vb, pw, pb, mask, kept)
        ctx.settings, ctx.sync = (batch, unit, shared, eps, released), sync
        return y

    @staticmethod
    def backward(ctx, gy):  # type: ignore[override]
        *given, mask, kept = ctx.saved_tensors
        batch, unit, shared, eps, released = ctx.settings
        if _twice():
            if ctx.sync:
                raise NotImplementedError("region norm with sync=True has no second derivative; use sync=False for it")
            plain = partial(_plain, mask=mask, batch=batch, unit=unit, shared=shared, eps=eps, released=released)
            return *_again(plain, tuple(given), gy), *(None,) * 7
        x, hw, hb, vw, vb, pw, pb = given
        with _quiet():
            gy, whole = gy.to(x.dtype), None
            if ctx.sync:
                sums, _, _, gain, _ = reference.products(gy, x, mask, kept, hw, vw, pw, batch, unit)
                whole = (sums.sum(2) * gain[:, 0, :, 0]).double()
                torch.distributed.all_reduce(whole)
            gx, *grads = _norm_backward(gy, x, mask, kept, hw, hb, vw, vb, pw, pb, whole, batch, unit, shared)
        cast = (None if p is None else g.reshape(p.shape).to(p.dtype) for g, p in zip(grads, given[1:], strict=True))
        return gx, *cast, *(None,) * 7


def _plain(x, hw, hb, vw, vb, pw, pb, *, mask, batch, unit, shared, eps, released) -> Tensor:
    return reference.norm(x, mask, hw, hb, vw, vb, pw, pb, None, batch, unit, shared, eps, released)[0]


class _ChannelPool(Function):
    """x and what is pooled of it. The gradient that x has from elsewhere arrives here, and the pool's is added onto it: nobody else
    holds it, and a step reads and writes the whole input's size twice less."""

    @staticmethod
    def forward(ctx, x):
        with _quiet():
            pooled, index = _pool(x)
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return x.view_as(x), pooled, index

    @staticmethod
    def backward(ctx, gx, gradient, _):  # type: ignore[override]
        (index,) = ctx.saved_tensors
        if gradient is None:
            return gx
        if _twice():
            found = _Unpool.apply(gradient, index, ctx.shape)
            return found if gx is None else gx + found
        with _quiet():
            if gx is None or torch.compiler.is_compiling() or not gx.is_contiguous() or gx.dtype != gradient.dtype:
                found = _pool_backward(gradient, index, ctx.shape[1]).reshape(ctx.shape)
                return found if gx is None else gx + found
            _pool_backward_(gx, gradient, index)
            return gx


class _Unpool(Function):
    """Linear in the gradient: its own derivative picks what was spread."""

    @staticmethod
    def forward(ctx, gradient, index, shape):
        with _quiet():
            gx = _pool_backward(gradient, index, shape[1])
        ctx.save_for_backward(index)
        return gx.reshape(shape)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        (index,) = ctx.saved_tensors
        flat = gradient.flatten(2)
        picked = flat.gather(1, index[:, None].long())[:, 0]
        return torch.stack([flat.mean(1), picked], 1), None, None


def region_norm(
    x: Tensor,
    mask: Tensor,
    hole: Pair = _NONE,
    valid: Pair = _NONE,
    pixel: Pair = _NONE,
    *,
    unit: float = 0.0,
    shared: bool = False,
    batch: bool = False,
    eps: float = 1e-5,
    released: bool = False,
    sync: bool = False,
) -> Tensor:
    """Normalises (samples, channels, *space) by the mean and variance of each pixel's own region.

    Args:
        mask: (samples, *space): bool, True in the hole; or floating, the hole's weight, which plain torch computes.
        hole, valid: gain and offset of a region, (channels,) each.
        pixel: gain and offset of a pixel, samples * space numbers each, in the place of the former.
        unit: what gains count from: 1 for a gain of 1 + weight.
        shared: both offsets everywhere, whatever the region.
        batch: statistics of a channel over the batch; otherwise of every plane.
        released: eps times all pixels over the region's, as the released code has it.
        sync: with ``batch``, statistics over all processes.
    """
    settings = (batch, unit, shared, eps, released)
    if mask.dtype != torch.bool:
        return reference.norm(x, mask, *hole, *valid, *pixel, None, *settings)[0]
    x = x.contiguous()
    if torch.compiler.is_compiling() or sync or needs_grad(x, *hole, *valid, *pixel):
        return _RegionNorm.apply(x, *hole, *valid, *pixel, mask, *settings, sync)  # type: ignore[return-value]
    with below_autograd():
        return _norm(x, mask, *hole, *valid, *pixel, None, *settings)[0]


def channel_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, and (samples, 2, *space): mean and maximum over the channels of (samples, channels, *space). Of several equal maxima the first
    has the gradient.

    What else is made of x is made of the x that is given back, by one operation alone, whose gradient is new: it is added to in place.
    """
    x = x.contiguous()
    if torch.compiler.is_compiling() or needs_grad(x):
        x, pooled, _ = _ChannelPool.apply(x)  # type: ignore[misc]
    else:
        with below_autograd():
            pooled = _pool(x)[0]
    return x, pooled.reshape(x.shape[0], 2, *x.shape[2:])
