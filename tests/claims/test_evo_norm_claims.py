"""The claims of EvoNorm that need no clock: what is kept for backward, and that the verdict follows the number."""

import torch
from torch import nn

from headway.claims import evo_norm
from headway.norms.evo_search import Candidate, SearchResult
from headway.tasks.digits import Digits


def test_memory_is_half_of_what_the_layers_replace():
    evidence = evo_norm._memory()
    assert evidence.verdict == "holds"
    shares = {row["layer"]: row["share"] for row in evidence.rows}
    assert shares["BN + SiLU"] > 1.9 and all(shares[name] < 1.02 for name in ("S0", "B0", "B1"))


def test_the_verdict_on_memory_follows_what_is_kept(monkeypatch):
    class Wasteful(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()

        def forward(self, x):
            return torch.sigmoid(x) * torch.tanh(x)

    monkeypatch.setattr(evo_norm, "EvoNorm2dS0", Wasteful)
    assert evo_norm._memory().verdict == "partly"


def rows(**errors: float) -> list[dict]:
    """One seed; names with - for _."""
    base = {"seed": 0, "rate": 1e-3, "batch": 2, "steps": 600}
    return [{**base, "layer": name.replace("_", "-"), "error": error} for name, error in errors.items()]


def test_small_and_large_batches_are_judged_by_the_better_group_norm():
    both = rows(BN_ReLU=8.0, GN_ReLU=9.0, GN_SiLU=6.0, S0=5.0, B0=5.0)
    assert evo_norm.small_batches(both).verdict == evo_norm.large_batches(both).verdict == "holds"
    one = rows(BN_ReLU=6.0, GN_ReLU=9.0, GN_SiLU=4.0, S0=5.0, B0=3.0)
    assert evo_norm.small_batches(one).verdict == evo_norm.large_batches(one).verdict == "partly"
    none = rows(BN_ReLU=1.0, GN_ReLU=9.0, GN_SiLU=4.0, S0=5.0, B0=5.0)
    assert evo_norm.small_batches(none).verdict == evo_norm.large_batches(none).verdict == "does not hold here"


def test_each_layer_is_trained_at_the_rate_that_is_best_without_the_test_digits(monkeypatch):
    chosen_on = evo_norm.validation()
    x, _, held_out, _ = Digits().data()
    parts = chosen_on.data()
    assert len(parts[0]) + len(parts[2]) == len(x) and torch.equal(torch.cat([parts[0], parts[2]]), x)
    best = {"BN-ReLU": 2e-3, "S0": 1e-3}

    def trained(make, seed, batch_size, steps, rate, task):
        name = next(name for name, each in evo_norm.LAYERS.items() if each is make)
        on_test = len(task.data()[2]) == len(held_out)
        # on the test digits the other rate would have been the better one
        return 10.0 + (rate == best[name]) if on_test else 10.0 - (rate == best[name])

    monkeypatch.setattr(evo_norm, "train", trained)
    found = evo_norm.compare(["BN-ReLU", "S0"], 32, 1, 2, (1e-3, 2e-3))
    assert [(r["layer"], r["seed"], r["rate"], r["error"]) for r in found] == [
        ("BN-ReLU", 0, 2e-3, 11.0), ("BN-ReLU", 1, 2e-3, 11.0), ("S0", 0, 1e-3, 11.0), ("S0", 1, 1e-3, 11.0)
    ]  # fmt: skip


def test_verdicts_of_the_search_follow_from_times_and_accuracies():
    assert evo_norm.rejection({"with": 1.0, "without": 3.0}, 4, 150).verdict == "holds"
    assert evo_norm.rejection({"with": 1.0, "without": 2.9}, 4, 150).verdict == "does not hold here"
    one = Candidate(0, "div(x, std_whg(x))", [["std_whg", [0]], ["div", [0, 4]]], scores=[0.9])
    found = SearchResult([one], [one], {})
    held = {"BN-ReLU": 95.0, "GN-ReLU": 90.0, "best found": 94.0, "median random survivor": 89.0}
    assert evo_norm.discovery(held, found, 300, 1.0).verdict == "holds"
    assert evo_norm.discovery({**held, "median random survivor": 90.0}, found, 300, 1.0).verdict == "partly"
    empty = SearchResult([], [], {"quality": 5})
    assert evo_norm.discovery({"BN-ReLU": 95.0}, empty, 300, 1.0).verdict == "does not hold here"
