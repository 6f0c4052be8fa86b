"""EvoNorm's layers (arXiv 2004.02967), norm and activation in one pass and one saved tensor.

For the backward pass the input alone is kept, beside two numbers a plane or group. A second derivative is taken through the
equations in :mod:`.reference`, which are also the truth the C++ is tested against.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.kernels.evo import reference
from headway.kernels.library import below_autograd, define, needs_grad


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _wide(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=reference.wide(x.dtype))


moments = define(
    "evo_moments(Tensor x) -> Tensor",
    reference.evo_moments,
    lambda x: x.new_empty((2, x.shape[1]), dtype=torch.float64),
    native="evo",
)
_batch = define(
    "evo_batch(Tensor x, Tensor? weight, Tensor? bias, Tensor? v, Tensor? variance, int kind, bool act, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference.evo_batch,
    lambda x, *_: (_like(x), _wide(x, x.shape[0] * x.shape[1], 2), _wide(x, 2, x.shape[1])),
)
_batch_backward = define(
    "evo_batch_backward(Tensor gy, Tensor x, Tensor planes, Tensor moments, Tensor? weight, Tensor? v, int kind, bool act, "
    "float eps, bool through) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.evo_batch_backward,
    lambda gy, x, *_: (_like(x), *(_wide(x, x.shape[1]) for _ in range(4))),
)
_group = define(
    "evo_group(Tensor x, Tensor? weight, Tensor? bias, Tensor? v, int groups, bool centred, bool act, float eps) "
    "-> (Tensor, Tensor)",
    reference.evo_group,
    lambda x, weight, bias, v, groups, *_: (_like(x), _wide(x, x.shape[0] * groups, 2)),
)
_group_backward = define(
    "evo_group_backward(Tensor gy, Tensor x, Tensor stats, Tensor? weight, Tensor? v, int groups, bool act) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.evo_group_backward,
    lambda gy, x, *_: (_like(x), *(_wide(x, x.shape[1]) for _ in range(3))),
)


def _quiet() -> Any:
    """Inside a ``Function`` autograd has nothing to do; a compiler must see the operators as they are."""
    return nullcontext() if torch.compiler.is_compiling() else below_autograd()


def _twice() -> bool:
    """Whether this backward pass is itself to be differentiated."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


def _cast(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else grad.to(parameter.dtype)


def _again(plain: Any, given: tuple[Tensor | None, ...], gy: Tensor) -> list[Tensor | None]:
    """Gradients that can be differentiated: through the plain equations. None where a tensor is absent or takes no part."""
    asked = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(plain(*given), asked, gy, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in given]


def _count(x: Tensor) -> int:
    """How many numbers a channel has."""
    return x.numel() // max(1, x.shape[1])


def _together(own: Tensor, count: int) -> tuple[Tensor, int]:
    """Mean and variance (2, C) of every channel over all processes, and how many numbers each has there."""
    mine = torch.cat([own.flatten(), own.new_full((1,), count)])
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, mine)
    table = torch.stack(parts)
    counts = table[:, -1:]
    means, variances = table[:, :-1].chunk(2, 1)
    share = counts / counts.sum().clamp(min=1)
    mean = (share * means).sum(0)
    # Chan's merge: what the means are apart belongs to the variance
    return torch.stack([mean, (share * (variances + (means - mean).square())).sum(0)]), int(counts.sum())


class _Batch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, v, fixed, kind, act, eps, sync):
        with _quiet():
            everywhere, count = _together(moments(x), _count(x)) if sync else (None, _count(x))
            variance = fixed if everywhere is None else everywhere[1]
            y, planes, of_channels = _batch(x, weight, bias, v, variance, kind, act, eps)
            if everywhere is not None:
                of_channels = everywhere.to(of_channels.dtype)
        ctx.save_for_backward(x, weight, bias, v, fixed, planes, of_channels)
        ctx.settings, ctx.count, ctx.sync = (kind, act, eps), count, sync
        # a tensor of its own: an output that is also saved would be a second thing to keep
        variance = of_channels[1].clone()
        ctx.mark_non_differentiable(variance)
        return y, variance, count

    @staticmethod
    def backward(ctx, gy, *_):  # type: ignore[override]
        x, weight, bias, v, fixed, planes, of_channels = ctx.saved_tensors
        kind, act, eps = ctx.settings
        if _twice():
            if ctx.sync:
                raise NotImplementedError("EvoNorm with sync=True has no second derivative; use sync=False for it")
            plain = partial(reference.batch, variance=fixed, kind=kind, act=act, eps=eps)
            return *_again(plain, (x, weight, bias, v), gy), None, None, None, None, None
        with _quiet():
            through = fixed is None and not ctx.sync
            gx, gw, gb, gv, pull = _batch_backward(gy, x, planes, of_channels, weight, v, kind, act, eps, through)
            if ctx.sync:
                torch.distributed.all_reduce(pull)
                mean, root = of_channels[0], torch.sqrt(of_channels[1] + eps)
                a = reference.planes(x)
                more = (a - mean[:, None]) * (pull / (max(1, ctx.count) * root))[:, None]
                gx = gx + more.reshape(x.shape).to(gx.dtype)
        return gx, _cast(gw, weight), _cast(gb, bias), _cast(gv, v), None, None, None, None, None


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, v, groups, centred, act, eps):
        with _quiet():
            y, stats = _group(x, weight, bias, v, groups, centred, act, eps)
        ctx.save_for_backward(x, weight, bias, v, stats)
        ctx.settings = groups, centred, act, eps
        return y

    @staticmethod
    def backward(ctx, gy):  # type: ignore[override]
        x, weight, bias, v, stats = ctx.saved_tensors
        groups, centred, act, eps = ctx.settings
        if _twice():
            plain = partial(reference.group, groups=groups, centred=centred, act=act, eps=eps)
            return *_again(plain, (x, weight, bias, v), gy), None, None, None, None
        with _quiet():
            gx, gw, gb, gv = _group_backward(gy, x, stats, weight, v, groups, act)
        return gx, _cast(gw, weight), _cast(gb, bias), _cast(gv, v), None, None, None, None


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    variance: Tensor | None,
    kind: int,
    act: bool = True,
    eps: float = 1e-5,
    sync: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """B0, B1 or B2 (``kind``) of (samples, channels, *space), the biased variance (C,) that it divided by, and how many numbers of
    a channel that is of: the batch's own (``sync``: of all processes), or ``variance``, which then counts as a constant. Without
    ``act`` the variance alone divides."""
    if torch.compiler.is_compiling() or needs_grad(x, weight, bias, v):
        return _Batch.apply(x, weight, bias, v, variance, kind, act, eps, sync)  # type: ignore[return-value]
    with below_autograd():
        count = _count(x)
        if sync:
            everywhere, count = _together(moments(x), count)
            variance = everywhere[1]
        y, _, of_channels = _batch(x, weight, bias, v, variance, kind, act, eps)
    return y, of_channels[1], count


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    groups: int,
    centred: bool = True,
    act: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """S0 (``v`` given), S1 (``v`` None) or S2 (not ``centred``) of (samples, channels, *space). Without ``act`` the sigmoid is left out."""
    if torch.compiler.is_compiling() or needs_grad(x, weight, bias, v):
        return _Group.apply(x, weight, bias, v, groups, centred, act, eps)  # type: ignore[return-value]
    with below_autograd():
        return _group(x, weight, bias, v, groups, centred, act, eps)[0]
