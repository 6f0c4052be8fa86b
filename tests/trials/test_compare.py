import json
import math
import statistics

import pytest
import torch

from headway.surgery import NothingToChange
from headway.trials.compare import compare
from headway.trials.comparison import Comparison, step_seconds, with_spread
from headway.trials.store import Store, StoreError


@pytest.fixture(scope="module")
def finished(children, tmp_path_factory):
    store = tmp_path_factory.mktemp("compare") / "store.sqlite"
    return children.run(store, checkpoint_every=1e9, probe=True)


def test_a_comparison_holds_a_row_an_arm_with_mean_and_spread_over_seeds(finished):
    baseline, batch = finished.rows
    values = [finished.curves("baseline", seed)["metrics"]["loss"]["values"][-1] for seed in (0, 1)]
    assert list(baseline.values.values()) == values
    assert baseline.mean == statistics.fmean(values) and baseline.spread == statistics.stdev(values)
    assert baseline.step_ratio == 1.0 and batch.step_ratio > 0
    assert baseline.changes == [] and baseline.changed() == ""
    assert [change["name"] for change in batch.changes] == ["1"]
    assert batch.changed() == "1 x LayerNorm -> BatchNorm1d"
    assert sum(row.best for row in finished.rows) == 1


def test_training_lowers_the_loss(finished):
    losses = finished.curves("baseline", 0)["loss"]
    assert statistics.fmean(losses[-5:]) < statistics.fmean(losses[:5])


def test_every_run_holds_its_facts(finished):
    facts = finished.facts["batch"][1]
    assert facts["parameters"] == 6 * 16 + 16 + 32 + 16 * 8 + 8 + 9
    assert facts["plan"]["changes"][0]["technique"] == "WithBatchNorm"
    assert facts["steps"] == 30
    assert facts["peak_memory"] >= 0 and "training steps 3-8" in facts["peak_memory_method"]
    assert facts["machine"]["cores"] >= 1 and facts["versions"]["torch"] == torch.__version__


def test_the_signal_is_probed_at_start_and_end(finished):
    pytest.importorskip("headway.signals.probe")
    flow = finished.flows["baseline"][0]
    assert list(flow) == ["start", "end"]
    assert "note" not in flow["start"] and "note" not in flow["end"], flow
    assert flow["start"] != flow["end"]


def test_everything_is_plain_data(finished):
    data = json.loads(json.dumps(finished.to_dict(), allow_nan=False))
    assert data["task"]["name"] == "tiny" and data["arms"] == ["baseline", "batch"] and data["finished"]
    assert len(data["curves"]["batch"]["1"]["loss"]) == 30
    assert data["rows"][0]["values"] == {str(seed): value for seed, value in finished.rows[0].values.items()}


def test_the_table_shows_arms_means_and_changes(finished):
    text = str(finished)
    assert "tiny: 30 steps, batch 12, fp32" in text and "LayerNorm -> BatchNorm1d" in text and "±" in text
    page = finished._repr_html_()
    assert page.count("<tr>") == 3 and "LayerNorm -&gt; BatchNorm1d" in page


def test_a_finished_comparison_is_never_run_again_and_its_runs_serve_another(children, finished):
    store = finished.data["store"]
    again = children.run(store, checkpoint_every=1e9, probe=True)
    assert again.curves("batch", 1) == finished.curves("batch", 1)
    compare(children.Tiny(), ["baseline"], seeds=3, store=store, progress=False, probe=False, device="cpu")
    attempts = [run["attempts"] for run in Store(store).comparison(1)["runs"]]
    assert attempts == [1, 1, 1, 1]
    assert Comparison.load(store).seeds == [0, 1, 2]
    assert Comparison.load(store, 1).arms == ["baseline", "batch"]


def test_probing_and_checkpoints_do_not_touch_the_curve(children, finished, tmp_path):
    plain = children.run(tmp_path / "plain.sqlite", checkpoint_every=0.0, probe=False)
    for arm in plain.arms:
        assert plain.curves(arm, 0)["loss"] == finished.curves(arm, 0)["loss"]


def test_a_time_budget_stops_after_that_much_training(children, tmp_path):
    task = children.Tiny(pause=0.01)
    found = compare(task, ["baseline"], 1, "0.3s", store=tmp_path / "s", progress=False, probe=False, device="cpu")
    seconds = found.curves("baseline", 0)["seconds"]
    assert seconds[-2] < 0.3 <= seconds[-1]
    assert found.rows[0].mean is not None


