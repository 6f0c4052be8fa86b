"""The claims of training only the norms that need no clock: what is kept, and that verdicts follow the numbers."""

from __future__ import annotations

import math

import pytest

from headway.claims import batchnorm_only as claims


def made_up(norm=(92.0, 91.0, 93.0), random=(35.0, 34.0, 40.0), output=49.0, whole=98.0):
    def row(mode, seed, accuracy):
        return {
            "mode": mode,
            "seed": seed,
            "accuracy": accuracy,
            "epochs": 30,
            "trainable": 864,
            "off": 0.02,
            "off_0.05": 0.1,
        }

    rows = [row("norm", i, a) for i, a in enumerate(norm)] + [row("random", i, a) for i, a in enumerate(random)]
    return [*rows, row("norm+output", 0, 95.0), row("output", 0, output), row("all", 0, whole)]


def test_memory_is_about_half_and_freezing_alone_saves_nothing():
    evidence = claims._memory()
    assert evidence.verdict == "holds"
    assert all(row["ratio"] <= 0.6 and row["frozen"] > 0.95 for row in evidence.rows)


def test_oracle_8_the_control_is_judged_by_the_least_gap_and_a_paired_t_test():
    assert claims._control(made_up()).verdict == "holds"
    assert claims._control(made_up(random=(35.0, 34.0, 80.0))).verdict == "does not hold here"
    assert claims._control(made_up(norm=(92.0,), random=(35.0,))).verdict == "partly"
    assert claims._control(made_up(norm=(35.0, 36.0), random=(92.0, 90.0))).verdict == "does not hold here"
    assert claims.p_value([57.0, 57.1, 52.0]) < 0.01 and math.isnan(claims.p_value([57.0]))


@pytest.mark.parametrize(
    ("norm", "output", "verdict"), [(92.0, 49.0, "holds"), (80.0, 49.0, "partly"), (60.0, 55.0, "does not hold here")]
)
def test_expressiveness_is_judged_by_accuracy_and_by_the_output_layer_alone(norm, output, verdict):
    assert claims._expressive(made_up((norm,), (30.0,), output)).verdict == verdict


def test_switched_off_features_are_judged_by_their_share_and_by_what_is_lost(monkeypatch):
    rows = [row | {"without": row["accuracy"]} for row in made_up()]
    monkeypatch.setattr(claims, "_trained", lambda *_: (None, None, rows[0]))
    monkeypatch.setattr(claims, "_switched_off", lambda *_: {})
    assert claims._disabled(rows).verdict == "partly"
    assert claims._disabled([row | {"off": 0.3} for row in rows]).verdict == "holds"
    assert claims._disabled([row | {"without": 50.0} for row in rows]).verdict == "does not hold here"


def test_growth_is_judged_step_by_step(monkeypatch):
    accuracy = {("norm", 1, 16): 40.0, ("random", 1, 16): 20.0, ("norm", 4, 4): 30.0}
    known = [row | {"depth": 4, "width": 16} for row in made_up()]

    def trained(mode, depth, width, epochs, seed):
        return None, None, {"mode": mode, "depth": depth, "width": width, "accuracy": accuracy[mode, depth, width]}

    monkeypatch.setattr(claims, "_trained", trained)
    assert claims._growth(True, known).verdict == "holds"
    accuracy["norm", 1, 16] = 95.0
    assert claims._growth(True, known).verdict == "partly"
