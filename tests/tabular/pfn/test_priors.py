import copy
import math

import pytest
import torch
from sklearn.datasets import make_regression

from headway.tabular import PFN, BNNPrior, FunctionPrior, GaussianHead, GPHyperPrior, GPPrior, TabularPrior, train_pfn
from headway.tabular.pfn.priors import cholesky, kernel_matrix
from headway.tabular.pfn.training import Draws, center_encoders_, draw_context_size, learning_rate_factor


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_the_gp_samples_have_the_kernels_covariance(kernel):
    prior = GPPrior(kernel, 0.3, 2.0, 0.1)
    x, y = prior(40_000, 2, 1, generator())
    k = kernel_matrix(kernel, x.double(), x.double(), 0.3)[:, 0, 1]
    assert y.var().item() == pytest.approx(2.1, rel=0.03)
    # the product of two outcomes regressed on the correlation has the amplitude as its slope
    slope = ((y[:, 0] * y[:, 1]).double() * k).sum() / k.square().sum()
    assert slope.item() == pytest.approx(2.0, rel=0.05)


def test_kernels_are_those_of_scikit_learn():
    from sklearn.gaussian_process.kernels import RBF, Matern

    x = torch.rand(7, 3, dtype=torch.float64)
    for name, theirs in (("rbf", RBF(0.6)), ("matern52", Matern(0.6, nu=2.5))):
        torch.testing.assert_close(kernel_matrix(name, x, x, 0.6), torch.from_numpy(theirs(x.numpy())))


def test_the_exact_posterior_is_that_of_scikit_learn():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    prior = GPPrior(noise=0.05)
    x, y = prior(1, 12, 2, generator())
    mean, variance = prior.posterior(x[:, :8], y[:, :8], x[:, 8:])
    gp = GaussianProcessRegressor(RBF(0.6), alpha=0.05, optimizer=None).fit(
        x[0, :8].double().numpy(), y[0, :8].double().numpy()
    )
    theirs, std = gp.predict(x[0, 8:].double().numpy(), return_std=True)
    torch.testing.assert_close(mean[0], torch.from_numpy(theirs), atol=1e-9, rtol=0)
    torch.testing.assert_close(variance[0], torch.from_numpy(std**2) + 0.05, atol=1e-9, rtol=0)


def test_hyper_priors_draw_lengths_and_scales_from_their_gammas():
    x, y = GPHyperPrior(output_scale=(2.0, 0.5), noise=(2.0, 4.0))(20_000, 2, 1, generator())
    assert x.shape == (20_000, 2, 1) and y.var().item() == pytest.approx(4 + 0.5, rel=0.06)
    # the paper's own hyper-priors, whose noise is nearly always 0
    assert GPHyperPrior(ard=True)(32, 60, 3, generator())[1].isfinite().all()