def test_bf16_trains_under_autocast(children, tmp_path):
    found = compare(
        children.Tiny(),
        ["baseline"],
        1,
        5,
        precision="bf16",
        store=tmp_path / "s",
        progress=False,
        probe=False,
        device="cpu",
    )
    exact = compare(
        children.Tiny(), ["baseline"], 1, 5, store=tmp_path / "s", progress=False, probe=False, device="cpu"
    )
    rounded, full = found.curves("baseline", 0)["loss"], exact.curves("baseline", 0)["loss"]
    assert rounded != full
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(full), rtol=0.05, atol=0.05)


def test_an_arm_that_fits_nothing_is_refused_before_anything_runs(children, tmp_path):
    with pytest.raises(NothingToChange):
        compare(
            children.Tiny(), ["baseline", [children.WithBatchNorm(), children.WithBatchNorm()]], store=tmp_path / "s"
        )
    assert not (tmp_path / "s").exists()


def test_a_failing_arm_leaves_the_others_and_says_why(children, tmp_path):
    arms = {"baseline": "baseline", "broken": children.Breaks()}
    found = compare(children.Tiny(), arms, 1, 5, store=tmp_path / "s", progress=False, probe=False, device="cpu")
    assert found.rows[0].mean is not None and found.rows[1].mean is None
    assert "1 failed (RuntimeError" in str(found.table().columns[-1]._cells[1])
    with pytest.raises(RuntimeError, match="every run failed"):
        compare(
            children.Tiny(), [children.Breaks()], 1, 5, store=tmp_path / "t", progress=False, probe=False, device="cpu"
        )


def test_a_loss_that_is_not_finite_is_reported_as_diverged(children, tmp_path, monkeypatch):
    monkeypatch.setattr(children.Tiny, "learning_rate", math.inf)
    found = compare(
        children.Tiny(), ["baseline"], 1, 9, store=tmp_path / "s", progress=False, probe=False, device="cpu"
    )
    assert found.rows[0].diverged == 1 and found.rows[0].mean is None
    assert "1 diverged" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"precision": "fp8"}, '"fp32" or "bf16"'), ({"engine": "slurm"}, '"local" or "ray"'), ({"seeds": 0}, "seeds is how many"),
     ({"batch_size": -1}, "batch_size is a whole number"), ({"seeds": [1, 1]}, "each once")],
)  # fmt: skip
def test_bad_options_are_met_at_the_door(children, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare(children.Tiny(), ["baseline"], **{"store": tmp_path / "s", **options})
    assert not (tmp_path / "s").exists()


def test_the_command_that_repeats_a_comparison_is_kept(tmp_path):
    found = compare(
        "digits(depth=1, width=8)", "baseline", 1, 3, store=tmp_path / "s", progress=False, probe=False, device="cpu"
    )
    start = "headway compare 'digits(depth=1, width=8)' --arms baseline --seeds 1 --budget '3 steps' --store "
    assert found.command == start + str(tmp_path / "s")


def test_loading_what_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        Comparison.load(tmp_path / "nothing.sqlite")


def test_step_time_is_the_median_without_the_first_steps():
    steps = [5.0] * 10 + [1.0, 3.0, 2.0]
    points = [(index + 1, sum(steps[: index + 1]), 0.0, None) for index in range(len(steps))]
    assert step_seconds(points) == pytest.approx(2.0)
    assert step_seconds([]) is None


def test_numbers_carry_as_many_digits_as_their_spread_bears():
    assert with_spread(1.23456, 0.0123) == "1.235 ± 0.012"
    assert with_spread(97.5, 1.5) == "97.5 ± 1.5"
    assert with_spread(None, None) == "-"


def test_what_changed_is_told_by_the_setting_that_differs():
    from headway.trials.comparison import _change

    assert _change("TransformerBlock(placement='pre')", "TransformerBlock(placement='peri')") == (
        "TransformerBlock(placement='pre' -> 'peri')"
    )
    assert _change("LayerNorm((8,), eps=1e-05)", "LayerNorm((8,), bias=True)") == "LayerNorm -> LayerNorm"
    assert _change("LayerNorm((8,), eps=1e-05)", "RMSNorm((8,), eps=1e-05)") == "LayerNorm -> RMSNorm"
    assert _change("ReLU", "SELU()") == "ReLU -> SELU"
