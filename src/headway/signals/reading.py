"""Reads what the hooks have measured off the device, all numbers of a kind in one transfer, as rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from headway.signals import statistics
from headway.signals.calls import Call, channel_summary
from headway.signals.row import NAN, Row
from headway.signals.weights import Weights


def read(calls: Sequence[Call], weights: Weights, scale: float = 1.0) -> list[Row]:
    """The rows of these calls, in order of execution; gradients are divided by ``scale``."""
    if not calls:
        return []
    device = calls[0].scalars.device
    ranks, cosines, zeros = _likeness(calls)
    nothing = torch.full((), NAN, dtype=torch.float64, device=device)
    packed = []
    for call in calls:
        summary = call.channels if call.channels.dim() == 1 else channel_summary(call.channels)
        extra = [nothing if t is None else t.to(nothing) for t in (call.tokens, call.grad_norm)]
        packed.append(torch.cat([call.scalars.to(device), summary.to(device), torch.stack(extra)]))
    table = torch.stack(packed).tolist()
    times = Counter(id(call.point.module) for call in calls)
    numbers_of_weights = weights.numbers({id(c.point.module): c.point.module for c in calls}.values(), scale)
    seen: Counter[int] = Counter()
    depths: Counter[str] = Counter()
    rows = []
    for index, (call, numbers) in enumerate(zip(calls, table, strict=True)):
        key, kind = id(call.point.module), call.point.kind
        seen[key] += 1
        n, mean, m2, _, m4, largest, zero, bad, var, std, tokens, grad_norm = numbers
        grad_norm /= scale
        weight_norm, weight_grad, rate = numbers_of_weights[key]
        rows.append(
            Row(
                call.point.name + (f"#{seen[key]}" if times[key] > 1 else ""),
                kind,
                depths[kind],
                call.shape,
                str(call.dtype).removeprefix("torch."),
                type(call.point.module).__name__,
                std=std,
                var=var,
                rms=math.sqrt(m2 / n + mean * mean) if n else NAN,
                mean=mean if n else NAN,
                kurtosis=n * m4 / m2 / m2 if n and m2 > 1e-300 and m2 * m2 > 0 else NAN,
                absmax=largest if n else NAN,
                frac_zero=zero / n if n else NAN,
                nonfinite=int(bad),
                cos=cosines[index],
                between_tokens=tokens,
                stable_rank=ranks[index],
                samples=0 if call.gram is None else call.gram.shape[0],
                zero_samples=zeros[index],
                grad_norm=grad_norm,
                grad_rms=grad_norm / math.sqrt(max(1, call.grad_size)),
                grad_nonfinite=call.grad_norm is not None and not math.isfinite(grad_norm),
                weight_norm=weight_norm,
                weight_grad_norm=weight_grad,
                effective_lr=rate,
                saved_bytes=call.saved,
                note=call.note,
            )
        )
        depths[kind] += 1
    return rows


def scale_of(grad_scale: Any) -> float:
    """The number behind ``grad_scale``: None, a number, or a GradScaler.

    Raises:
        ValueError: it is not positive.
    """
    if grad_scale is None:
        return 1.0
    value = grad_scale.get_scale() if hasattr(grad_scale, "get_scale") else float(grad_scale)
    if not value > 0:
        raise ValueError(f"grad_scale must be a positive number or a GradScaler, not {grad_scale!r}")
    return float(value)


def _likeness(calls: Sequence[Call]) -> tuple[list[float], list[float], list[int]]:
    """Stable rank, cos and number of all-zero samples of every call, matrices of one size decomposed together."""
    ranks, cosines, zeros = [NAN] * len(calls), [NAN] * len(calls), [0] * len(calls)
    # a tensor that several modules handed on has one matrix
    alike: dict[int, list[int]] = {}
    for index, call in enumerate(calls):
        if call.gram is not None:
            alike.setdefault(id(call.gram), []).append(index)
    sizes: dict[tuple[int, torch.device], list[list[int]]] = {}
    for members in alike.values():
        gram = calls[members[0]].gram
        assert gram is not None
        sizes.setdefault((gram.shape[0], gram.device), []).append(members)
    for groups in sizes.values():
        stacked = torch.stack([gram for members in groups if (gram := calls[members[0]].gram) is not None])
        numbers = torch.stack(statistics.likeness(stacked)).tolist()
        for members, rank, cosine, zero in zip(groups, *numbers, strict=True):
            for index in members:
                ranks[index], cosines[index], zeros[index] = rank, cosine, int(zero)
    return ranks, cosines, zeros
