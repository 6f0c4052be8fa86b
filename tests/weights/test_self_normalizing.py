"""Self-normalizing networks: the maths of the fixed point, SELU, alpha dropout, initialisation, and the check."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headway as hw
from headway.kernels.selu import _dropout_op, reference
from headway.weights import (
    SELU,
    AlphaDropout,
    FeatureAlphaDropout,
    SelfNormalizing,
    check_self_normalizing,
    iterate,
    jacobian,
    lecun_normal_,
    moment_map,
    self_normalizing_init_,
    selu_params,
)
from headway.weights.self_normalizing import alpha_dropout, dropout_constants, selu
from headway.weights.selu_moments import ALPHA, SCALE

RATES = [0.05, 0.1, 0.2, 0.5]


def quadrature(mu, nu, omega, tau, alpha=ALPHA, scale=SCALE):
    """Mean and variance by Gauss-Legendre in two pieces split at 0, over 12 standard deviations."""
    m, v = mu * omega, nu * tau
    nodes, weights = np.polynomial.legendre.leggauss(400)
    first = second = 0.0
    for low, high in ((m - 12 * v**0.5, 0.0), (0.0, m + 12 * v**0.5)):
        if low < high:
            z = (high - low) / 2 * nodes + (high + low) / 2
            density = np.exp(-((z - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v) * weights * (high - low) / 2
            y = scale * np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0)))
            first, second = first + (y * density).sum(), second + (y * y * density).sum()
    return first, second - first**2


# oracle 1


def test_the_published_constants_solve_the_fixed_point_0_1():
    alpha, scale = selu_params(0.0, 1.0)
    assert abs(alpha - 1.6732632423543772848) < 1e-14 and abs(scale - 1.0507009873554804934) < 1e-14


def test_other_fixed_points_are_solved_and_kept():
    alpha, scale = selu_params(-0.1, 2.0)
    assert abs(alpha - 1.9769021954242014) < 1e-9 and abs(scale - 1.073851239616046) < 1e-9
    for mean, var in [(-0.1, 2.0), (0.2, 1.0), (0.0, 1e-3), (0.0, 100.0), (-0.3, 0.5), (0.0, 1e-6), (0.0, 1e6)]:
        reached = moment_map(mean, var, 1.0, 1.0, *selu_params(mean, var))
        assert float(reached[0]) == pytest.approx(mean, abs=1e-8 * max(1, var))
        assert float(reached[1]) == pytest.approx(var, rel=1e-6)


def test_an_impossible_fixed_point_is_refused_with_the_range_that_works():
    for bad in [(0.0, 0.0), (0.0, -1.0), (0.0, math.inf), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match="variance above 0"):
            selu_params(*bad)
    with pytest.raises(ValueError, match=r"\[1e-06, 1e\+06\]"):
        selu_params(0.0, 1e-9)
    with pytest.raises(ValueError, match="nearer to 0"):
        SELU((5.0, 1.0))


# oracle 2


def test_the_moment_map_equals_quadrature_and_monte_carlo():
    random = torch.Generator().manual_seed(0)
    u = torch.rand(20, 4, generator=random, dtype=torch.float64)
    points = torch.stack([2 * u[:, 0] - 1, 0.05 + 4 * u[:, 1], 2 * u[:, 2] - 1, 0.3 + 1.5 * u[:, 3]], 1)
    mean, var = moment_map(*points.T)
    for point, a, b in zip(points.tolist(), mean.tolist(), var.tolist(), strict=True):
        assert (a, b) == pytest.approx(quadrature(*point), abs=1e-10)
    z = torch.randn(4_000_000, generator=random)
    for (mu, nu, omega, tau), a, b in zip(points.tolist(), mean.tolist(), var.tolist(), strict=True):
        y = F.selu(z * math.sqrt(nu * tau) + mu * omega).double()
        off = (y - y.mean()).square_()
        assert abs(y.mean().item() - a) < 5 * off.mean().sqrt().item() / 2000
        assert abs(off.mean().item() - b) < 5 * off.std().item() / 2000


def test_the_moment_map_survives_where_exp_overflows_and_erfc_underflows():
    for point in [(0.0, 1000.0, 0.0, 1.0), (40.0, 400.0, 1.0, 1.0), (-30.0, 900.0, 1.0, 1.0), (3.0, 0.01, 1.0, 1.0)]:
        assert [float(t) for t in moment_map(*point)] == pytest.approx(quadrature(*point), rel=1e-9)
    assert all(torch.isfinite(t).all() for t in (*moment_map(700.0, 1e5, 1.0), *moment_map(1.0, 0.0, 1.0)))
    with pytest.raises(ValueError, match="nu"):
        moment_map(0.0, -1.0)


# oracle 3


def test_the_jacobian_at_the_fixed_point_contracts():
    matrix = jacobian(0.0, 1.0)
    assert torch.allclose(matrix, torch.tensor([[0.0, 0.088835], [0.0, 0.782648]], dtype=torch.float64), atol=1e-5)
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(0.78767, abs=1e-5)


def test_the_jacobian_and_autograd_equal_finite_differences():
    point = torch.tensor([0.3, 1.4, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: torch.stack(moment_map(*p)), point)
    assert torch.autograd.gradcheck(lambda p: jacobian(*p), point)
    far = torch.tensor([[40.0, 300.0], [-40.0, 3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: torch.stack(moment_map(p[:, 0], p[:, 1], 1.0)), far)
    h = 1e-6
    rows = [
        [(a - b) / (2 * h) for a, b in zip(moment_map(*up), moment_map(*down), strict=True)]
        for up, down in (((0.3 + h, 1.4, 0.2), (0.3 - h, 1.4, 0.2)), ((0.3, 1.4 + h, 0.2), (0.3, 1.4 - h, 0.2)))
    ]
    assert torch.allclose(jacobian(0.3, 1.4, 0.2), torch.tensor(rows, dtype=torch.float64).T, atol=1e-8)
    assert jacobian(torch.zeros(5), torch.ones(5)).shape == (5, 2, 2)


def test_the_fixed_point_attracts_geometrically():
    for n, mean, var in [(0, 0.1, 1.5), (5, 0.0145, 1.124), (10, 0.0040, 1.035), (20, 3e-4, 1.003)]:
        reached = iterate(0.1, 1.5, n)
        assert float(reached[0]) == pytest.approx(mean, abs=6e-5) and float(reached[1]) == pytest.approx(var, abs=6e-4)
    far = [float(iterate(0.1, 1.5, n)[1]) - 1 for n in (30, 31)]
    assert far[1] / far[0] == pytest.approx(0.783, abs=1e-3)
    with pytest.raises(ValueError, match="at least 0"):
        iterate(0.0, 1.0, -1)


# oracle 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_selu_is_that_of_torch_and_of_its_equation(dtype):
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, -1e-9, 1e-9])]).to(dtype)
    y = selu(x)
    assert y.dtype == dtype and torch.allclose(y, F.selu(x), rtol=1e-7, atol=0)
    tolerance = {torch.float32: 2e-7, torch.float64: 1e-15}.get(dtype, 2 * torch.finfo(dtype).eps)
    truth = reference.selu(x.double(), ALPHA, SCALE)
    assert torch.allclose(y.double(), truth, rtol=tolerance, atol=torch.finfo(dtype).tiny)


def test_selu_keeps_its_digits_next_to_zero():
    y = selu(torch.tensor([-1e-9]))
    assert y.item() == pytest.approx(-1e-9 * 1.0507009873554805 * 1.6732632423543772, rel=1e-6)


def test_selu_has_the_right_derivatives_from_its_output_alone():
    x = torch.tensor([-3.0, -0.5, -1e-3, 1e-3, 0.7, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(selu, x) and torch.autograd.gradgradcheck(selu, x)
    assert torch.autograd.gradcheck(lambda t: selu(t, *selu_params(-0.1, 2.0)), x)
    zero = torch.zeros(1, requires_grad=True)
    selu(zero).backward()
    assert zero.grad.item() == pytest.approx(SCALE * ALPHA)
    gy, y = torch.randn(6, dtype=torch.float64), selu(x.detach())
    (gx,) = torch.autograd.grad(selu(x), x, gy)
    assert torch.allclose(reference.selu_backward(gy, y, ALPHA, SCALE), gx, atol=1e-14)


def test_a_net_keeps_one_tensor_a_layer_where_torch_keeps_two():
    def kept(layer):
        seen = {}
        x = torch.randn(32, 16)
        net = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(16, 16), layer())])
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(x)
        return len(seen.keys() - own)

    assert kept(SELU) == 5 and kept(nn.SELU) == 8


def test_selu_under_nan_and_infinity_empty_compile_and_vmap():
    y = selu(torch.tensor([math.nan, math.inf, -math.inf]))
    assert y[0].isnan() and y[1] == math.inf and y[2].item() == pytest.approx(-1.7580993408473766, rel=1e-6)
    assert selu(torch.empty(0, 3)).shape == (0, 3) and selu(torch.tensor(1.0)).item() == pytest.approx(SCALE)
    x = torch.randn(5, 4)
    per_sample = torch.func.vmap(torch.func.grad(lambda t: selu(t).sum()))(x)
    assert torch.allclose(per_sample, torch.where(x > 0, SCALE, selu(x) + SCALE * ALPHA), atol=1e-6)
    for bad, error in (
        (lambda: selu(torch.ones(2, dtype=torch.int64)), TypeError),
        (lambda: selu(x, -1.0), ValueError),
    ):
        with pytest.raises(error):
            bad()


# oracle 5


def test_the_constants_of_alpha_dropout_are_the_published_ones():
    table = {
        0.05: (0.954845, 0.083936),
        0.1: (0.921285, 0.161970),
        0.2: (0.878904, 0.309040),
        0.5: (0.886405, 0.779194),
    }
    for p, wanted in table.items():
        assert dropout_constants(p)[:2] == pytest.approx(wanted, abs=1e-6)


def test_alpha_dropout_with_a_given_mask_is_its_equation():
    x = torch.randn(64, 9, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(64, 9) > 0.3
    gain, shift, low = dropout_constants(0.2, (-0.1, 2.0))
    wanted = gain * (x * mask + low * (~mask).double()) + shift
    assert torch.allclose(alpha_dropout(x, 0.2, fixed_point=(-0.1, 2.0), mask=mask), wanted, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: alpha_dropout(t, 0.2, mask=mask), x)
    for wrong in (mask.float(), mask[:, :4]):
        with pytest.raises(ValueError, match="mask must be a bool tensor"):
            alpha_dropout(x, 0.2, mask=wrong)


@pytest.mark.parametrize("fixed_point", [(0.0, 1.0), (-0.1, 2.0)])
def test_alpha_dropout_keeps_mean_and_variance(fixed_point):
    torch.manual_seed(1)
    mean, var = fixed_point
    n = 10_000_000
    x = torch.randn(n) * math.sqrt(var) + mean
    for p in RATES:
        y = alpha_dropout(x, p, fixed_point=fixed_point).double()
        off = (y - mean).square_()
        assert abs(y.mean().item() - mean) < 5 * off.mean().sqrt().item() / math.sqrt(n)
        assert abs(off.mean().item() - var) < 5 * off.std().item() / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 1000, 40_000])
def test_the_fused_dropout_draws_the_bits_of_the_plain_one(dtype, n):
    x = torch.randn(n, dtype=torch.float64).to(dtype)
    gain, shift, low = dropout_constants(0.3)
    y, bits = _dropout_op(x, -123456789, 0.3, gain, shift, low)
    kept = reference.kept_bits(n, -123456789, 0.3)
    assert torch.equal(bits, reference.pack(kept)) and torch.equal(reference.unpack(bits, n), kept)
    wanted = reference.alpha_dropout(x.double(), kept, gain, shift, low)
    assert torch.allclose(y.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    gy = torch.randn(n, dtype=torch.float64).to(dtype)
    gx = torch.ops.headway.alpha_dropout_backward(gy, bits, gain)
    assert torch.allclose(gx.double(), gy.double() * gain * kept, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_the_random_bits_are_even_and_independent_of_their_neighbours():
    kept = reference.kept_bits(1_000_000, 7, 0.3).double()
    assert kept.mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 1e6))
    for lag in (1, 2, 3, 64):
        product = ((kept[lag:] - 0.7) * (kept[:-lag] - 0.7)).mean().item()
        assert abs(product) < 5 * 0.21 / 1e3
    other = reference.kept_bits(1_000_000, 8, 0.3).double()
    assert abs(((kept - 0.7) * (other - 0.7)).mean().item()) < 5 * 0.21 / 1e3


def test_alpha_dropout_follows_the_seed_of_torch_and_passes_its_gradient():
    x = torch.randn(300, requires_grad=True)
    layer = AlphaDropout(0.2)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
    (gx,) = torch.autograd.grad(first.sum(), x)
    gain, shift, low = dropout_constants(0.2)
    dropped = torch.isclose(first, torch.tensor(gain * low + shift))
    assert torch.allclose(gx, torch.where(dropped, 0.0, gain)) and 0.1 < dropped.float().mean() < 0.3
    gy = torch.randn(300, requires_grad=True)
    (gx,) = torch.autograd.grad(first := layer(x), x, gy, create_graph=True)
    assert torch.autograd.grad(gx.sum(), gy)[0].abs().max() <= gain * 1.001


def test_the_operators_are_registered_as_torch_wants_them():
    x, gain = torch.randn(37), 0.9
    torch.library.opcheck(_dropout_op, (x, 5, 0.3, gain, 0.1, -1.7), test_utils=["test_schema", "test_faketensor"])
    bits = _dropout_op(x, 5, 0.3, gain, 0.1, -1.7)[1]
    op = torch.ops.headway.alpha_dropout_backward.default
    torch.library.opcheck(op, (x, bits, gain), test_utils=["test_schema", "test_faketensor"])


def test_whole_channels_fall_out_of_a_map():
    torch.manual_seed(0)
    y = FeatureAlphaDropout(0.5)(torch.randn(8, 16, 5, 5))
    gain, shift, low = dropout_constants(0.5)
    out = torch.isclose(y, torch.tensor(gain * low + shift)).flatten(2)
    assert torch.equal(out.all(2), out.any(2)) and 0.3 < out.all(2).float().mean() < 0.7
    with pytest.raises(ValueError, match=r"\(batch, channels"):
        FeatureAlphaDropout(0.5)(torch.randn(5))


# oracle 6


def test_no_point_of_the_theorems_domain_leaves_it():
    axis = [torch.linspace(low, high, 9) for low, high in ((-0.1, 0.1), (0.8, 1.5), (-0.1, 0.1), (0.95, 1.1))]
    mu, nu, omega, tau = (t.double() for t in torch.meshgrid(*axis, indexing="ij"))
    mean, var = moment_map(mu, nu, omega, tau)
    assert mean.min() > -0.0312 and mean.max() < 0.0678 and var.min() > 0.803 and var.max() < 1.483
    assert torch.linalg.matrix_norm(jacobian(mu, nu, omega, tau), 2).max() < 0.9


def test_large_variances_shrink_and_small_ones_grow():
    around = torch.linspace(-1, 1, 9).double(), torch.linspace(-0.1, 0.1, 5).double()

    def grid(nus, taus):
        return torch.meshgrid(
            around[0], torch.linspace(*nus, 15).double(), around[1], torch.linspace(*taus, 7).double(), indexing="ij"
        )

    for nus, taus, sign in (((3, 16), (0.8, 1.25), -1), ((0.02, 0.16), (0.8, 1.25), 1), ((0.02, 0.24), (0.9, 1.25), 1)):
        mu, nu, omega, tau = grid(nus, taus)
        assert (sign * (moment_map(mu, nu, omega, tau)[1] - nu) > 0).all()


# oracle 7


@pytest.mark.parametrize(
    ("layer", "fan"),
    [
        (nn.Linear(200, 300), 200),
        (nn.Conv2d(32, 64, 3, groups=4), 8 * 9),
        (nn.ConvTranspose2d(32, 64, 3), 32 * 9),
        (nn.ConvTranspose1d(32, 64, 3, groups=2), 16 * 3),
        (nn.Conv1d(16, 400, 5), 80),
    ],
)
def test_the_start_has_variance_one_over_fan_in(layer, fan):
    torch.manual_seed(0)
    self_normalizing_init_(layer)
    n = layer.weight.numel()
    variance = layer.weight.double().square().mean().item()
    assert abs(variance * fan - 1) < 3 * math.sqrt(2 / n) and not layer.bias.any()


def test_lecun_normal_takes_its_fan_from_the_tensor_or_as_a_number():
    torch.manual_seed(0)
    for tensor, fan, number in [
        (torch.empty(500, 40, 3), "in", 120),
        (torch.empty(500, 40), "out", 500),
        (torch.empty(9000), 25, 25),
    ]:
        assert lecun_normal_(tensor, fan) is tensor
        assert abs(tensor.square().mean().item() * number - 1) < 3 * math.sqrt(2 / tensor.numel())
    assert lecun_normal_(torch.empty(0, 5)).shape == (0, 5)
    for bad in (lambda: lecun_normal_(torch.empty(5)), lambda: lecun_normal_(torch.empty(5, 5), "up")):
        with pytest.raises(ValueError, match="fan"):
            bad()
    with pytest.raises(ValueError, match="holds none"):
        self_normalizing_init_(nn.ReLU())


def net(width=64, depth=4, activation=SELU, **more):
    layers = [part for i in range(depth) for part in (nn.Linear(20 if not i else width, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


@pytest.mark.parametrize("start", ["default", "selu"])
def test_the_check_flags_the_starts_that_let_the_signal_die(start):
    torch.manual_seed(0)
    model, x = net(), torch.randn(256, 20)
    if start == "selu":
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="selu")
    with pytest.warns(UserWarning, match="violated"):
        report = check_self_normalizing(model, x)
    assert not report.ok and ("default start" if start == "default" else "selu") in str(report)
    good = check_self_normalizing(self_normalizing_init_(model), x)
    assert good.ok, good
    assert len(good.layers) == 5 and good.layers[-1].mean is None and len(good.layers[0].tau) == 64
    for layer in good.layers[:-1]:
        assert layer.mean == pytest.approx(layer.expected_mean, abs=0.1)
        assert layer.variance == pytest.approx(layer.expected_variance, abs=0.15)
    assert good.to_dict()["violations"] == ()


@pytest.mark.filterwarnings("ignore:.*violated")
def test_the_check_names_every_other_violation():
    torch.manual_seed(0)
    x = torch.randn(256, 20)

    def told(model, x=x):
        return " | ".join(check_self_normalizing(self_normalizing_init_(model), x).violations)

    assert "not standardised" in told(net(), x * 5 + 3)
    assert "one by one" in told(net(), x * 0.5 + torch.sign(torch.randn(20)))
    assert "AlphaDropout" in told(nn.Sequential(nn.Linear(20, 9), SELU(), nn.Dropout(0.1), nn.Linear(9, 2)))
    assert "use SELU" in told(net(activation=nn.ReLU))
    assert "output layer must be linear" in told(nn.Sequential(nn.Linear(20, 9), SELU()))
    assert "norm" in told(nn.Sequential(nn.Linear(20, 9), nn.BatchNorm1d(9), SELU(), nn.Linear(9, 2)))
    assert "residual" in told(hw.residual.Residual(nn.Sequential(nn.Linear(20, 20), SELU(), nn.Linear(20, 20)), 1.0))
    shifted = self_normalizing_init_(net())
    nn.init.constant_(shifted[2].bias, 1.0)
    assert "biases" in " ".join(check_self_normalizing(shifted, x).violations)
    with pytest.raises(TypeError, match="floating tensor"):
        check_self_normalizing(net(), torch.ones(3, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match="looks for linear"):
        check_self_normalizing(nn.ReLU(), x)


def test_the_check_leaves_the_model_as_it_was():
    model = net().train()
    model[1].eval()
    with pytest.warns(UserWarning):
        check_self_normalizing(model, torch.randn(64, 20))
    assert model.training and not model[1].training and not model[0]._forward_hooks


# oracle 8


def test_without_dropout_or_in_evaluation_nothing_changes_bit_for_bit():
    x = torch.randn(50, 8)
    for layer in (
        AlphaDropout(0.0),
        AlphaDropout(0.3).eval(),
        FeatureAlphaDropout(0.3).eval(),
        FeatureAlphaDropout(0.0),
    ):
        assert torch.equal(layer(x), x)
    for p in (-0.1, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            AlphaDropout(p)


def test_in_place_and_out_of_place_agree():
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(40, dtype=torch.float64)
    results = []
    for inplace in (False, True):
        h = x * 1.5
        y = SELU(inplace=inplace)(h)
        results.append((y, torch.autograd.grad(y, x, gy)[0]))
        assert (y.data_ptr() == h.data_ptr()) == inplace
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# oracle 9


@pytest.mark.parametrize("width", [256, 512])
def test_a_hundred_layers_keep_mean_0_and_variance_1(width):
    torch.manual_seed(0)
    x = torch.randn(64, width)
    for _ in range(100):
        x = selu(F.linear(x, lecun_normal_(torch.empty(width, width))))
    assert abs(x.mean().item()) < 0.05 and abs(x.var().item() - 1) < 0.15


# the technique


def classic():
    return nn.Sequential(
        nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 3)
    )  # fmt: skip


def test_one_call_makes_a_plain_net_self_normalizing_and_undo_takes_it_back():
    torch.manual_seed(0)
    model = classic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, x = copy.deepcopy(model), torch.randn(256, 20)
    with pytest.warns(UserWarning, match="lowered to alpha dropout of 0.1"):
        rows = hw.plan(model, hw.SelfNormalizing()).rows
    assert len(rows) == 10 and all(
        torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)
    )
    with pytest.warns(UserWarning, match="lowered"):
        model = hw.apply(model, hw.SelfNormalizing(), optimizer=optimizer)
    assert [type(m).__name__ for m in model] == [
        "Linear",
        "Identity",
        "SELU",
        "AlphaDropout",
        "Linear",
        "SELU",
        "Linear",
    ]
    assert model[5].inplace and model[3].p == 0.1 and check_self_normalizing(model, x).ok
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    model = hw.undo(model, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    assert isinstance(model[1], nn.BatchNorm1d) and model[3].p == 0.5


def test_the_technique_keeps_weights_when_asked_and_ties_always():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    kept = hw.apply(model, SelfNormalizing(initialise=False), copy=True)
    assert torch.equal(kept[0].weight, model[0].weight)
    fresh = hw.apply(model, SelfNormalizing())
    assert fresh[0].weight is fresh[2].weight and not fresh[0].bias.any()


def test_the_technique_says_where_the_theory_ends():
    with pytest.warns(UserWarning, match="keeps 1 norm"):
        hw.apply(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)), SelfNormalizing())
    with pytest.raises(hw.NothingToChange, match=r"nn\.ReLU"):
        hw.apply(nn.Linear(3, 3), SelfNormalizing())
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        SelfNormalizing(max_dropout=1.0)
    conv = hw.apply(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Dropout2d(0.05), nn.Conv2d(4, 2, 3)), SelfNormalizing()
    )
    assert isinstance(conv[1], SELU) and isinstance(conv[2], FeatureAlphaDropout)


@pytest.mark.parametrize("mode", ["autocast", "copies", "one sample", "compile"])
def test_a_self_normalizing_net_lives_in_the_usual_surroundings(mode):
    torch.manual_seed(0)
    model = self_normalizing_init_(nn.Sequential(nn.Linear(6, 16), SELU(), AlphaDropout(0.1), nn.Linear(16, 2)))
    x = torch.randn(12, 6)
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and torch.isfinite(model[0].weight.grad).all()
    elif mode == "copies":
        twin = copy.deepcopy(model).eval()
        twin.load_state_dict(model.state_dict())
        assert set(model.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
        assert torch.equal(twin(x), model.eval()(x))
    elif mode == "one sample":
        for batch in (x[:0], x[:1]):
            model(batch).sum().backward()
        assert model(x[0]).shape == (2,)
    else:
        compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
        a, b = compiled(x), model(x)
        assert torch.allclose(a, b, atol=1e-6)
        grads = [torch.autograd.grad(y.square().sum(), model[0].weight)[0] for y in (a, b)]
        assert torch.allclose(*grads, atol=1e-5)
        assert torch.isfinite(torch.compile(model.train(), backend="aot_eager", fullgraph=True)(x)).all()


def test_every_layer_prints_what_it_is():
    layers = itertools.chain([SELU(), SELU((-0.1, 2.0), inplace=True)], [AlphaDropout(0.1), FeatureAlphaDropout(0.1)])
    assert [repr(layer) for layer in layers] == [
        "SELU()",
        "SELU(fixed_point=(-0.1, 2.0), inplace=True)",
        "AlphaDropout(p=0.1)",
        "FeatureAlphaDropout(p=0.1)",
    ]
