"""Hyper-priors: a prior-data fitted network beside a Gaussian process that is fitted (MLE-II), and one that is sampled (HMC)."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
import torch
from torch import Tensor

from headway.claims.evidence import Evidence, verdict
from headway.claims.pfn_training import HYPER, KEY, normal_nll, seconds, seeded, trained
from headway.tabular.pfn.bars import BarDistribution
from headway.tabular.pfn.priors import kernel_matrix


def fit_gp(x: np.ndarray, y: np.ndarray, x_q: np.ndarray, restarts: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0, (1e-3, 1e4)) * Matern([1.0] * x.shape[1], (1e-2, 1e2), 2.5) + WhiteKernel(
        0.1, (1e-5, 1e2)
    )
    gp = GaussianProcessRegressor(kernel, n_restarts_optimizer=restarts, random_state=0).fit(x, y)
    mean, std = gp.predict(x_q, return_std=True)  # type: ignore[misc]
    return np.asarray(mean), np.square(std)


def hmc(x: Tensor, y: Tensor, x_q: Tensor, warmup: int, draws: int, leapfrogs: int = 10) -> tuple[Tensor, Tensor]:
    """Means and variances (draws, B, m) of the predictive under hyper-parameters drawn by Hamiltonian Monte Carlo from their
    posterior under ``HYPER``: one chain a data set, all of a batch together, step sizes adapted to 80 % acceptance while warming up."""
    x, y, x_q, g = x.double(), y.double(), x_q.double(), seeded(0)
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    gammas = torch.tensor([HYPER.length_scale, HYPER.output_scale, HYPER.noise], dtype=torch.float64)

    def factor(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length, scale, noise = theta.exp()[..., None, None].unbind(1)
        K = scale * kernel_matrix("matern52", x, x, length) + (noise + 1e-8) * eye
        return torch.linalg.cholesky_ex(K)[0], length, scale

    def log_density(theta: Tensor) -> Tensor:
        L = factor(theta)[0]
        white = torch.linalg.solve_triangular(L, y[..., None], upper=False)
        fit = -0.5 * white.square().sum((1, 2)) - L.diagonal(dim1=1, dim2=2).log().sum(1)
        # a Gamma density times the Jacobian of the exponential
        return fit + (gammas[:, 0] * theta - gammas[:, 1] * theta.exp()).sum(1)

    def slope(theta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = theta.detach().requires_grad_()
            value = log_density(at)
            (gradient,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)

    theta = (gammas[:, 0] / gammas[:, 1]).log().expand(len(x), 3).clone()
    epsilon = torch.full((len(x), 1), 0.1, dtype=torch.float64)
    value, gradient = slope(theta)
    means, variances = [], []
    for step in range(warmup + draws):
        momentum = torch.randn(theta.shape, dtype=torch.float64, generator=g)
        new, p, g_new, v_new = theta, momentum, gradient, value
        for _ in range(leapfrogs):
            p = p + 0.5 * epsilon * g_new
            new = (new + epsilon * p).clamp(-12, 12)
            v_new, g_new = slope(new)
            p = p + 0.5 * epsilon * g_new
        ratio = v_new - value - 0.5 * (p.square() - momentum.square()).sum(1)
        chance = ratio.nan_to_num(-1e9).clamp(max=0).exp()
        taken = torch.rand(len(x), dtype=torch.float64, generator=g) < chance
        theta, gradient = (torch.where(taken[:, None], a, b) for a, b in ((new, theta), (g_new, gradient)))
        value = torch.where(taken, v_new, value)
        if step < warmup:
            epsilon = (epsilon * (0.1 * (chance[:, None] - 0.8)).exp()).clamp(1e-3, 1.0)
            continue
        L, length, scale = factor(theta)
        cross = scale * kernel_matrix("matern52", x, x_q, length)
        solved = torch.linalg.solve_triangular(L, cross, upper=False)
        white = torch.linalg.solve_triangular(L, y[..., None], upper=False)
        means.append((solved.mT @ white)[..., 0])
        variances.append((scale[..., 0] + theta[:, 2:].exp() - solved.square().sum(1)).clamp(min=1e-10))
    return torch.stack(means), torch.stack(variances)


@torch.no_grad()
def hyper(quick: bool) -> list[Evidence]:
    n, m, features = 50, 10, 5
    steps, batch = (60, 16) if quick else (2000, 32)
    samples = torch.cat([HYPER(10_000, 1, 1, seeded(1000 + i))[1] for i in range(10)])
    borders, shape = BarDistribution.from_samples(samples, 500).borders, (48, 2) if quick else (64, 4)
    model, training = trained(HYPER, features, borders, shape, steps, batch, n + 1, 30, 3e-3)
    x, y = HYPER(64, n + m, features, seeded(3))
    x_ctx, y_ctx, x_q, y_q = x[:, :n], y[:, :n], x[:, n:], y[:, n:]
    one = (x_ctx[:1], y_ctx[:1], x_q[:1])
    for warm in ((x_ctx, y_ctx, x_q), one):
        model(*warm)
    batched = statistics.median(seconds(lambda: model(x_ctx, y_ctx, x_q)) for _ in range(9)) / 64
    single = statistics.median(seconds(lambda: model(*one)) for _ in range(25))
    count, restarts = (3, 4) if quick else (24, 4)
    times, theirs = [], []
    for i in range(count):
        a, b, c = (part[i].double().numpy() for part in (x_ctx, y_ctx, x_q))
        start = time.perf_counter()
        mean, variance = fit_gp(a, b, c, restarts)
        times.append(time.perf_counter() - start)
        theirs.append(normal_nll(y_q[i].double(), torch.from_numpy(mean), torch.from_numpy(variance)).mean())
    ours = model.head.nll(model(x_ctx, y_ctx, x_q), y_q).mean(1)
    fitted, nll, theirs_nll = statistics.median(times), float(ours[:count].mean()), float(torch.stack(theirs).mean())
    ratios = {"batched": fitted / batched, "single": fitted / single}
    pays = math.ceil(training / max(fitted - single, 1e-9))
    good = [ratios["batched"] >= 200, ratios["single"] >= 20, nll <= theirs_nll]
    mle = Evidence(
        KEY, "inference is more than 200 times faster than fitting a GP's hyper-parameters, at a better NLL", "200 times; NLL better",
        f"{ratios['batched']:.0f} times batched (64 data sets at once), {ratios['single']:.0f} times one at a time; "
        f"NLL {nll:.3f} against {theirs_nll:.3f}",
        f"scikit-learn's GaussianProcessRegressor, ARD Matern 5/2, {restarts} restarts, one thread each; n = {n}, 5-D, {m} queries",
        verdict(good),
        f"asked: 200 batched, 20 single, NLL no higher ({count} data sets); trained on {steps * batch:,} data sets in {training:.0f} s, "
        f"which pays back after {pays} data sets",
        rows=[{"fit_ms": 1e3 * fitted, "batched_ms": 1e3 * batched, "single_ms": 1e3 * single, "nll": nll, "mle_nll": theirs_nll,
               "training_s": training, "break_even": pays, **ratios}],
    )  # fmt: skip
    chains, warmup, draws = (4, 16, 16) if quick else (16, 256, 256)
    start = time.perf_counter()
    means, variances = hmc(x_ctx[:chains], y_ctx[:chains], x_q[:chains], warmup, draws)
    sampled = (time.perf_counter() - start) / chains
    pooled = -torch.logsumexp(-normal_nll(y_q[:chains].double(), means, variances), 0) + math.log(draws)
    nll, theirs_nll = float(ours[:chains].mean()), float(pooled.mean())
    same = [part[:chains] for part in (x_ctx, y_ctx, x_q)]
    ratio = sampled / (statistics.median(seconds(lambda: model(*same)) for _ in range(9)) / chains)
    good = [ratio >= 1000, nll <= theirs_nll]
    return [mle, Evidence(
        KEY, "inference is 1,000 to 8,000 times faster than Monte Carlo over the hyper-parameters, at equal or better NLL",
        "1,000 to 8,000 times",
        f"{ratio:.0f} times; NLL {nll:.3f} against {theirs_nll:.3f}",
        f"Hamiltonian Monte Carlo of ours under the same prior, {warmup} + {draws} steps of 10 leapfrogs, "
        f"{chains} data sets at once on both sides",
        verdict(good),
        f"asked: 1,000 and an NLL no higher; the chain is exact up to its own noise, the network had {steps * batch:,} data sets",
        rows=[{"ratio": ratio, "hmc_s": sampled, "nll": nll, "hmc_nll": theirs_nll}],
    )]  # fmt: skip
