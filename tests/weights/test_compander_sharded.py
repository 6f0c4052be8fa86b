"""A companded net that FSDP2 cuts over two processes trains as a whole one does."""

import pytest
import torch
import torch.nn.functional as F
from processes import two_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import headway as hw
from headway.weights import CompandWeights, param_groups

SETTINGS = [{}, {"learn": True}, {"learn": True, "granularity": "channel"}]


def net(settings):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return hw.apply(plain, CompandWeights(c=2, **settings))


def data():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
    return x, x[:, :3].argmax(1)


def train(model, part):
    """Outputs after four steps, and in evaluation after one more: the weight that was kept must not be an old one."""
    x, y = data()
    optimizer, found = torch.optim.SGD(param_groups(model, 0.1, ab_lr_factor=0.1), 0.1), []
    for steps in (4, 1):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found.append(model(x))
    return found


def _rank(rank):
    found = []
    for settings in SETTINGS:
        model = net(settings)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        found.append(train(model, slice(4 * rank, 4 * rank + 4)))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("i", range(len(SETTINGS)), ids=lambda i: str(SETTINGS[i]))
def test_a_sharded_net_under_companders_trains_as_a_whole_one(ranks, i):
    wanted = train(net(SETTINGS[i]), slice(None))
    assert (wanted[0] - wanted[1]).abs().max() > 1e-4
    for rank in ranks:
        for a, b in zip(rank[i], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
