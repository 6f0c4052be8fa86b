"""AdamP and SGDP in two processes: equal gradients (DDP) and parts of weights (FSDP2, tensors cut along any axis)."""

import pytest
import torch
import torch.nn.functional as F
from processes import two_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from headway.optim import SGDP, AdamP, effective_step
from headway.optim.sharded import here

MAKE = {
    "adamp": lambda p: AdamP(p, 1e-2, weight_decay=0.1),
    "adamp nesterov": lambda p: AdamP(p, 1e-2, weight_decay=0.1, nesterov=True, foreach=False),
    "sgdp": lambda p: SGDP(p, 0.1, 0.9, 0.1, weight_decay=0.05),
    "sgdp in place": lambda p: SGDP(p, 0.1, 0.9, weight_decay=0.05, official_inplace=True),
}
STEPS = 6


class Net(nn.Module):
    """Rows before a norm, a weight invariant as a whole, a plain one; rows that two processes cannot share evenly."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 5, 3, bias=False), nn.GroupNorm(5, 5)
        self.hidden, self.last = nn.Linear(80, 7, bias=False), nn.Linear(7, 3)
        self.single = nn.Linear(3, 1)

    def forward(self, x):
        h = self.hidden(F.relu(self.norm(self.conv(x))).flatten(1))
        h = self.last(torch.tanh(h / self.hidden.weight.norm()))
        return torch.cat([h, self.single(h)], 1)


def net():
    torch.manual_seed(0)
    return Net().double()


def data():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(8, 1, 6, 6, generator=draw).double(), torch.arange(8) % 4


def train(model, make, x, y):
    optimizer, reports = make(model.parameters()), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        reports.append(optimizer.projection_report())
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in whole], reports, effective_step(optimizer, model)


def ddp(rank, make, x, y):
    model = nn.parallel.DistributedDataParallel(net())
    params, reports, rates = train(model, make, x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4])
    return params, reports, {name.removeprefix("module."): rate for name, rate in rates.items()}


def fsdp(rank, make, x, y):
    model = net()
    for part in (model.conv, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    assert isinstance(model.conv.weight, DTensor) and model.conv.weight.placements == (Shard(0),)
    return train(model, make, x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4])


def given(placements, shape, rank, make, x, y):
    """The same parameters and gradients cut by hand, as tensor parallelism cuts them; both processes see the whole batch."""
    del rank
    mesh, model, twin = init_device_mesh("cpu", shape), net(), net()
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, placements(p))) for p in model.parameters()]
    optimizer, reports = make(params), []
    for _ in range(STEPS):
        with torch.no_grad():
            for p, q in zip(twin.parameters(), params, strict=True):
                p.copy_(q.full_tensor())
        grads = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
        for p, g in zip(params, grads, strict=True):
            # a gradient that is whole everywhere is cut as its parameter is
            p.grad = distribute_tensor(g, mesh, [Replicate()] * mesh.ndim)
        optimizer.step()
        reports.append(optimizer.projection_report())
    return [p.full_tensor().detach() for p in params], reports, None


WAYS = {
    "ddp": ddp,
    "fully_shard": fsdp,
    "cut inside rows": lambda *a: given(lambda p: [Shard(p.dim() - 1)], (2,), *a),
    "replicas of cut rows": lambda *a: given(lambda p: [Shard(0), Replicate()], (2, 1), *a),
    "cut twice": lambda *a: given(lambda p: [Shard(0), Shard(p.dim() - 1)], (1, 2), *a),
}


def _rank(rank):
    x, y = data()
    found = {(way, name): WAYS[way](rank, make, x, y) for way in WAYS for name, make in MAKE.items()}
    p = distribute_tensor(torch.zeros(2, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(TypeError, match="must be spread as well"):
        here(torch.zeros(2, 2), p)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_take_the_steps_of_one_with_the_whole_batch(ranks, way, name):
    wanted, reports, rates = train(net(), MAKE[name], *data())
    assert {kind for report in reports for kind in report.values()} == {"none", "channel", "layer"}
    for params, seen, steps in (rank[way, name] for rank in ranks):
        assert seen == reports
        for a, b in zip(params, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert steps is None or steps == pytest.approx(rates, rel=1e-9)
