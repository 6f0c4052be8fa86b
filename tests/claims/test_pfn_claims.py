"""Claims of prior-data fitted networks: the baselines behind them are what they say."""

import math

import numpy as np
import pytest
import torch

from headway.claims import pfn, pfn_hyper, pfn_tables
from headway.claims.pfn_training import HYPER
from headway.tabular.pfn.priors import kernel_matrix


def test_the_chain_agrees_with_the_posterior_on_a_grid_of_hyper_parameters():
    x, y = HYPER(2, 9, 1, torch.Generator().manual_seed(0))
    args = (x[:, :8], y[:, :8], x[:, 8:])
    means, variances = pfn_hyper.hmc(*args, warmup=60, draws=120, leapfrogs=5)
    # the same posterior by brute force
    axes = [torch.linspace(math.log(low), math.log(high), 24, dtype=torch.float64) for low, high in
            ((0.05, 4.0), (0.3, 90.0), (0.004, 0.6))]  # fmt: skip
    theta = torch.cartesian_prod(*axes)
    for i in range(2):
        a, b, c = (part[i : i + 1].double().expand(len(theta), *part.shape[1:]) for part in args)
        length, scale, noise = theta.exp()[..., None, None].unbind(1)
        K = scale * kernel_matrix("matern52", a, a, length) + noise * torch.eye(8, dtype=torch.float64)
        L = torch.linalg.cholesky(K)
        white = torch.linalg.solve_triangular(L, b[..., None], upper=False)
        gammas = torch.tensor([HYPER.length_scale, HYPER.output_scale, HYPER.noise], dtype=torch.float64)
        log_p = -0.5 * white.square().sum((1, 2)) - L.diagonal(dim1=1, dim2=2).log().sum(1)
        weight = (log_p + (gammas[:, 0] * theta - gammas[:, 1] * theta.exp()).sum(1)).softmax(0)
        cross = scale * kernel_matrix("matern52", a, c, length)
        solved = torch.linalg.solve_triangular(L, cross, upper=False)
        mean = (solved.mT @ white)[:, 0, 0]
        total = scale[:, 0, 0] + noise[:, 0, 0] - solved.square().sum((1, 2))
        wanted = (weight * mean).sum()
        spread = (weight * (total + (mean - wanted) ** 2)).sum().sqrt()
        assert abs(means[:, i, 0].mean() - wanted) < 0.3 * spread
        ours = (variances[:, i, 0] + (means[:, i, 0] - means[:, i, 0].mean()) ** 2).mean().sqrt()
        assert ours.item() == pytest.approx(spread.item(), rel=0.3)


def test_the_calibration_error_of_honest_and_of_boastful_probabilities():
    draw = np.random.default_rng(0)
    p = draw.uniform(size=20_000)
    y = (draw.uniform(size=20_000) < p).astype(int)
    assert pfn_tables.calibration_error(p, y) < 0.02
    assert pfn_tables.calibration_error((p > 0.5).astype(float), y) == pytest.approx(0.25, abs=0.02)


def test_half_normal_tails_on_bars_of_equal_mass_cost_what_the_claim_says():
    assert 0.02 < pfn.tail_cost(100) < 0.05 and pfn.tail_cost(1000) < 0.004
