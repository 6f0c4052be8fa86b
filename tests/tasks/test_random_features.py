"""Digits by random features: a comparison runs the norms against what they are held against."""

from __future__ import annotations

import pytest

import headway as hw
from headway.tasks.random_features import DigitsRandomFeatures
from headway.tasks.task import get

ARMS = [
    "baseline",
    "batchnorm-only",
    "batchnorm-only(include_output=True)",
    "headway.learning:OutputOnly",
    "headway.learning:RandomParametersOnly",
]


def test_every_arm_of_the_comparison_trains(tmp_path):
    table = hw.compare(
        "digits-random-features(depth=1, width=4)",
        ARMS,
        1,
        "3 steps",
        store=tmp_path / "runs.sqlite",
        evaluations=1,
        probe=False,
    )
    assert table.arms == ARMS and not table.failures and table.finished


def test_the_small_network_has_the_counts_of_the_setting():
    model = DigitsRandomFeatures().model(0)
    part = hw.learning.train_only_norm(model)
    assert (part.n_trainable, sum(p.numel() for p in model.parameters())) == (864, 89402)
    with pytest.raises(ValueError, match="at least 1"):
        get("digits-random-features", depth=0)
    rates = [DigitsRandomFeatures().rate(progress) for progress in (0.0, 0.49, 0.5, 0.75, 0.99)]
    assert rates == [1.0, 1.0, 0.1, 0.01, 0.01]
