"""Normalize-and-Project in two processes: weights cut by FSDP2 or by hand keep the norm of the whole."""

import pytest
import torch
import torch.nn.functional as F
from processes import two_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from headway.weights import NaP

SETTINGS = [{}, {"per": "row"}, {"scale_offset": "joint"}, {"tangent": True, "every": 2}]
STEPS = 5


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 7, bias=False), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)
    ).double()  # fmt: skip


def data():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
    return x, x[:, :3].argmax(1)


def train(model, settings, x, y):
    nap = NaP(model, **settings)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    nap.attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach() for p in whole], {n: r.clone() for n, r in nap.rho.items()}, nap.elr(optimizer)


def _rank(rank):
    (x, y), found = data(), {}
    part = slice(4 * rank, 4 * rank + 4)
    for i, settings in enumerate(SETTINGS):
        model = net()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        found["fully_shard", i] = train(model, settings, x[part], y[part])
    for name, placements, shape in (("inside rows", [Shard(1)], (2,)), ("twice", [Shard(0), Replicate()], (2, 1))):
        for per in ("tensor", "row"):
            whole = net()[3].weight.detach()
            p = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", shape), placements))
            nap = NaP([("p", p)], per=per, scale_offset="none")
            with torch.no_grad():
                p.mul_(3).add_(0.1)
            nap.project()
            found[name, per] = p.full_tensor().detach(), nap.rho["p"], nap.skipped
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("i", range(len(SETTINGS)), ids=lambda i: str(SETTINGS[i]))
def test_a_sharded_net_is_projected_as_a_whole_one(ranks, i):
    wanted, rho, rates = train(net(), SETTINGS[i], *data())
    for params, own, steps in (rank["fully_shard", i] for rank in ranks):
        for a, b in zip(params, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert own.keys() == rho.keys()
        for name, value in own.items():
            torch.testing.assert_close(value, rho[name], rtol=1e-12, atol=0)
        assert steps == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("name", ["inside rows", "twice"])
def test_weights_cut_along_any_axis_go_back_to_the_sphere_of_the_whole(ranks, name, per):
    p = nn.Parameter(net()[3].weight.detach().clone())
    nap = NaP([("p", p)], per=per, scale_offset="none")
    with torch.no_grad():
        p.mul_(3).add_(0.1)
    nap.project()
    for found, rho, skipped in (rank[name, per] for rank in ranks):
        torch.testing.assert_close(found, p.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rho, nap.rho["p"], rtol=1e-12, atol=0)
        assert skipped == 0
