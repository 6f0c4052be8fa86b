"""Claims of group-wise whitening and colouring: the ways of computing it agree, and verdicts follow from what was measured."""

import pytest
import torch

from headway.claims import gdwct
from headway.claims.gdwct import Step, Styles, judge_styles


@pytest.fixture(scope="module")
def step():
    return Step((2, 16, 9, 7), 4)


def test_the_released_form_and_the_whitened_one_are_what_they_say(step):
    ours, dense = step.outputs("grouped"), step.outputs("dense")
    torch.testing.assert_close(ours[0], dense[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], dense[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[2].transpose(0, 1).flatten(0, 1), dense[2], rtol=1e-5, atol=1e-6)  # released order
    flat = [step.outputs(side)[0].flatten() for side in ("product", "dense product", "dense oneDNN")]
    torch.testing.assert_close(flat[0], flat[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flat[0], flat[2], rtol=1e-4, atol=1e-4)
    assert step.error() < 1e-5
    y = Step((4, 8, 20, 20), 2)
    with torch.no_grad():
        y.K.copy_(torch.eye(4).expand_as(y.K))
        y.alpha.fill_(1)
        white = y.outputs("whiten")[0].view(4, 8, -1) - y.mu[..., None]
    pooled = white.transpose(0, 1).flatten(1).cov()
    torch.testing.assert_close(torch.block_diag(pooled[:4, :4], pooled[4:, 4:]), torch.eye(8), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["grouped", "dense", "exact", "whiten", "product", "dense product"])
def test_every_side_runs_with_and_without_its_backward_pass(step, side):
    step.run(side, False)()
    assert all(torch.isfinite(g).all() for g in step.run(side, True)())


def test_the_styles_of_the_experiment_are_reached_by_what_has_them():
    styles = Styles(0)
    roots = torch.linalg.cholesky(styles.cov)
    exact = roots @ torch.randn(8, 32, 40_000, generator=styles.draw) + styles.mean[..., None]
    cov, mean = styles.errors(exact.view(8, 32, 200, 200))
    assert cov.max() < 0.01 and mean.max() < 0.01
    values = torch.linalg.eigvalsh(styles.cov).clamp(min=0).sqrt()
    assert values.min() > 0.29 and values.max() < 2.01
    assert gdwct.match_styles(8, 0, 3) > 0


def test_the_verdict_on_styles_asks_for_a_fall_at_every_step():
    def rows(*errors):
        return [{"arm": str(i), "seed": s, "error": e} for i, e in enumerate(errors) for s in range(2)]

    assert judge_styles(rows(0.7, 0.6, 0.5), 1).verdict == "holds"
    mixed = judge_styles(rows(0.7, 0.8, 0.5), 1)
    assert mixed.verdict == "partly" and "1 of 2 steps go down; 1 (0.80) stays above 0 (0.70)" in mixed.why
    assert judge_styles(rows(0.5, 0.6, 0.7), 1).verdict == "does not hold here"


def test_a_block_that_is_not_faster_does_not_pass(monkeypatch):
    monkeypatch.setattr(gdwct, "SIZES", ((1, 16, 4, 4),))

    class Even:
        ratio, ours = 1.0, 1e-3

    monkeypatch.setattr(gdwct, "paired", lambda *_: Even)
    monkeypatch.setattr(gdwct, "copy_bandwidth", lambda *_: 1e9)
    assert gdwct._groups(True).verdict == "does not hold here"
    assert gdwct._exact(True).verdict == "partly"  # as fast as, but not twice as fast
    Even.ratio = 5.0
    assert gdwct._groups(True).verdict == gdwct._exact(True).verdict == "holds"