def test_jitter_rescues_a_singular_matrix_and_leaves_others_alone():
    singular, fine = torch.ones(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    factor = cholesky(torch.stack([singular, fine]))
    torch.testing.assert_close(factor @ factor.mT, torch.stack([singular, fine]), atol=1e-4, rtol=0)
    assert torch.equal(factor[1], fine)
    with pytest.raises(ValueError, match="not positive definite"):
        cholesky(-fine)


def test_a_bnn_without_activation_is_linear_and_with_one_is_not():
    for activation, linear in ((None, True), ("tanh", False)):
        x, y = BNNPrior(5, activation)(4, 50, 3, generator())
        design = torch.cat([x, torch.ones(4, 50, 1)], -1)
        residual = y[..., None] - design @ torch.linalg.lstsq(design, y[..., None]).solution
        assert (residual.abs().max() < 1e-3) == linear
    with pytest.raises(ValueError, match="activation is None or one of"):
        BNNPrior(5, "swish")(1, 2, 1)


def test_the_tabular_prior_halves_its_labels_at_the_median_and_varies_its_features():
    prior, widths = TabularPrior(), set()
    for seed in range(20):
        x, y = prior(3, 30, 8, generator(seed))
        assert ((y == 0).sum(1) == 15).all() and ((y == 1).sum(1) == 15).all() and x.isfinite().all()
        widths.add(x.shape[2])
    assert len(widths) > 3 and max(widths) <= 8
    _, three = TabularPrior(classes=3)(2, 30, 4, generator())
    assert all((three == c).sum(1).eq(10).all() for c in range(3))
    assert len(TabularPrior(classes=None)(2, 30, 4, generator())[1].unique()) == 60


def test_your_own_function_and_scikit_learns_generators_are_priors():
    x, y = FunctionPrior(make_regression, noise=1.0)(3, 10, 4, generator())
    assert x.shape == (3, 10, 4) and y.shape == (3, 10) and not torch.equal(y[0], y[1])
    with pytest.raises(ValueError, match="the prior gave x"):
        FunctionPrior(lambda b, n, f, g: (torch.zeros(b, n), torch.zeros(b, n)))(2, 3, 1)


def test_context_sizes_follow_one_over_the_number_of_queries():
    N, draws = 12, 6000
    g = generator()
    counts = torch.bincount(torch.tensor([draw_context_size(N, g) for _ in range(draws)]), minlength=N)
    weight = 1 / torch.arange(N, 0, -1.0)
    expected = draws * weight / weight.sum()
    # the 0.999 quantile of chi-square with 11 degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum() < 31.26


def test_ranks_draw_other_data_but_the_same_context_size():
    one, two = (Draws(GPPrior(), 4, 20, 1, seed=3, rank=rank) for rank in (0, 1))
    sizes = set()
    for step in range(8):
        a, b = one[step], two[step]
        assert a[0].shape == b[0].shape and not torch.equal(a[2], b[2])
        assert torch.equal(a[2], one[step][2])
        sizes.add(a[0].shape[1])
    assert len(sizes) > 2


def test_a_number_of_queries_stands_beside_every_context_size_alike():
    draws = Draws(GPPrior(), 1, 5, 1, seed=0, queries=7)
    sizes = torch.tensor([draws[step][0].shape[1] for step in range(1000)])
    assert all(draws[step][2].shape == (1, 7, 1) for step in range(8))
    counts = torch.bincount(sizes, minlength=5)
    # the 0.999 quantile of chi-square with 4 degrees of freedom
    assert len(counts) == 5 and ((counts - 200.0) ** 2 / 200).sum() < 18.47
    history = train_pfn(tiny(), GPPrior(), 5, 4, 5, 1e-3, queries=7)
    assert history["context"] == sizes[:5].tolist()


def test_centred_encoders_begin_as_if_the_prior_had_mean_0_and_deviation_1():
    prior, g = GPPrior(amplitude=9.0), generator()
    model = PFN(3, GaussianHead(), 16, 1, 2)
    before = copy.deepcopy(model)
    assert center_encoders_(model, prior) is model
    x, y = prior(500, 40, 3, g)
    for new, old, rows in ((model.enc_x, before.enc_x, x.flatten(0, 1)), (model.enc_y, before.enc_y, y.reshape(-1, 1))):
        white = (rows - rows.mean(0)) / rows.std(0)
        torch.testing.assert_close(new(rows), old(white), rtol=0.1, atol=0.1)
    standardised = PFN(3, GaussianHead(), 16, 1, 2, standardize=True)
    kept = copy.deepcopy(standardised.state_dict())
    center_encoders_(standardised, prior)
    assert all(torch.equal(value, kept[name]) for name, value in standardised.state_dict().items())
    # a feature that never varies, and fewer features than the network takes
    flat = center_encoders_(
        PFN(3, GaussianHead(), 16, 1, 2), FunctionPrior(lambda b, n, f, g: (torch.ones(b, n, 2), torch.ones(b, n)))
    )
    assert all(p.isfinite().all() for p in flat.parameters())


def test_warm_up_then_cosine_to_zero():
    factors = [learning_rate_factor(i / 100) for i in range(101)]
    assert factors[0] == 0 and factors[25] == 1 and factors[-1] == pytest.approx(0, abs=1e-12)
    assert max(range(101), key=factors.__getitem__) == 25


def tiny():
    torch.manual_seed(0)
    return PFN(1, GaussianHead(), 16, 1, 2)


def test_workers_draw_ahead_and_change_nothing():
    torch.manual_seed(0)
    here, there = tiny(), tiny()
    a = train_pfn(here, GPPrior(), 6, 4, 8, 1e-3)
    b = train_pfn(there, GPPrior(), 6, 4, 8, 1e-3, workers=1)
    assert a == b and here.prior_name == "GPPrior" and here.n_max == 7 and here.training
    assert all(torch.equal(p, q) for p, q in zip(here.parameters(), there.parameters(), strict=True))


def test_bf16_and_a_wrapped_model_train():
    model = tiny()
    history = train_pfn(torch.compile(model, backend="eager"), GPPrior(), 3, 4, 8, 1e-3, bf16=True)
    assert len(history["loss"]) == 3 and all(math.isfinite(v) for v in history["loss"]) and model.n_max == 7


def test_senseless_training_is_refused():
    with pytest.raises(ValueError, match="positive"):
        train_pfn(tiny(), GPPrior(), 0)
    with pytest.raises(ValueError, match="positive"):
        train_pfn(tiny(), GPPrior(), 1, queries=0)
    with pytest.raises(ValueError, match="trains a PFN"):
        train_pfn(torch.nn.Linear(1, 1), GPPrior(), 1)
    with pytest.raises(FloatingPointError, match="smaller lr"):
        train_pfn(tiny(), FunctionPrior(lambda b, n, f, g: (torch.zeros(b, n, f), torch.full((b, n), 1e30))), 3, 2, 1)
