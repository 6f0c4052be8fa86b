import pytest
import torch
from torch import nn

from headway.residual.complexity import geometric_complexity


def test_complexity_of_a_linear_map_is_the_squared_norm_of_its_matrix():
    net = nn.Linear(5, 3).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    assert geometric_complexity(net, x) == pytest.approx(net.weight.pow(2).sum().item(), rel=1e-12)


def test_complexity_equals_the_full_jacobian_of_a_nonlinear_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    full = torch.func.vmap(torch.func.jacrev(net))(x).pow(2).sum((1, 2)).mean().item()
    assert geometric_complexity(net, x) == pytest.approx(full, rel=1e-12)


def test_random_projections_estimate_the_exact_complexity():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(64, 5)
    exact = geometric_complexity(net, x)
    estimate = geometric_complexity(net, x, 200, torch.Generator().manual_seed(0))
    assert estimate == pytest.approx(exact, rel=0.05)


def test_inputs_without_a_derivative_or_samples_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        geometric_complexity(nn.Identity(), torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="empty batch"):
        geometric_complexity(nn.Identity(), torch.ones(0, 2))
    with pytest.raises(ValueError, match="at least 1"):
        geometric_complexity(nn.Identity(), torch.ones(2, 2), 0)
