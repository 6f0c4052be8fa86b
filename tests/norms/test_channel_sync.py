"""Two processes that share each batch keep the statistics, outputs and gradients of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch

from headway.norms.power import PowerNorm
from headway.norms.unified import UnifiedNorm

KINDS = {
    "unified": lambda sync: UnifiedNorm(6, warmup_iters=3, compensation_warmup=5, outlier_filtration=True, sync=sync),
    "unified, padding counted": lambda sync: UnifiedNorm(6, (3, 2), warmup_iters=3, count_padding=True, sync=sync),
    "power": lambda sync: PowerNorm(6, warmup_iters=3, group_num=2, clamp_gamma=True, sync=sync),
    "power, padding counted": lambda sync: PowerNorm(6, warmup_iters=3, count_padding=True, sync=sync),
    "power v": lambda sync: PowerNorm(6, variant="v", group_num=None, sync=sync),
}
STEPS = 12


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, gy = (torch.randn(6, 5, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    pad = torch.rand(6, 5, generator=draw) < 0.3
    x[4:, :, 2] *= 1 + 20 * (step % 5 == 4)  # an outlier that one of the two processes sees alone
    return x, gy, pad


def train(kind: str, dtype: torch.dtype, first: int, last: int, sync: bool) -> dict[str, torch.Tensor]:
    layer, found = KINDS[kind](sync).to(dtype), {}
    for step in range(STEPS):
        start, stop = (
            (0, 0) if step == 7 and last == 2 else (0, 6) if step == 7 else (first, last)
        )  # one has no token at all
        x, gy, pad = (t[start:stop] for t in batch(step))
        x = x.to(dtype).requires_grad_()
        y = layer(x, pad)
        y.backward(gy.to(dtype))
        found[f"y{step}"], found[f"gx{step}"] = y.detach(), x.grad  # type: ignore[assignment]
    gradients = {f"grad {name}": p.grad for name, p in layer.named_parameters()}
    return {**found, **gradients, **layer.state_dict()}  # type: ignore[return-value]


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        ends = (0, 2) if rank == 0 else (2, 6)
        results = {
            (kind, dtype): train(kind, dtype, *ends, True) for kind in KINDS for dtype in (torch.float64, torch.float32)
        }
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (kind, dtype), parts in ((key, [r[key] for r in ranks]) for key in ranks[0]):
        whole = train(kind, dtype, 0, 6, False)
        close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        for name, wanted in whole.items():
            if name.startswith(("y", "gx")):
                got = torch.cat([part[name] for part in parts])
            elif name.startswith("grad"):
                got = parts[0][name] + parts[1][name]
            else:
                assert torch.equal(parts[0][name], parts[1][name]), (kind, name)
                got = parts[0][name]
            torch.testing.assert_close(got, wanted, **close, msg=lambda m, k=kind, n=name: f"{k} {n}: {m}")
    fired = ranks[0]["unified", torch.float64]["skip_counter"]
    assert 0 < fired < STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_sync_changes_nothing(kind):
    alone, ready = train(kind, torch.float32, 0, 6, False), train(kind, torch.float32, 0, 6, True)
    torch.testing.assert_close(ready, alone, rtol=0, atol=0)
