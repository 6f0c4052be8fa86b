# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""Two processes that share each batch keep the outputs and gradients of region norms of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch

from headway.norms.region import RegionNormB2d, RegionNormL2d

KINDS = {
    "rn-b": lambda sync: RegionNormB2d(4, "batch", sync=sync),
    "rn-b, released": lambda sync: RegionNormB2d(4, "batch", eps_mode="released", affine_mode="released", sync=sync),
    "rn-l": lambda sync: RegionNormL2d(4, 0.5, 3, "batch", sync=sync),
}
STEPS = 3


def batch(step: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(step)
    x, gy = (torch.randn(6, 4, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 3, 5, generator=draw) < 0.4
    mask[:2] &= step != 1  # the first process sees no hole
    return x * 2 + 1, gy, mask


def train(kind: str, first: int, last: int, sync: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layer, found = KINDS[kind](sync).double(), {}
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    for step in range(STEPS):
        start, stop = (0, 0) if step == 2 and last == 2 else (0, 6) if step == 2 else (first, last)  # one has no sample
        x, gy, mask = (t[start:stop] for t in batch(step))
        x.requires_grad_()
        y = layer(x, mask) if kind.startswith("rn-b") else layer(x)
        y.backward(gy)
        found[f"y{step}"], found[f"gx{step}"] = y.detach(), x.grad
    return {**found, **{f"grad {name}": p.grad for name, p in layer.named_parameters()}}


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
            got = parts[0][name] + parts[1][name] if name.startswith("grad") else torch.cat([p[name] for p in parts])
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, k=kind, n=name: f"{k} {n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_sync_changes_nothing(kind):
    torch.testing.assert_close(train(kind, 0, 6, True), train(kind, 0, 6, False), rtol=0, atol=0)
