"""The claims of EvoNorm that need no clock: what is kept for backward, and that the verdict follows the number."""

import torch
from torch import nn

from headway.claims import evo_norm


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


def test_large_batches_are_judged_by_the_better_group_norm(monkeypatch):
    errors = {"BN-ReLU": 1.0, "GN-ReLU": 9.0, "GN-SiLU": 4.0, "S0": 3.0, "B0": 5.0}
    rows = [{"layer": name, "seed": 0, "error": error} for name, error in errors.items()]
    monkeypatch.setattr(evo_norm, "_errors", lambda *_: rows)
    assert evo_norm._large(True).verdict == "partly"
    assert evo_norm._small(True).verdict == "partly"
