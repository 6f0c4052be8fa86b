"""Claims of self-normalizing networks and of the weight compander: the runs behind them, and verdicts that follow from them."""

import torch

from headway.claims import self_normalizing, weight_compander
from headway.claims.weight_compander import HARD, MILD, NONE


def test_the_fixed_point_and_the_variance_are_measured():
    assert self_normalizing._attraction().verdict == "holds"
    assert self_normalizing._variance(1).verdict == "holds"


def test_every_feed_forward_peer_trains():
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    for kind in self_normalizing.FEED_FORWARD:
        net = self_normalizing._plain(kind, 5, 3, 3, 16, dropout=0.05)
        before = [p.detach().clone() for p in net.parameters()]
        self_normalizing._fit(net, x, y, 0.1, 3, 32, 0)
        assert 0 <= self_normalizing._accuracy(net, x, y) <= 1 and not net.training
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_run_of_the_compander_reports_what_the_claims_are_made_of():
    rows = [
        weight_compander.run(arm, 0, 0.3, epochs=2)
        for arm in (NONE, HARD, weight_compander.with_compander(weight_compander.DECAY))
    ]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and len(row["without_largest"]) == len(row["without_random"]) == 5
        assert row["largest"] > 1 and 0 < row["effective"] < 1
    assert rows[1]["largest"] < rows[0]["largest"]


def made_up(arm, seed, accuracy, largest=4.0, after=0.5):
    spread = {
        "near_zero": largest / 100,
        "effective": 0.5,
        "without_largest": [after] * 5,
        "without_random": [after] * 5,
    }
    return {
        "arm": arm.name,
        "seed": seed,
        "noise": 0.3,
        "accuracy": accuracy + seed * accuracy / 100,
        "largest": largest,
        **spread,
    }


def test_verdicts_of_the_compander_follow_from_the_runs():
    arms = (NONE, weight_compander.DECAY, MILD, HARD)
    good = ((0.7, 4, 0.3), (0.72, 4, 0.3), (0.75, 3, 0.5), (0.8, 2, 0.7))
    bad = ((0.8, 2, 0.7), (0.82, 2, 0.7), (0.75, 3, 0.3), (0.7, 4, 0.1))
    better, worse = (
        [made_up(arm, seed, *numbers) for seed in range(3) for arm, numbers in zip(arms, which, strict=True)]
        for which in (good, bad)
    )
    for judge in ("_generalisation", "_clean", "_histogram", "_removal"):
        assert getattr(weight_compander, judge)(better).verdict == "holds", judge
        assert getattr(weight_compander, judge)(worse).verdict == "does not hold here", judge
