"""Puts the statistics of all ranks of a process group together, as if one process had seen the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headway.kernels.moments import combine
from headway.signals.calls import Call


def synchronise(calls: Sequence[Call]) -> None:
    """Combines the moments of all ranks and adds the squares of their gradients; likeness stays this rank's own.

    Raises:
        RuntimeError: there is no process group, or the ranks recorded different rows.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "sync=True needs an initialised process group; call torch.distributed.init_process_group first"
        )
    if not calls:
        return
    zero = calls[0].scalars.new_zeros(())
    parts = [
        torch.cat(
            [
                c.scalars,
                c.channels.flatten(),
                (zero if c.grad_norm is None else c.grad_norm.to(zero).square())[None],
            ]
        )
        for c in calls
    ]
    mine = torch.cat(parts)
    sizes = [torch.zeros((), dtype=torch.int64, device=mine.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(mine.numel(), device=mine.device))
    if len({int(size) for size in sizes}) > 1:
        raise RuntimeError("sync=True needs the same modules to run on every rank; the ranks recorded different rows")
    everyone = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everyone, mine)
    start = 0
    for call, part in zip(calls, parts, strict=True):
        shape = call.channels.shape
        shards = [ranks[start : start + part.numel()] for ranks in everyone]
        start += part.numel()
        total = (shards[0][:8], shards[0][8:-1].view(shape))
        for shard in shards[1:]:
            total = combine(total, (shard[:8], shard[8:-1].view(shape)))
        call.scalars, call.channels = total
        if call.grad_norm is not None:
            call.grad_norm = torch.stack([shard[-1] for shard in shards]).sum().sqrt()
            call.grad_size *= len(shards)
