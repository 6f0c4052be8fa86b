"""AdamP's and SGDP's steps on lists of tensors, without an optimiser around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headway.kernels import radial
from headway.kernels.radial import reference


@torch.no_grad()
def adamp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    maximize: bool = False,
) -> Tensor:
    """One step of AdamP in place on ``params`` and their moments; ``state_steps`` (0-dim float32) are counted up.

    Returns:
        What was done to every parameter (n,) int8: 0 not projected, 1 row by row, 2 as a whole.
    """
    lists = [list(each) for each in (params, grads, exp_avgs, exp_avg_sqs)]
    step: Callable[..., Tensor] = radial.adamp_ if _served(*lists) else reference.adamp_
    rest = eps, weight_decay, delta, wd_ratio, nesterov, maximize
    return step(*lists, list(state_steps), lr, *betas, *rest)


@torch.no_grad()
def sgdp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    maximize: bool = False,
    official_inplace: bool = False,
) -> Tensor:
    """One step of SGDP in place on ``params`` and their momentum, which may be left out where ``momentum`` is 0.

    Returns:
        As :func:`adamp`.

    Raises:
        ValueError: momentum without buffers.
    """
    if momentum and not momentum_buffers:
        raise ValueError(f"momentum={momentum} needs momentum_buffers, one tensor of zeros a parameter to begin with")
    lists = [list(each) for each in (params, grads, momentum_buffers)]
    step: Callable[..., Tensor] = radial.sgdp_ if _served(*lists) else reference.sgdp_
    rest = eps, weight_decay, delta, wd_ratio, nesterov, maximize, official_inplace
    return step(*lists, lr, momentum, dampening, *rest)


def _served(*lists: list[Tensor]) -> bool:
    first = lists[0][0]
    return radial.native(first) and radial.lie_alike(*lists) and all(p.dtype == first.dtype for p in lists[0])


def project_radial(
    p: Tensor, g: Tensor, u: Tensor, delta: float = 0.1, eps: float = 1e-8, wd_ratio: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The update ``u`` without its radial part where the weight ``p`` looks scale invariant by its gradient ``g``.

    Returns:
        The update, and the factor on weight decay, a 0-dim tensor: ``wd_ratio`` where it was projected, else 1.
    """
    projected, kind = reference.project(reference.wide(p), reference.wide(g), reference.wide(u), delta, eps)
    return projected.to(u.dtype), torch.where(kind > 0, torch.full((), wd_ratio), torch.ones(()))
