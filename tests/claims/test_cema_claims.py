"""Claims of cloud-edge adaptation: the baselines are what they say, and verdicts follow the numbers."""

import copy

import pytest
import torch

from headway.claims import cema, cema_costs, cema_streams
from headway.learning.cloud_edge.affine import travelling


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = cema_streams.network(4)
    for _ in range(3):
        net(torch.rand(32, 1, 8, 8))
    return net.eval()


@torch.no_grad()
def test_a_refreshed_network_takes_the_statistics_of_the_batch_and_the_source_stays(net):
    before, x = copy.deepcopy(net.state_dict()), torch.rand(32, 1, 8, 8) * 3
    logits = cema_streams.refreshed(net)(x)
    twin = copy.deepcopy(net)
    for i in (1, 4, 7):
        h = twin[:i](x)
        twin[i].running_mean, twin[i].running_var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(logits, twin(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits, net(x)) and logits.grad_fn is None
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_tent_predicts_before_it_learns_and_learns_affine_parameters_alone(net):
    before, x = copy.deepcopy(net.state_dict()), torch.rand(32, 1, 8, 8) * 3
    predict = cema_streams.tent(net, lr=0.1)
    first = predict(x)
    torch.testing.assert_close(first, cema_streams.refreshed(net)(x))
    for _ in range(20):
        last = predict(x)
    entropies = [-(z.softmax(1) * z.log_softmax(1)).sum(1).mean() for z in (first, last)]
    assert entropies[1] < entropies[0]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_streams_are_the_same_for_every_arm_and_shifted():
    a, b = cema_streams.stream("noise", 0, 3), cema_streams.stream("noise", 0, 3)
    assert all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(a, b, strict=True))
    clean = cema_streams.SHIFTS["blur"](torch.ones(1, 1, 8, 8), torch.Generator())
    assert clean[0, 0, 4, 4] == 1 and clean[0, 0, 0, 0] < 1


def row(shift, ours, rival, share=0.3):
    names = ("BN refresh", "Tent", "random uploads", "full upload", "none", "teacher")
    return {
        "shift": shift,
        "seed": 0,
        "samples": 64,
        "CEMA": ours,
        "CEMA: uploaded": share,
        **dict.fromkeys(names, rival),
    }


@pytest.mark.parametrize(
    ("ours", "rival", "share", "wanted"),
    [
        (0.8, 0.7, 0.3, ["holds", "holds", "holds"]),
        (0.7, 0.8, 0.3, ["does not hold here", "partly", "does not hold here"]),
        (0.8, 0.7, 0.5, ["holds", "partly", "holds"]),
    ],
)
def test_verdicts_follow_the_numbers(ours, rival, share, wanted):
    rows = [row(shift, ours, rival, share) for shift in cema_streams.SHIFTS]
    assert [make(rows).verdict for make in (cema._shifted, cema._few, cema._chance)] == wanted


def test_the_share_of_a_message_is_measured_on_what_was_sent():
    evidence = cema_costs.messages(True)
    net = cema_streams.network(48)
    values = sum(t.numel() * 4 for t in travelling(net).values())
    found = evidence.rows[1]
    assert values < found["update"] < values + 1500
    assert [r["share"] < 0.02 for r in evidence.rows].count(True) in (1, 2) and evidence.verdict == "partly"


def test_what_the_rule_does_to_frozen_statistics_is_told_where_it_was_measured():
    rows = [row(shift, 0.8, 0.7) for shift in cema.SHIFTS]
    assert cema._frozen(rows) == ""
    for one in rows:
        one |= {
            "CEMA, frozen": 0.5,
            "random uploads, frozen": 0.45,
            "CEMA, frozen: returns": 2,
            "random uploads, frozen: returns": 3,
        }
    told = cema._frozen(rows)
    assert "+5.0, +5.0 points" in told and "with 4 returns to the source after a collapse against 6" in told
