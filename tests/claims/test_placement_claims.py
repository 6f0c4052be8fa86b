"""Claims of Peri-LN and Mix-LN: the training behind them, and that verdicts follow from what was measured."""

import math

import pytest

from headway.claims import byte_lm, mix_ln, peri_ln
from headway.claims.byte_lm import Run


@pytest.fixture(scope="module")
def short():
    return byte_lm.train(Run("mix", 1e-2, 0, 4, warmup=2, depth=4, layers=True))


def test_a_run_reports_what_the_claims_are_made_of(short):
    assert len(short["losses"]) == len(short["gradients"]) == 4 and not short["diverged"]
    assert short["losses"][-1] < short["losses"][0] and 0 < short["held_out"] < 6
    for moment in ("start", "end"):
        assert len(short[moment]["variance"]) == len(short[moment]["gradients"]) == 4
    assert short["largest"] >= max(math.sqrt(v) for v in short["start"]["variance"])
    assert all(0 < angle < 1 for angle in short["angles"]) and len(short["drops"]) == len(short["layer_gradients"]) == 4


def test_the_same_seed_sees_the_same_bytes_under_every_placement_and_in_a_worker(short):
    again, other = byte_lm.train_all(
        [Run("mix", 1e-2, 0, 4, warmup=2, depth=4, layers=True), Run("pre", 1e-2, 0, 1, depth=4)]
    )
    assert again["losses"] == pytest.approx(short["losses"], rel=1e-4) and again["placement"] == "mix"
    assert other["seed"] == 0 and other["losses"][0] == pytest.approx(short["losses"][0], abs=0.5)


def test_a_worker_that_fails_is_told():
    with pytest.raises(RuntimeError, match="ended without a result"):
        byte_lm.train_all([Run("nowhere", 1e-2, 0, 1)])


def test_bypassing_a_block_that_does_nothing_costs_nothing():
    import torch

    text = byte_lm.text_of("pydoc-topics")
    model = byte_lm.TransformerDecoder(256, 16, 3, 2, "pre", max_length=32)
    with torch.no_grad():
        for linear in (model.blocks[1].attention.out, model.blocks[1].mlp.down):
            linear.weight.zero_()
            linear.bias.zero_()
    found = byte_lm._layers(model, text, byte_lm.held_out(text, 4))
    assert found["angles"][1] < 1e-3 < found["angles"][0] and found["drops"][1] == 0 != found["drops"][0]


def made_up(placement, seed, rate=3e-2, **changes):
    line = [1.0 + i for i in range(12)]
    base = {
        "placement": placement,
        "rate": rate,
        "seed": seed,
        "steps": 40,
        "warmup": 20,
        "depth": 12,
        "diverged": False,
    }
    base |= {"losses": [3.0] * 40, "gradients": [1.0] * 40, "largest": 10.0, "held_out": 2.0}
    return base | {"start": {"variance": line}, "end": {"variance": line}} | changes


def test_balanced_growth_holds_for_lines_and_not_for_curves_or_equal_variance():
    peri, huge = [made_up("peri", seed) for seed in range(3)], {"variance": [1e3 * 2**i for i in range(12)]}
    pre = [made_up("pre", seed, end=huge, largest=1e3) for seed in range(3)]
    assert peri_ln._growth([*peri, *pre]).verdict == "holds" and peri_ln._range([*peri, *pre]).verdict == "holds"
    same = [made_up("pre", seed) for seed in range(3)]
    assert peri_ln._growth([*peri, *same]).verdict == "partly"
    assert peri_ln._range([*peri, *same]).verdict == "does not hold here"
    bent = [made_up("peri", seed, start=huge, end=huge) for seed in range(3)]
    assert peri_ln._growth([*bent, *same]).verdict == "does not hold here"


def test_steadiness_counts_spikes_and_the_area_under_the_curve():
    assert peri_ln.spikes([100.0] * 20 + [1.0] * 18 + [2.9, 3.1]) == 1
    assert peri_ln.spikes([1.0] * 39 + [math.nan]) == 1
    peri = [made_up("peri", seed) for seed in range(3)]
    worse = [made_up("pre", seed, losses=[3.5] * 40, gradients=[1.0] * 39 + [9.0]) for seed in range(3)]
    better = [made_up("pre", seed, losses=[2.5] * 40) for seed in range(3)]
    assert peri_ln._stability([*peri, *worse]).verdict == "holds"
    assert peri_ln._stability([*peri, *better]).verdict == "partly"


def test_a_lower_loss_must_stand_out_of_its_noise():
    assert peri_ln.compared([1.0, 1.1, 0.9], [1.5, 1.6, 1.4]) == "holds"
    assert peri_ln.compared([1.0, 1.5, 0.9], [1.2, 1.2, 1.2]) == "partly"
    assert peri_ln.compared([1.0], [2.0]) == "partly"
    assert peri_ln.compared([2.0, 2.1], [1.0, 1.1]) == "does not hold here"
    assert peri_ln.compared([math.inf, 1.0], [1.0, 1.0]) == "does not hold here"


def test_what_layers_do_is_judged_over_all_seeds():
    flat, steep = [1.0] * 12, [1.0 + i for i in range(12)]
    more = {"layer_gradients": flat, "angles": steep, "drops": steep}
    less = {"layer_gradients": steep, "angles": flat, "drops": flat}
    post = [made_up("post", seed, **less) for seed in range(2)]
    good = (
        [made_up("mix", seed, **more) for seed in range(2)] + [made_up("pre", seed, **less) for seed in range(2)] + post
    )
    bad = (
        [made_up("mix", seed, **less) for seed in range(2)] + [made_up("pre", seed, **more) for seed in range(2)] + post
    )
    assert mix_ln._even(good).verdict == "holds" and mix_ln._even(bad).verdict == "does not hold here"
    assert [e.verdict for e in mix_ln._deep(good)] == ["holds", "holds"]
    assert [e.verdict for e in mix_ln._deep(bad)] == ["does not hold here"] * 2
