"""Measuring: ratios of two calls taken in turn, and peaks of memory."""

import pytest
import torch

from headway import measure
from headway.measure import PeakMemory, paired


def grow(megabytes):
    torch.ones(megabytes << 18).sum()


@pytest.mark.parametrize("kernel", [True, False])
def test_peak_memory_is_what_was_held_at_most_though_it_is_free_again(monkeypatch, kernel):
    if not kernel:
        monkeypatch.setattr(measure, "_reset_kernel_peak", lambda: False)
    grow(4)
    with PeakMemory() as peak:
        for _ in range(5):
            grow(64)
    assert 60 << 20 < peak.bytes < 90 << 20


def test_an_earlier_peak_does_not_count_and_an_inner_measurement_hides_nothing_from_an_outer_one():
    grow(128)
    with PeakMemory() as outer:
        grow(64)
        with PeakMemory() as inner:
            grow(40)
    if not measure._reset_kernel_peak():
        pytest.skip("this system keeps no record of the peak")
    assert 60 << 20 < outer.bytes < 90 << 20 and 36 << 20 < inner.bytes < 60 << 20


def test_the_median_ratio_lies_between_its_quartiles():
    x = torch.randn(200, 200)
    pair = paired(lambda: x @ x, lambda: x @ x, seconds=0.2)
    assert pair.low <= pair.ratio <= pair.high and pair.rounds >= 7
