"""What the claims of UnifiedNorm and PowerNorm are measured with does what it says."""

from __future__ import annotations

import math

import torch
from torch import nn

from headway.claims.power_norm import gradient_gain
from headway.claims.token_norms import TokenBatchNorm, gaps, layer_cost, makers, train
from headway.claims.unified_norm import models, tokens
from headway.norms.power import PowerNorm
from headway.norms.unified import UnifiedNorm


def test_batch_norm_over_tokens_takes_every_token_for_a_sample():
    ours, theirs, x = TokenBatchNorm(4), nn.BatchNorm1d(4), torch.randn(3, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x.reshape(15, 4)).view(3, 5, 4))


def test_every_norm_trains_the_same_model_on_the_same_batches():
    runs = [train(name, make, 0, 2, depth=1, dim=16, batch_size=2) for name, make in makers(2).items()]
    assert [run.norm for run in runs] == ["LN", "BN", "PN", "UN", "none"]
    assert all(4 < run.loss < 8 for run in runs)
    heads = [run.model.head.weight.shape for run in runs]  # type: ignore[union-attr]
    assert len(set(heads)) == 1 and len(gaps(runs, "UN", "LN")) == 1
    again = train("LN", makers(2)["LN"], 0, 2, depth=1, dim=16, batch_size=2)
    assert again.loss == runs[0].loss


def test_gradient_is_bounded_by_the_running_statistic_and_not_by_the_batch():
    running = PowerNorm(16, warmup_iters=20, group_num=None, eps=1e-10)
    batch = PowerNorm(16, warmup_iters=20, group_num=None, eps=1e-10, grad_scale="batch")
    assert gradient_gain(running, 1e-3) < 2 and gradient_gain(batch, 1e-3) > 100


def test_folded_model_of_the_claim_has_no_norm_left():
    native, folded, bare = models(32)
    kinds = [{type(module).__name__ for module in model.modules()} for model in (native, folded, bare)]
    assert "NativeLayerNorm" in kinds[0] and not (kinds[1] | kinds[2]) & {"LayerNorm", "UnifiedNorm", "ChannelAffine"}
    with torch.no_grad():
        assert folded(tokens(1)).isfinite().all()


def test_cost_of_a_layer_is_judged_by_what_was_measured(monkeypatch):
    from headway.claims import token_norms
    from headway.measure import Paired

    monkeypatch.setattr(token_norms, "paired", lambda ours, theirs, budget: Paired(2.0, 1.0, 0.5, 0.5, 0.5, 1))
    monkeypatch.setattr(token_norms, "copy_bandwidth", lambda *_: 1e10)
    training, evaluation = layer_cost("unified-norm", {"UN": lambda c: UnifiedNorm(c)}, 2.5, 0.6, True)
    assert training.verdict == "holds" and evaluation.verdict == "does not hold here"
    assert all(math.isclose(row["training"], 2.0) for row in training.rows)
