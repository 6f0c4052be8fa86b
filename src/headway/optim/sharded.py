"""The end of a step on matrices that are spread over processes: FSDP2's ``fully_shard``, tensor parallelism, any ``DTensor``.

Moments and updates need a process's own shard alone. Whether to project needs whole rows (a row is an output channel, the first
axis) and the most of all rows, so processes exchange sums, never weights: the four sums of a row where rows themselves are cut,
then five numbers a matrix, in one vector for all matrices of a parameter group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.kernels.radial.reference import choose, kept, likeness, row_sums, store, wide

_PLAIN = {Tensor, nn.Parameter}


def any_spread(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a ``DTensor``."""
    return not set(map(type, tensors)) <= _PLAIN and any(map(is_spread, tensors))


def is_spread(tensor: Tensor) -> bool:
    """Whether this is a ``DTensor``."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def here(tensor: Any, like: Any | None = None) -> Tensor:
    """This process's part of a tensor, cut as ``like`` is where that is given.

    Raises:
        TypeError: ``like`` is spread over processes and ``tensor`` is not.
    """
    if like is not None and is_spread(like):
        if not is_spread(tensor):
            raise TypeError(
                "the gradient of a parameter that is spread over processes (DTensor) must be spread as well; it is a plain tensor"
            )
        if tensor.placements != like.placements:
            tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.to_local() if is_spread(tensor) else tensor


def cuts(p: Any) -> list[tuple[Any, bool]]:
    """Along which process groups a parameter is cut, and whether that cuts rows themselves (any axis but the first)."""
    if not is_spread(p):
        return []
    return [
        (p.device_mesh.get_group(d), place.dim % p.dim() != 0)
        for d, place in enumerate(p.placements)
        # a replica, and a value still to be summed, have no axis along which they are cut
        if getattr(place, "dim", None) is not None
    ]


def radial_step_(
    wholes: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    updates: Sequence[Tensor],
    steps: Sequence[Any],
    decay: Any,
    delta: float,
    wd_ratio: float,
    eps: float,
    keep: bool,
) -> Tensor:
    """As :func:`headway.kernels.radial.reference.radial_step_` on the parts ``params``, ``grads``, ``updates`` that this process
    has of the parameters ``wholes``. Every process must give the same parameters in the same order."""
    ways = [cuts(p) for p in wholes]
    sums = [_row_sums(wide(p), wide(g), wide(u)) for p, g, u in zip(params, grads, updates, strict=True)]
    sums = exchange(sums, [[group for group, inside in way if inside] for way in ways], lambda parts: parts.sum(0))
    # the most of no row is 0, which no threshold lies below
    found = [torch.cat([likeness(s, eps).amax()[None] if s.shape[1] else s.new_zeros(1), s.sum(1)]) for s in sums]
    across = [[group for group, inside in way if not inside] for way in ways]
    found = exchange(found, across, _most_and_sums)
    kinds = []
    for i, (p, whole) in enumerate(zip(params, wholes, strict=True)):
        numel, width = whole.numel(), whole.numel() // len(whole)
        coefficient, kind = choose(found[i][0], sums[i], found[i][1:], width, numel, delta, eps)
        kinds.append(kind)
        own = wide(p)
        u = wide(updates[i]) - coefficient.to(own.dtype).view(-1, *[1] * (own.dim() - 1)) * own
        if keep:
            store(updates[i], u)
        if isinstance(decay, Tensor) or decay > 0:
            own = own * kept(kind > 0, decay, wd_ratio, own)
        store(p, own - steps[i] * u)
    return torch.stack(kinds).to(torch.int8)


def _row_sums(p: Tensor, g: Tensor, u: Tensor) -> Tensor:
    """(4, rows) in float64, zeros where this process has nothing of the rows."""
    if not p.numel():
        return torch.zeros(4, len(p), dtype=torch.float64, device=p.device)
    return row_sums(p, g, u).double()


def _most_and_sums(parts: Tensor) -> Tensor:
    """(processes, 5) -> (5,): the largest likeness of a row, and sums over all rows."""
    return torch.cat([parts[:, :1].amax(0), parts[:, 1:].sum(0)])


def exchange(parts: list[Tensor], groups: list[list[Any]], reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Every tensor of ``parts`` reduced over its process groups, one call a group for all of its tensors together."""
    parts = list(parts)
    for group in dict.fromkeys(group for own in groups for group in own):
        chosen = [i for i, own in enumerate(groups) if group in own]
        flat = torch.cat([parts[i].flatten() for i in chosen])
        every = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, flat, group=group)
        pieces = torch.stack(every).split([parts[i].numel() for i in chosen], 1)
        for i, piece in zip(chosen, pieces, strict=True):
            parts[i] = reduce(piece.reshape(len(every), *parts[i].shape))
    return parts
