"""What only a trained network can show; two small ones, each trained once."""

import math

import pytest
import torch

from headway.tabular import PFN, BarDistribution, FunctionPrior, GaussianHead, GPPrior, train_pfn

pytestmark = pytest.mark.slow
PRIOR = GPPrior(noise=0.05)


def draw(prior, batch, n, seed):
    x, y = prior(batch, n + 1, 1, torch.Generator().manual_seed(seed))
    return x[:, :n], y[:, :n], x[:, n:], y[:, n:]


@pytest.fixture(scope="module")
def gp():
    torch.manual_seed(0)
    model = PFN(1, BarDistribution(torch.linspace(-4.3, 4.3, 121)), 32, 2, 2)
    train_pfn(model, PRIOR, 1000, 64, 10, 4e-3)
    return model.eval()


@torch.no_grad()
def test_with_no_context_the_prediction_is_the_prior():
    torch.manual_seed(0)
    model = PFN(1, BarDistribution(torch.linspace(-4, 4, 61)), 32, 1, 2)
    with torch.enable_grad():
        train_pfn(model, PRIOR, 500, 256, 2, 4e-3)
    # KL(N(0, amplitude + noise), q) by quadrature
    scale = math.sqrt(1.05)
    y = torch.linspace(-6, 6, 20_001, dtype=torch.float64) * scale
    density = torch.exp(-0.5 * (y / scale) ** 2) / scale / math.sqrt(2 * math.pi)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 1.05)
    for place in (0.1, 0.5, 0.9):
        out = model(torch.empty(1, 0, 1), torch.empty(1, 0), torch.full((1, 1, 1), place))[0].double()
        assert 0 <= torch.trapezoid(density * model.head.nll(out, y), y).item() - entropy < 0.01


@torch.no_grad()
def test_the_probability_integral_transform_of_2000_tasks_is_uniform(gp):
    x, y, q, target = draw(PRIOR, 2000, 6, 77)
    u = gp.head.cdf(gp(x, y, q), target).flatten().sort().values
    distance = (u - (torch.arange(2000) + 0.5) / 2000).abs().max() + 0.5 / 2000
    # the 0.99 quantile of the Kolmogorov-Smirnov distance
    assert distance < 1.628 / math.sqrt(2000)


@torch.no_grad()
def test_the_gp_posterior_is_approached_and_far_better_than_the_prior(gp):
    for n in (1, 6):
        x, y, q, target = draw(PRIOR, 2000, n, 5)
        mean, variance = PRIOR.posterior(x, y, q)
        exact = 0.5 * ((target - mean).square() / variance + (2 * math.pi * variance).log()).mean()
        ours = gp.head.nll(gp(x, y, q), target).mean()
        assert -0.02 < ours - exact < 0.12 and ours < 1.44 - 0.4


@torch.no_grad()
def test_a_linear_gaussian_prior_gives_the_ridge_posterior():
    def linear(batch, N, F, generator):
        x = 2 * torch.rand(batch, N, F, generator=generator) - 1
        w = torch.randn(batch, F, 1, generator=generator)
        return x, (x @ w)[..., 0] + 0.5 * torch.randn(batch, N, generator=generator)

    prior = FunctionPrior(linear)
    torch.manual_seed(0)
    model = PFN(1, GaussianHead(), 32, 2)
    with torch.enable_grad():
        train_pfn(model, prior, 800, 128, 8, 3e-3)
    for n in (0, 1, 5):
        x, y, q, target = draw(prior, 4000, n, 7)
        precision = 1 + x.square().sum((1, 2)) / 0.25
        mean = q[..., 0] * ((x[..., 0] * y).sum(1) / 0.25 / precision)[:, None]
        variance = q[..., 0].square() / precision[:, None] + 0.25
        exact = 0.5 * ((target - mean).square() / variance + (2 * math.pi * variance).log())
        assert (model.head.nll(model(x, y, q), target) - exact).mean() < 0.02
