"""Claims of self-normalizing networks and of the weight compander: the runs behind them, and verdicts that follow from them."""

import torch

from headway.claims import self_normalizing, self_normalizing_depth, self_normalizing_nets, weight_compander
from headway.claims.weight_compander import HARD, MILD, NONE


def test_the_fixed_point_and_the_variance_are_measured():
    assert self_normalizing._attraction().verdict == "holds"
    assert self_normalizing._variance(1).verdict == "holds"


def test_every_feed_forward_peer_trains():
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    for kind in self_normalizing.FEED_FORWARD:
        net = self_normalizing_nets.plain(kind, 5, 3, 3, 16, dropout=0.05)
        before = [p.detach().clone() for p in net.parameters()]
        self_normalizing_nets.fit(net, x, y, 0.1, 3, 32, 0)
        assert 0 <= self_normalizing_nets.accuracy(net, x, y) <= 1 and not net.training
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def by_depth(**lost):
    """Nets that are right nine times in ten at depth 2 and lose so much of it by depth 32."""
    return [
        {
            "table": "digits",
            "net": kind,
            "depth": depth,
            "rate": 0.01,
            "seed": 0,
            "accuracy": 0.9 - lost[kind] * (depth > 2),
        }
        for kind in self_normalizing_depth.KINDS
        for depth in (2, 8, 32)
    ]


def test_depth_is_judged_by_the_lead_and_by_what_each_net_loses():
    deep, flat = self_normalizing_depth.deep, self_normalizing_depth.flat
    far = by_depth(SNN=0.01, ReLU=0.3, BatchNorm=0.5, LayerNorm=0.1)
    near = by_depth(SNN=0.05, ReLU=0.04, BatchNorm=0.3, LayerNorm=0.0)
    tuned = [
        {**far[0], "net": kind, "depth": 32, "accuracy": a}
        for kind, a in (("SNN", 0.95), ("ReLU", 0.96), ("BatchNorm", 0.9))
    ]
    assert deep(far, []).verdict == "holds" and "29.0 points of ReLU" in deep(far, []).why
    assert deep(far, tuned).verdict == "partly" and "ReLU 96.0%" in deep(far, tuned).measured
    assert deep(by_depth(SNN=0.1, ReLU=0.1, BatchNorm=0.1, LayerNorm=0.1), []).verdict == "does not hold here"
    layers = self_normalizing_depth.moments()
    assert flat(far, [], layers).verdict == "holds" and "SNN 90, 89, 89" in flat(far, [], layers).measured
    assert flat(near, [], layers).verdict == "partly"
    dead = [{**row, "variance": 0.1} for row in layers]
    assert flat(by_depth(SNN=0.2, ReLU=0.1, BatchNorm=0.1, LayerNorm=0.1), [], dead).verdict == "does not hold here"


def test_nets_and_the_classics_beside_them_are_measured_on_a_table():
    rows = self_normalizing_depth.runs("wine", ("SNN",), (2,), (0,))
    beside = self_normalizing_depth.classics(("wine",))
    assert all(0.5 < row["accuracy"] <= 1 for row in (*rows, *beside)) and len(beside) == 2


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
