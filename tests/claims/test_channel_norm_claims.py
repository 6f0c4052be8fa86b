"""The claims of Batch-Channel Normalization and AdaB2N: a short run behind them, and verdicts that follow from made-up runs."""

import pytest
import torch

from headway.claims import ada_b2n
from headway.claims import batch_channel_norm as bcn
from headway.tasks.microbatch import DigitsMicroBatch


def rows(errors, dead=None, images=900):
    """Two seeds, half a point around each error."""
    found = []
    for (arm, batch), (error, spread) in errors.items():
        run = {
            "arm": arm,
            "batch": batch,
            "images": images,
            "dead": (dead or {}).get(arm, 0),
            "rate": 0.3,
            "net": "plain",
        }
        found += [{**run, "seed": seed, "error": error + spread * (seed - 0.5)} for seed in range(2)]
    return found


def test_a_run_reports_what_the_claims_are_made_of():
    row = bcn.train("bcn+ws", 2, 8, 0, 0.3, "residual")
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


def test_batch_norm_that_does_not_fail_with_small_batches_is_named():
    errors = {
        ("bn", 64): (1.0, 0),
        ("bn", 2): (1.5, 0),
        ("bn", 1): (9, 0),
        ("bcn+ws", 1): (1, 0),
        ("bcn+ws", 2): (1, 0),
    }
    evidence = bcn.reaches(rows(errors))
    assert evidence.verdict == "partly" and "does not fail with batch 2 here" in evidence.why


def test_each_arm_is_trained_at_the_rate_that_is_best_for_it_without_the_held_out_digits(monkeypatch):
    parts, whole = bcn.validation(2).data(), DigitsMicroBatch().data()
    assert len(parts[0]) + len(parts[2]) == len(whole[0]) and torch.equal(torch.cat([parts[0], parts[2]]), whole[0])
    best = {"bn": 0.8, "bcn+ws": 0.1}

    def trained(arm, batch, images, seed, rate, net, task=None):
        error = 10.0 + (rate == best[arm]) if task is None else 10.0 - (rate == best[arm])
        return {"arm": arm, "seed": seed, "rate": rate, "error": error, "images": images, "tried": task is not None}

    monkeypatch.setattr(bcn, "train", trained)
    found = bcn.compare([("bn", 64), ("bcn+ws", 1)], 100, 2, "plain", bcn.RATES, 30)
    assert [(r["arm"], r["rate"], r["images"], r["tried"]) for r in found] == [
        ("bn", 0.8, 100, False), ("bn", 0.8, 100, False), ("bcn+ws", 0.1, 100, False), ("bcn+ws", 0.1, 100, False)
    ]  # fmt: skip


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


def stream(passes=1, **accuracies):
    """Four paired seeds, whose gains over batch norm differ by a tenth of a point."""
    found = []
    for arm in ada_b2n.ARMS:
        base = accuracies.get(arm.replace(" ", "_"), 90.0)
        for seed in range(4):
            noise = 0.1 * (seed % 2) * (arm == "AdaB2N")
            row = {"arm": arm, "seed": seed, "passes": passes, "accuracy": base + seed + noise}
            found.append({**row, "first_task": base, "forgotten": 100 - base})
    return found


def test_adab2n_has_to_be_above_batch_norm_by_more_than_the_noise():
    better, same = stream(AdaB2N=91.0), stream(AdaB2N=89.99)  # the latter's gain is within two standard errors
    assert ada_b2n.gains(better).verdict == "holds"
    assert ada_b2n.gains(same).verdict == ada_b2n.gains(stream(AdaB2N=89.0)).verdict == NO
    both = ada_b2n.gains([*same, *stream(5, AdaB2N=91.0)])
    assert both.verdict == "partly" and "BN forgets 10.0 points, AdaB2N 9.0" in both.why
    one_seed = [row for row in better if row["seed"] == 0]
    assert ada_b2n.gains(one_seed).verdict == NO  # which says nothing of the noise


def test_adab2n_is_held_against_each_other_norm():
    assert ada_b2n.others(stream(AdaB2N=91.0)).verdict == "holds"
    mixed = ada_b2n.others(stream(AdaB2N=91.0, Continual_Norm=92.0))
    assert mixed.verdict == "partly" and "GN, LN, IN by" in mixed.why and "from Continual Norm" in mixed.why
    assert ada_b2n.others(stream(AdaB2N=89.99)).verdict == NO
    assert ada_b2n.others(stream(AdaB2N=80.0)).verdict == NO


def test_a_run_over_the_stream_tells_what_was_forgotten():
    row = ada_b2n.run("AdaB2N", 0)
    assert row["accuracy"] > 50 and row["passes"] == 1 and -100 <= row["forgotten"] <= 100
    assert row["forgotten"] + row["first_task"] > 50  # the first task had been learned when it ended


def test_the_balance_of_the_running_statistics_is_measured_and_judged():
    assert ada_b2n.balance(ada_b2n.errors()).verdict == "holds"
    rows = [{"tasks": 5, "kappa": k, "ratio": r, "expected": r} for k, r in ((0.7, 0.9), (0.4, 0.8), (0.0, 0.1))]
    assert ada_b2n.balance(rows).verdict == "holds"
    rows[2]["ratio"] = 0.2
    assert ada_b2n.balance(rows).verdict == "partly"
    rows[2]["ratio"] = 0.95
    assert ada_b2n.balance(rows).verdict == NO


def test_the_cost_of_adab2n_is_judged_size_by_size():
    row = {"shape": [2, 4, 3, 3], "training": 1.4, "with penalty": 1.6, "evaluation": 1.0, "us": 100.0}
    training, deployed = ada_b2n.cost([row, {**row, "training": 1.6, "evaluation": 1.1}])
    assert training.verdict == deployed.verdict == "partly"
    assert [each.verdict for each in ada_b2n.cost([row])] == ["holds", "holds"]
