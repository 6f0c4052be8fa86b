"""Two processes that each probe a shard report what one process reports of the whole batch."""

import pytest
import torch
from torch import nn

import headway as hw


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def batch():
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1


def _rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        shard = batch()[:5] if rank == 0 else batch()[5:]
        flow = hw.probe(model(), shard, loss=lambda out: out.square().sum(), sync=True)
        wrapped = hw.probe(
            nn.parallel.DistributedDataParallel(model()), shard, loss=lambda out: out.square().sum(), sync=True
        )
        torch.save((flow.to_dict(), wrapped.to_dict()), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_put_their_moments_and_gradients_together_also_under_ddp(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    whole = hw.probe(model(), batch(), loss=lambda out: out.square().sum())
    for rank in range(2):
        for flow in torch.load(tmp_path / f"{rank}.pt"):
            assert flow["model"] == "Sequential"
            for got, wanted in zip(flow["rows"], whole.rows, strict=True):
                assert got["name"] == wanted.name
                for key in ("std", "var", "rms", "mean", "kurtosis", "absmax", "frac_zero", "grad_norm"):
                    assert got[key] == pytest.approx(getattr(wanted, key), rel=1e-9), key


def test_sync_without_a_process_group_is_refused():
    with pytest.raises(RuntimeError, match="process group"):
        hw.probe(model(), batch(), sync=True)
