# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""Two processes that share each batch keep the statistics, outputs and gradients of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch

from headway.norms.balanced import AdaB2N2d
from headway.norms.balancing import balance_penalty, start_task, task_batch
from headway.norms.batch_channel import BatchChannelNorm2d, EstBatchNorm2d

KINDS = {
    "estimated": lambda sync: EstBatchNorm2d(6, 0.2, sync=sync),
    "batch-channel": lambda sync: BatchChannelNorm2d(6, 3, sync=sync),
    "balanced": lambda sync: AdaB2N2d(6, 3, 0.4, sync=sync),
    "batch-channel, estimated": lambda sync: BatchChannelNorm2d(6, 2, True, 0.2, sync=sync),
}
STEPS = 4


def batch(step: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(step)
    x, gy = (torch.randn(6, 6, 3, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    return x * 2 + 1, gy, torch.tensor([0, 1, 0, 1, 1, 0])


def train(kind: str, first: int, last: int, sync: bool) -> dict[str, torch.Tensor]:
    layer, found = KINDS[kind](sync).double(), {}
    for step in range(STEPS):
        start, stop = (0, 0) if step == 2 and last == 2 else (0, 6) if step == 2 else (first, last)  # one has no sample
        x, gy, ids = (t[start:stop] for t in batch(step))
        x.requires_grad_()
        start_task(layer, 2 * (step > 0))
        with task_batch(layer, ids * (step > 0)):
            y = layer(x)
        # every process holds the whole penalty, and their gradients are added up
        penalty = balance_penalty(layer) / (1 if last - first == 6 else 2)
        torch.autograd.backward(
            [y, penalty] if penalty.requires_grad else [y], [gy, None] if penalty.requires_grad else [gy]
        )
        found[f"y{step}"], found[f"gx{step}"] = y.detach(), x.grad
    gradients = {f"grad {name}": p.grad for name, p in layer.named_parameters()}
    return {**found, **gradients, **layer.state_dict()}


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        ends = (0, 2) if rank == 0 else (2, 6)
        torch.save({kind: train(kind, *ends, True) for kind in KINDS}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in KINDS:
        parts, whole = [r[kind] for r in ranks], train(kind, 0, 6, False)
        for name, wanted in whole.items():
            if name.startswith(("y", "gx")):
                got = torch.cat([part[name] for part in parts])
            elif name.startswith("grad"):
                got = parts[0][name] + parts[1][name]
            else:
                assert torch.equal(parts[0][name], parts[1][name]), (kind, name)
                got = parts[0][name]
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, k=kind, n=name: f"{k} {n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_sync_changes_nothing(kind):
    torch.testing.assert_close(train(kind, 0, 6, True), train(kind, 0, 6, False), rtol=0, atol=0)
