"""The claims of scaled long skips: verdicts that follow from the runs, and the runs they are made of."""

import math

import pytest

from headway.claims import scale_long
from headway.claims.scale_long import ARMS


def run(arm, seed=0, level=1.0, shake=0.2, gain=2.0, rate=4e-3, last=0.3):
    """A made-up run whose validation loss falls as level / step."""
    shaken = [math.exp(shake * (-1) ** k) for k in range(60)]
    return {
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "n": 6,
        "dim": 64,
        "losses": [*[1.0] * 50, *[last] * 10],
        "norms": shaken,
        "features": shaken,
        "curve": [level / k for k in range(1, 13)],
        "gain": gain,
        "every": 10,
        "finite": True,
    }


def test_the_random_networks_obey_their_laws():
    rows = scale_long.random_networks(3, width=64)
    assert scale_long.growth(rows).verdict == "holds"
    flat = [{**row, "growth": 4.0, "gain": 2.0} for row in rows]
    assert scale_long.growth(flat).verdict == "does not hold here"
    quiet, loud = ([run("none"), run("CS 0.7", gain=g), run("LS", gain=g)] for g in (1.0, 2.0))
    assert scale_long.noise(rows, quiet).verdict == "holds"
    assert scale_long.noise(rows, loud).verdict == "partly"
    assert scale_long.noise(flat, loud).verdict == "does not hold here"


def test_speed_is_told_by_the_steps_to_one_loss():
    assert scale_long.steps_to(0.5, run("none")) == 20 and scale_long.steps_to(2.0, run("none")) == 10
    assert scale_long.steps_to(0.75, run("none")) == 15 and scale_long.steps_to(0.01, run("none")) == math.inf

    def verdict(cs, ls):
        levels = {"none": 1.0, "CS 0.7": cs, "LS": ls}
        return scale_long.convergence([run(a, s, levels[a]) for a in levels for s in range(2)]).verdict

    assert verdict(0.5, 0.5) == "holds" and verdict(1.0, 0.5) == "partly" and verdict(1.0, 1.1) == "does not hold here"


def test_oscillation_is_told_by_the_swing_and_not_by_the_trend():
    assert scale_long.swing([math.exp(0.1 * k) for k in range(60)]) == pytest.approx(0, abs=1e-9)

    def verdict(cs, ls):
        return scale_long.oscillation([run("none"), run("CS 0.7", shake=cs), run("LS", shake=ls)]).verdict

    assert verdict(0.1, 0.1) == "holds" and verdict(0.2, 0.1) == "partly" and verdict(0.2, 0.3) == "does not hold here"


def test_stability_is_told_by_the_largest_rate_that_learns():
    def verdict(**highest):
        names = {"none": highest["none"], "CS 0.7": highest["cs"], "LS": highest["ls"]}
        runs = [
            run(name, rate=rate, last=0.3 if rate <= top else 1.1)
            for name, top in names.items()
            for rate in (0.01, 0.02, 0.04)
        ]
        return scale_long.stability(runs).verdict

    assert verdict(none=0.01, cs=0.02, ls=0.04) == "holds" and verdict(none=0.02, cs=0.02, ls=0.04) == "partly"
    assert verdict(none=0.04, cs=0.04, ls=0.04) == "does not hold here"
    assert verdict(none=0.0, cs=0.0, ls=0.0) == "does not hold here"


def test_every_arm_trains_and_reports_what_the_claims_are_made_of():
    for name in ARMS:
        row = scale_long.train(name, 0, 4e-3, 3, 2, dim=8, batch=4, every=2)
        assert row["finite"] and len(row["losses"]) == len(row["norms"]) == len(row["features"]) == 3
        assert len(row["curve"]) == 1 and row["gain"] > 0
