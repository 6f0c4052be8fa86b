"""The plain bodies of the norms with channel statistics, in the order of their equations and without a branch on a tensor.

Rows are tokens, columns channels. ``pad_mask`` is True on padding. Statistics are taken in float32 for float16 and bfloat16, in
float64 for float64 input or statistics. What the backward needs is kept as one vector: channels first, flags behind.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic type of a tensor type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x: Tensor) -> Tensor:
    """(tokens, channels) in the arithmetic type."""
    return x.reshape(x.shape.numel() // x.shape[-1], x.shape[-1]).to(wide(x.dtype))


def scaled(a: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Every group of a row divided by its quadratic mean, and 1 / that mean (tokens * groups); no groups leave the row alone."""
    if not groups:
        return a, a.new_empty(0)
    parts = a.unflatten(1, (groups, a.shape[1] // groups))
    rstd = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return (parts * rstd).flatten(1), rstd.flatten()


def _split(pad_mask: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` with zeros on padding, and its rest."""
    if pad_mask is None:
        return a, torch.zeros_like(a)
    pad = pad_mask.reshape(-1, 1)
    return torch.where(pad, 0, a), torch.where(pad, a, 0)


def squares(u: Tensor, pad_mask: Tensor | None) -> Tensor:
    """Sums of u^2 over the real tokens (channels), and their number behind."""
    count = u.new_full((1,), len(u)) if pad_mask is None else (~pad_mask).sum().reshape(1).to(u.dtype)
    return torch.cat([_split(pad_mask, u)[0].square().sum(0), count])


def products(gy: Tensor, u: Tensor, pad_mask: Tensor | None) -> Tensor:
    """Sums of gy * u and gy over the real tokens, of gy * u, gy and u^2 over the padding, and the two numbers of tokens."""
    sums = [part.sum(0) for real in (0, 1) for part in (_split(pad_mask, gy * u)[real], _split(pad_mask, gy)[real])]
    padding = torch.zeros((), dtype=torch.int64, device=u.device) if pad_mask is None else pad_mask.sum()
    counts = torch.stack([len(u) - padding, padding]).to(u.dtype)
    return torch.cat([*sums, _split(pad_mask, u)[1].square().sum(0), counts])


def _vector(parameter: Tensor | None, like: Tensor, missing: float) -> Tensor:
    return like.new_full(like.shape[-1:], missing) if parameter is None else parameter.to(like.dtype)


def channel_scale(
    x: Tensor, square: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """``weight * u / sqrt(square + eps) + bias``, the norm with a fixed statistic."""
    u = scaled(rows(x), groups, eps)[0]
    gain = torch.rsqrt(square.to(u.dtype) + eps) * _vector(weight, u, 1)
    return (u * gain + _vector(bias, u, 0)).to(x.dtype).reshape(x.shape)


def _statistic(
    sums: Tensor | None, u: Tensor, pad_mask: Tensor | None, running: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean square of every channel (the running one where no token is), whether there is a token, and whether to use it."""
    sums = (squares(u, pad_mask) if sums is None else sums).to(running.dtype)
    some = sums[-1] > 0
    q = torch.where(some, sums[:-1] / sums[-1], running)
    return q, some, some & torch.isfinite(q).all()


def unified_norm(
    x, weight, bias, pad_mask, sums, running_var, window, iters, skip_counter, backward_window, warmup, compensation,
    filtration, eps, momentum, moves,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and (1 / sqrt(psi + eps), r, slot of the backward window, skip, own gradient statistic, live)."""
    a = rows(x)
    running = running_var.to(torch.promote_types(a.dtype, running_var.dtype))
    ring = window.to(running.dtype)
    size, t = len(ring), iters + 1
    q, _, usable = _statistic(sums, a, pad_mask, running)
    slot = (t % size).reshape(1)
    filled = ring.index_copy(0, slot, q[None])
    skip = ~usable | (size == 1)
    fired = torch.zeros_like(skip)
    warm = t >= warmup
    geometric = filled.log().mean(0).exp()
    if filtration:
        spread = ring.sqrt().var() if ring.numel() > 1 else ring.new_zeros(())
        fired = usable & warm & (filled.mean(0) - geometric > size * spread).any()
        filled = torch.where(fired, ring.index_copy(0, slot, running[None]), filled)
        skip = skip | fired
    psi = torch.where((t <= size) | ~warm | skip, q, geometric)
    ratio = ((psi + eps) / (running + eps)).sqrt().clamp(0.2, 5)
    r = torch.where((t <= max(compensation, warmup)) | skip, 1, ratio)
    # the gradient's own test: its window may have another size than the forward one
    own = (t <= backward_window) | ~warm | skip
    live = usable & moves
    running_var.copy_(torch.where(live, momentum * running + (1 - momentum) * psi, running))
    window.copy_(torch.where(live, filled, ring))
    skip_counter.add_(fired & live)
    iters.add_(live)
    inverse = torch.rsqrt(psi + eps)
    y = a * (inverse.to(a.dtype) * _vector(weight, a, 1)) + _vector(bias, a, 0)
    flags = torch.stack([t % backward_window, skip, own, live])
    kept = torch.cat([inverse.to(a.dtype), r.to(a.dtype), flags.to(a.dtype)])
    return y.to(x.dtype).reshape(x.shape), kept


def unified_norm_backward(
    gy, x, kept, weight, pad_mask, own, whole, window, ema_gz, momentum, count_padding
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; the backward window and ema_gz move."""
    a, g = rows(x), rows(gy)
    n = a.shape[1]
    here = products(g, a, pad_mask) if own is None else own.to(a.dtype)
    everywhere = here if whole is None else whole.to(a.dtype)
    inverse, r = kept[:n], kept[n : 2 * n]
    slot, (skip, own_statistic, live) = kept[2 * n : 2 * n + 1].long(), kept[2 * n + 1 :].bool()
    count = everywhere[-2] + (everywhere[-1] if count_padding else 0)
    total = everywhere[:n] + (everywhere[2 * n : 3 * n] if count_padding else 0)
    gain = _vector(weight, a, 1) * r * inverse
    now = torch.where(count > 0, gain * total / count, 0).to(ema_gz.dtype)
    filled = window.index_copy(0, slot, torch.where(skip, ema_gz, now)[None])
    mean = torch.where(own_statistic, now, filled.mean(0))
    moved = momentum * ema_gz + (1 - momentum) * mean
    moves = live & (count > 0) & torch.isfinite(now).all()
    pull = a * (torch.where(skip, mean, moved).to(a.dtype) * inverse.square())
    grad_x = g * gain - (pull if count_padding else _split(pad_mask, pull)[0])
    window.copy_(torch.where(moves, filled, window))
    ema_gz.copy_(torch.where(moves, moved, ema_gz))
    grad_weight = r * inverse * (here[:n] + here[2 * n : 3 * n])
    return grad_x.to(x.dtype).reshape(x.shape), grad_weight, here[n : 2 * n] + here[3 * n : 4 * n]


def power_norm(
    x, weight, bias, pad_mask, sums, running_phi, iters, groups, warmup, alpha, eps, batch_forward, batch_gradient, moves
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, (1 / sqrt(square + eps) of the forward and of the gradient, q, live), and the scales of the groups."""
    u, rstd = scaled(rows(x), groups, eps)
    phi = running_phi.to(torch.promote_types(u.dtype, running_phi.dtype))
    t = iters + 1
    q, _, usable = _statistic(sums, u, pad_mask, phi)
    square = q if batch_forward else torch.where(t <= warmup, q, phi)
    live = usable & moves
    averaged = torch.where(t < warmup, phi * (t - 1) / t + q / t, phi)
    running_phi.copy_(torch.where(live, alpha * averaged + (1 - alpha) * q, phi))
    iters.add_(live)
    inverse = torch.rsqrt(square + eps).to(u.dtype)
    back = torch.rsqrt(q + eps).to(u.dtype) if batch_gradient else inverse
    y = u * (inverse * _vector(weight, u, 1)) + _vector(bias, u, 0)
    kept = torch.cat([inverse, back, q.to(u.dtype), live.reshape(1).to(u.dtype)])
    return y.to(x.dtype).reshape(x.shape), kept, rstd


def power_norm_backward(
    gy, x, kept, rstd, weight, pad_mask, own, whole, ema_gz, groups, alpha, count_padding, clamp_gamma, exact
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; ema_gz moves. ``exact`` is the derivative through q instead, and moves nothing."""
    a, g = rows(x), rows(gy)
    n = a.shape[1]
    scales = rstd.reshape(len(a), groups, 1) if groups else None
    u = a if scales is None else (a.unflatten(1, (groups, n // groups)) * scales).flatten(1)
    here = products(g, u, pad_mask) if own is None else own.to(a.dtype)
    everywhere = here if whole is None else whole.to(a.dtype)
    inverse, back, q, live = kept[:n], kept[n : 2 * n], kept[2 * n : 3 * n], kept[-1].bool()
    real, padding = everywhere[-2], everywhere[-1]
    w = _vector(weight, u, 1)
    if exact:
        pull = u * torch.where(real > 0, w * (everywhere[:n] + everywhere[2 * n : 3 * n]) / real * inverse**3, 0)
        count_padding = False
    else:
        count = real + (padding if count_padding else 0)
        total = everywhere[:n] + (everywhere[2 * n : 3 * n] if count_padding else 0)
        total_square = q * real + (everywhere[4 * n : 5 * n] if count_padding else 0)
        nu = (1 - alpha) * ema_gz.to(u.dtype)
        square = torch.where(count > 0, total_square / count * inverse.square(), 0).to(ema_gz.dtype)
        change = torch.where(count > 0, w * inverse * total / count, 0).to(ema_gz.dtype) - (1 - alpha) * ema_gz * square
        if clamp_gamma:  # where the factor exceeds 1, only 1 / factor of what it would take from ema is taken
            change = change + ((1 - alpha) * square - 1).clamp(min=0) * ema_gz
        moved = ema_gz + change
        pull = u * (nu * inverse * back)
        ema_gz.copy_(torch.where(live & (count > 0) & torch.isfinite(moved).all(), moved, ema_gz))
    d = g * (w * back) - (pull if count_padding else _split(pad_mask, pull)[0])
    if scales is not None:
        d, v = d.unflatten(1, (groups, n // groups)), u.unflatten(1, (groups, n // groups))
        d = (scales * (d - v * (d * v).mean(-1, keepdim=True))).flatten(1)
    grad_weight = inverse * (here[:n] + here[2 * n : 3 * n])
    return d.to(x.dtype).reshape(x.shape), grad_weight, here[n : 2 * n] + here[3 * n : 4 * n]
