import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.tabular import BarDistribution

BORDERS = torch.tensor([-2.0, -1.1, -0.3, 0.1, 0.2, 1.7, 2.5], dtype=torch.float64)


def bars(full_support=True):
    return BarDistribution(BORDERS, full_support)


def some_logits(*batch, seed=0):
    return torch.randn(*batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def integral(f, low=-40.0, high=40.0, count=800_001):
    grid = torch.linspace(low, high, count, dtype=torch.float64)
    return torch.trapezoid(f(grid), grid)


def density(head, logits):
    def at(grid):
        if head.full_support:
            return torch.exp(-head.nll(logits, grid))
        inside = (grid >= head.borders[0]) & (grid <= head.borders[-1])
        return torch.where(inside, torch.exp(-head.nll(logits, grid.clamp(head.borders[0], head.borders[-1]))), 0.0)

    return at


@pytest.mark.parametrize("full_support", [True, False])
def test_the_density_integrates_to_one_and_its_moments_are_the_closed_forms(full_support):
    head, logits = bars(full_support), some_logits()
    p = density(head, logits)
    mean = integral(lambda y: y * p(y))
    assert integral(p).item() == pytest.approx(1, abs=1e-3)
    assert head.mean(logits).item() == pytest.approx(mean.item(), abs=1e-3)
    assert head.variance(logits).item() == pytest.approx(integral(lambda y: (y - mean) ** 2 * p(y)).item(), abs=1e-3)
    entropy = -integral(lambda y: torch.special.xlogy(p(y), p(y)))
    assert head.entropy(logits).item() == pytest.approx(entropy.item(), abs=1e-3)


@pytest.mark.parametrize("full_support", [True, False])
@pytest.mark.parametrize("f", [-3.0, -1.4, -0.9, 0.15, 1.0, 2.1, 3.5])
def test_cdf_expected_improvement_and_its_probability_are_the_integrals(full_support, f):
    head, logits = bars(full_support), some_logits()
    p = density(head, logits)
    assert head.cdf(logits, f).item() == pytest.approx(integral(lambda y: p(y) * (y <= f)).item(), abs=1e-3)
    up, down = integral(lambda y: (y - f).clamp(min=0) * p(y)), integral(lambda y: (f - y).clamp(min=0) * p(y))
    assert head.ei(logits, f).item() == pytest.approx(up.item(), abs=1e-3)
    assert head.ei(logits, f, maximize=False).item() == pytest.approx(down.item(), abs=1e-3)
    # E (y - f)_+ - E (f - y)_+ = E y - f, to rounding
    gap = head.ei(logits, f) - head.ei(logits, f, maximize=False) - (head.mean(logits) - f)
    assert gap.abs() < 1e-12
    assert (head.pi(logits, f) + head.pi(logits, f, maximize=False)).item() == pytest.approx(1)


def test_golden_bars_written_out_by_hand():
    head, logits = bars(), some_logits()
    p = [v.item() for v in logits.softmax(-1)]
    b = BORDERS.tolist()
    s0, s5 = (b[1] - b[0]) / 0.6744897501960817, (b[6] - b[5]) / 0.6744897501960817

    def phi(z):
        return 0.5 * math.erfc(-z / math.sqrt(2))

    def pdf(z):
        return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    y = torch.tensor([-1.5, 0.15, 3.0], dtype=torch.float64)
    nll = [
        -math.log(p[0] * 2 * pdf((b[1] + 1.5) / s0) / s0),
        -math.log(p[3] / 0.1),
        -math.log(p[5] * 2 * pdf((3 - b[5]) / s5) / s5),
    ]
    torch.testing.assert_close(head.nll(logits, y), torch.tensor(nll, dtype=torch.float64), atol=1e-7, rtol=0)
    cdf = [p[0] * 2 * phi(-(b[1] + 1.5) / s0), sum(p[:3]) + p[3] / 2, 1 - p[5] * 2 * phi(-(3 - b[5]) / s5)]
    torch.testing.assert_close(head.cdf(logits, y), torch.tensor(cdf, dtype=torch.float64), atol=1e-7, rtol=0)
    # the incumbent 1.0 lies inside bar 4, of which only the covered fraction counts
    right = b[5] + s5 * math.sqrt(2 / math.pi) - 1
    ei = p[4] * (b[5] - 1) ** 2 / 2 / (b[5] - b[4]) + p[5] * right
    assert head.ei(logits, 1.0).item() == pytest.approx(ei, abs=1e-7)
    second = p[0] * (s0**2 * (1 - 2 / math.pi) + (b[1] - s0 * math.sqrt(2 / math.pi)) ** 2)
    second += p[5] * (s5**2 * (1 - 2 / math.pi) + (b[5] + s5 * math.sqrt(2 / math.pi)) ** 2)
    second += sum(p[k] * (b[k] ** 2 + b[k] * b[k + 1] + b[k + 1] ** 2) / 3 for k in range(1, 5))
    assert head.variance(logits).item() == pytest.approx(second - head.mean(logits).item() ** 2, abs=1e-7)


@pytest.mark.parametrize("full_support", [True, False])
def test_icdf_undoes_cdf(full_support):
    head, logits = bars(full_support), some_logits(5, 1)
    y = torch.linspace(-1.99, 2.49, 301, dtype=torch.float64)
    torch.testing.assert_close(head.icdf(logits, head.cdf(logits, y)), y.expand(5, 301), atol=1e-6, rtol=0)
    q = torch.linspace(1e-6, 1 - 1e-6, 301, dtype=torch.float64)
    torch.testing.assert_close(head.cdf(logits, head.icdf(logits, q)), q.expand(5, 301), atol=1e-9, rtol=0)
    ends = head.icdf(logits, torch.tensor([0.0, 1.0]))
    wanted = torch.tensor([-math.inf, math.inf]) if full_support else BORDERS[[0, -1]]
    torch.testing.assert_close(ends, wanted.double().expand(5, 2))
    torch.testing.assert_close(head.median(logits), head.icdf(logits, 0.5))
    assert (head.ucb(logits) > head.median(logits)).all() and (
        head.ucb(logits, maximize=False) < head.median(logits)
    ).all()


def test_the_slope_of_expected_improvement_is_minus_the_mass_above_and_far_below_it_is_the_distance():
    head, logits = bars(), some_logits()
    f = torch.linspace(-6, 6, 97, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(head.ei(logits, f).sum(), f)
    torch.testing.assert_close(slope, head.cdf(logits, f) - 1, atol=1e-9, rtol=0)
    far = torch.tensor(-1e4, dtype=torch.float64)
    assert head.ei(logits, far).item() == pytest.approx(head.mean(logits).item() + 1e4, rel=1e-12)


@pytest.mark.parametrize("full_support", [True, False])
def test_gradcheck_in_the_logits(full_support):
    head, logits = bars(full_support), some_logits(3).requires_grad_()
    y = torch.tensor([-1.3, 0.15, 2.2], dtype=torch.float64)
    for f in (
        lambda l: head.nll(l, y),
        head.mean,
        head.variance,
        head.entropy,
        lambda l: head.ei(l, 0.4),
        lambda l: head.ei(l, 0.4, maximize=False),
        lambda l: head.cdf(l, y),
        lambda l: head.icdf(l, torch.tensor([0.03, 0.5, 0.98])),
    ):
        assert torch.autograd.gradcheck(f, (logits,))


def test_uniform_logits_on_borders_of_equal_mass_are_the_samples_own_distribution():
    y = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    for K in (10, 100):
        head = BarDistribution.from_samples(y, K, full_support=False)
        ordered = y.sort().values
        empirical = torch.arange(1, len(y) + 1) / len(y)
        assert (head.cdf(torch.zeros(K).double(), ordered) - empirical).abs().max() < 1 / K


def test_the_mode_is_where_the_density_is_highest_not_the_heaviest_bar():
    head = BarDistribution([0.0, 1.0, 1.1, 5.0, 6.0])
    # the bar (1.1, 5] is heaviest, (1, 1.1] is densest
    logits = torch.tensor([0.1, 0.3, 0.5, 0.1]).log()
    assert head.mode(logits).item() == pytest.approx(1.05)
    # half the mass of a tail is outside its bar, so that its peak is lower than p / width says
    assert BarDistribution([0.0, 1.0, 2.0, 3.0]).mode(torch.tensor([0.45, 0.3, 0.25]).log()).item() == pytest.approx(
        1.5
    )


def test_a_border_belongs_to_the_bar_below_it_and_the_first_to_the_first():
    head, logits = BarDistribution([0.0, 1.0, 3.0], full_support=False), torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(
        torch.exp(-head.nll(logits, torch.tensor([0.0, 1.0, 3.0]))), torch.tensor([0.75, 0.75, 0.125])
    )


def test_samples_follow_the_cdf():
    head, logits = bars(), some_logits(2)
    draws = head.sample(logits, 4000, torch.Generator().manual_seed(0))
    assert draws.shape == (4000, 2) and draws.isfinite().all()
    u = head.cdf(logits, draws).sort(0).values
    assert (u - (torch.arange(4000)[:, None] + 0.5) / 4000).abs().max() < 1.63 / math.sqrt(4000)


def test_a_mixture_averages_the_cdfs():
    one, two = bars(), BarDistribution(torch.tensor([-1.5, 0.0, 0.5, 3.0]).double())
    a, b = some_logits(4), torch.randn(4, 3, dtype=torch.float64)
    joint, logits = BarDistribution.mixture([one, two], [a, b], [1, 3])
    for y in joint.borders[1:-1]:
        wanted = 0.25 * one.cdf(a, y) + 0.75 * two.cdf(b, y)
        torch.testing.assert_close(joint.cdf(logits, y), wanted)


def test_an_affine_image_keeps_the_logits():
    head, logits = bars(), some_logits()
    moved = head.affine(3.0, 2.0)
    assert moved.mean(logits).item() == pytest.approx(3 + 2 * head.mean(logits).item())
    y = torch.tensor(0.7).double()
    assert moved.nll(logits, 3 + 2 * y).item() == pytest.approx(head.nll(logits, y).item() + math.log(2))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 40), st.integers(0, 2**31), st.booleans())
