"""The claims of Batch-Channel Normalization and AdaB2N: a short run behind them, and verdicts that follow from made-up runs."""

import pytest

from headway.claims import batch_channel_norm as bcn


def rows(errors, dead=None, images=900):
    """Two seeds, half a point around each error."""
    found = []
    for (arm, batch), (error, spread) in errors.items():
        run = {"arm": arm, "batch": batch, "images": images, "dead": (dead or {}).get(arm, 0)}
        found += [{**run, "seed": seed, "error": error + spread * (seed - 0.5)} for seed in range(2)]
    return found


def test_a_run_reports_what_the_claims_are_made_of():
    row = bcn.train("bcn+ws", 2, 8, 0)
    assert row["arm"] == "bcn+ws" and row["images"] == 8 and 0 <= row["error"] <= 100 and 0 <= row["dead"] <= 1


@pytest.mark.parametrize(
    "micro, plain, wanted",
    [(1.9, 9.0, "holds"), (2.6, 9.0, "partly"), (2.6, 1.5, "does not hold here"), (1.0, 1.9, "partly")],
)
def test_micro_batches_are_held_against_batch_norm_with_large_batches(micro, plain, wanted):
    errors = {("bn", 64): (1.0, 0), ("bn", 2): (plain, 0), ("bn", 1): (plain, 0)}
    errors |= {("bcn+ws", 1): (micro, 0), ("bcn+ws", 2): (micro, 0)}
    evidence = bcn.reaches(rows(errors))
    assert evidence.verdict == wanted and f"{micro - 1:+.1f}" in evidence.why


@pytest.mark.parametrize("ours, spread, wanted", [(10, 0.2, "holds"), (10, 3, "partly"), (20, 3, "does not hold here")])
def test_the_lead_of_standardised_weights_is_half_the_error_and_the_least_spread(ours, spread, wanted):
    errors = {("gn", 1): (28, 2), ("gn+ws", 1): (ours, 1), ("bcn", 1): (18, 1), ("bcn+ws", 1): (11, spread)}
    assert bcn.early_lead(rows(errors)).verdict == wanted
    one_seed = [row for row in rows(errors) if row["seed"] == 0]
    assert bcn.early_lead(one_seed).verdict == ("partly" if ours == 10 else "does not hold here")


NO = "does not hold here"


@pytest.mark.parametrize("gn, ours, wanted", [(0.1, 0.04, "holds"), (0.1, 0.08, "partly"), (0.1, 0.1, NO), (0, 0, NO)])
def test_eliminated_channels_are_counted_against_group_norm(gn, ours, wanted):
    runs = rows({("gn", 1): (5, 0), ("bcn", 1): (5, 0)}, {"gn": gn, "bcn": ours})
    assert bcn.eliminated(runs).verdict == wanted
