import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from headway.residual.depth import Residual
from headway.residual.expansion import Tower, residual_expansion


def linear_tower(n: int, scale: float, dim: int = 6) -> Tower:
    torch.manual_seed(0)
    return Tower([nn.Linear(dim, dim, bias=False) for _ in range(n)], scale).double()


class Tanh(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_terms_of_linear_branches_sum_to_the_forward():
    tower, x = linear_tower(7, 0.3), torch.randn(4, 6, dtype=torch.float64)
    found = residual_expansion(tower, x, order=7, reduce=None)
    total = sum(0.3**k * c for k, c in enumerate(found.terms))
    torch.testing.assert_close(total, tower(x), rtol=1e-13, atol=1e-13)
    assert found.remainder.max() < 1e-13


def test_terms_of_linear_branches_equal_brute_force_over_all_subsets():
    tower, x = linear_tower(5, 0.3), torch.randn(4, 6, dtype=torch.float64)
    found = residual_expansion(tower, x, order=5, reduce=None)
    for k in range(6):
        term = torch.zeros_like(x)
        for chosen in itertools.combinations(range(5), k):
            y = x
            for i in chosen:
                y = tower.blocks[i].module(y)
            term += y
        torch.testing.assert_close(found.terms[k], term, rtol=1e-13, atol=1e-14)
    assert found.n_paths == (1, 5, 10, 10, 5, 1)


def test_error_of_smooth_branches_falls_by_one_order_more_than_the_sum_holds():
    torch.manual_seed(0)
    branches, x = [Tanh() for _ in range(8)], torch.randn(4, 8, dtype=torch.float64)
    for order in (1, 2, 3):
        errors = []
        for lam in (1e-2, 1e-3):
            tower = Tower(branches, lam).double()
            errors.append(residual_expansion(tower, x, order).remainder.mean().item())
        assert errors[0] / errors[1] == pytest.approx(10 ** (order + 1), rel=0.2)


def test_contributions_of_the_blocks_telescope_for_any_branch():
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(12)]
    tower, x = Tower(branches, [0.1 * (i + 1) for i in range(12)]).double(), torch.randn(4, 8, dtype=torch.float64)
    found = residual_expansion(tower, x, order=1, reduce=None)
    lams = torch.tensor([b.branch_scale for b in tower.blocks], dtype=torch.float64)
    change = torch.einsum("n,nbd->bd", lams, found.per_block)
    scale = tower(x).abs().max()
    assert (tower(x) - x - change).abs().max() < 1e-12 * max(1.0, scale)


def test_commuting_equal_linear_branches_follow_the_binomial_law():
    tower, x = linear_tower(6, 0.2), torch.randn(3, 6, dtype=torch.float64)
    tower = Tower([tower.blocks[0].module] * 6, 0.2)
    found, power = residual_expansion(tower, x, order=6, reduce=None), x
    for k in range(7):
        torch.testing.assert_close(found.terms[k], math.comb(6, k) * power, rtol=1e-12, atol=1e-13)
        power = tower.blocks[0].module(power)


def test_second_order_term_is_the_sum_over_pairs_of_jacobian_times_branch():
    torch.manual_seed(0)
    tower, x = Tower([Tanh() for _ in range(4)], 0.5).double(), torch.randn(1, 8, dtype=torch.float64)
    found = residual_expansion(tower, x, order=2, reduce=None)
    expected = torch.zeros_like(x)
    for i, j in itertools.combinations(range(4), 2):
        jacobian = torch.func.jacrev(tower.blocks[j].module)(x[0])
        expected += tower.blocks[i].module(x) @ jacobian.T
    torch.testing.assert_close(found.terms[2], expected)


def test_branches_with_different_factors_keep_them_in_the_terms():
    torch.manual_seed(0)
    tower = Tower([nn.Linear(6, 6, bias=False) for _ in range(3)], [0.1, 0.5, 0.9]).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    found = residual_expansion(tower, x, order=3, reduce=None)
    assert found.scale == 1.0
    torch.testing.assert_close(found.terms.sum(0), tower(x))


def test_norms_are_those_of_the_whole_terms_and_an_empty_batch_passes():
    tower, x = linear_tower(3, 0.3), torch.randn(4, 6, dtype=torch.float64)
    whole, norms = residual_expansion(tower, x, 2, None), residual_expansion(tower, x, 2)
    torch.testing.assert_close(whole.terms.norm(dim=-1), norms.terms)
    assert norms.terms.shape == (3, 4) and norms.per_block.shape == (3, 4)
    assert residual_expansion(tower, x[:0], 2).terms.shape == (3, 0)


def test_what_cannot_be_expanded_is_refused_with_a_sentence():
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="at least 0"):
        residual_expansion(linear_tower(2, 1.0), x.double(), order=-1)
    with pytest.warns(UserWarning, match="ends at order 2"):
        assert residual_expansion(linear_tower(2, 1.0), x.double(), order=5).terms.shape[0] == 3
    with pytest.raises(ValueError, match="batch statistics"):
        residual_expansion(Tower([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))]), x)
    with pytest.raises(ValueError, match="keep the shape"):
        residual_expansion(Tower([nn.Linear(6, 5)]), x)
    with pytest.raises(TypeError, match="Tower"):
        residual_expansion(nn.Linear(6, 6), x)

    class Cut(nn.Module):
        def forward(self, x):
            return x.detach() * 2

    with pytest.raises(ValueError, match="derivative"):
        residual_expansion(Tower([Cut()]), x, order=2)
    assert residual_expansion(Tower([Cut()]), x, order=1).terms.shape == (2, 4)


def test_a_sequential_with_an_encoder_in_front_is_a_tower():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), Residual(nn.Linear(6, 6, bias=False), 0.5), nn.Linear(6, 2)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    found = residual_expansion(net, x, order=1, reduce=None)
    torch.testing.assert_close(found.terms[0], net[0](x))
    assert found.remainder.max() < 1e-14


class Count(TorchFunctionMode):
    """Counts the linear maps that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.maps += func is F.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [4, 16])
def test_order_two_costs_three_linear_maps_for_each_of_the_forward_and_grows_linearly_with_n(n):
    tower, x = Tower([Tanh() for _ in range(n)], "1/n"), torch.randn(3, 8)
    with Count() as count:
        tower(x)
    forward = count.maps
    with Count() as count:
        residual_expansion(tower, x, order=2)
    assert forward == 2 * n and count.maps == 3 * forward


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(x, x, self.inner(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.SiLU(), nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 5, 5)),
        (lambda: nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, bias=False), nn.GELU()), (2, 8, 5)),
        (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()), (2, 8)),
        (Attending, (2, 5, 8)),
    ],
)
def test_the_fast_derivative_is_the_one_of_torch(make, shape):
    torch.manual_seed(0)
    tower, x = Tower([make() for _ in range(3)], 0.5).double().eval(), torch.randn(shape, dtype=torch.float64)
    found = residual_expansion(tower, x, order=2, reduce=None)
    c1, c2 = torch.zeros_like(x), torch.zeros_like(x)
    for block in tower.blocks:
        x.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            _, pushed = torch.autograd.functional.jvp(block.module, x, c1)
        c1, c2 = c1 + block.module(x).detach(), c2 + pushed
    torch.testing.assert_close(found.terms[1], c1)
    torch.testing.assert_close(found.terms[2], c2)


def test_no_deprecation_of_torch_reaches_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        residual_expansion(Tower([Tanh() for _ in range(3)]), torch.randn(2, 8), order=3)