def test_quantiles_rise_and_variances_are_positive_whatever_the_borders(K, seed, full_support):
    g = torch.Generator().manual_seed(seed)
    head = BarDistribution(torch.rand(K + 1, generator=g, dtype=torch.float64).add(1e-3).cumsum(0), full_support)
    logits = 5 * torch.randn(K, generator=g, dtype=torch.float64)
    values = head.icdf(logits, torch.linspace(0.01, 0.99, 50))
    assert (values.diff() >= 0).all() and head.variance(logits) > 0


def test_half_precision_logits_are_widened():
    head, logits = BarDistribution(BORDERS.float()), some_logits(3).bfloat16()
    assert head.nll(logits, torch.zeros(3)).dtype == head.mean(logits).dtype == torch.float32


def test_a_missing_outcome_costs_nothing_and_passes_no_nan_back():
    head, logits = bars(), some_logits(2).requires_grad_()
    nll = head.nll(logits, torch.tensor([math.nan, 0.0]))
    nll.sum().backward()
    assert nll[0] == 0 and logits.grad[0].abs().max() == 0 and logits.grad[1].abs().max() > 0


@pytest.mark.parametrize(
    ("borders", "words"),
    [([0.0, 2.0, 1.0], "increase"), ([0.0, 1.0, 1.0, 2.0], "increase"), ([0.0, math.nan, 1.0], "finite"), ([0.0, 1.0], "at least 3")],
)  # fmt: skip
def test_bad_borders_are_refused(borders, words):
    with pytest.raises(ValueError, match=words):
        BarDistribution(borders)


def test_an_outcome_outside_finite_support_is_named():
    with pytest.raises(ValueError, match=r"7\.5 lies outside"):
        bars(False).nll(some_logits(), torch.tensor(7.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        bars().icdf(some_logits(), 1.5)
    with pytest.raises(ValueError, match="samples"):
        BarDistribution.from_samples(torch.randn(50), 100)
