# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false
"""Group-wise whitening and colouring against the method written down as it was released, and the oracles of its equations."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import headway as hw
from headway.norms import (
    GDWCT,
    coloring_factors,
    exact_group_wct,
    group_coloring,
    group_covariance,
    group_whitening_penalty,
    project_alpha,
)
from headway.norms.whitening import GDWCTTerms, coloring_penalty, whitening_penalty

DOUBLE = torch.float64


def made(channels=12, style=8, groups=4, **settings):
    """A layer of random numbers that are far from its start, content and style."""
    torch.manual_seed(channels + groups)
    layer = GDWCT(channels, style, groups, mlp_dim=10, **settings).double()
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.5)
    nn.init.constant_(layer.alpha, 0.7)
    c = 2 + 3 * torch.randn(3, channels, 4, 5, dtype=DOUBLE)
    return layer, c.requires_grad_(), torch.randn(3, style, dtype=DOUBLE, requires_grad=True)


def through(net, x):
    """A network of linear layers and leaky ones, layer by layer."""
    for i, part in enumerate(net):
        x = x @ part.weight.T + part.bias if i % 2 == 0 else torch.where(x > 0, x, 0.01 * x)
    return x


def written_down(layer, c, s):
    """The released form: dense (B, C, C) matrices that are built block by block and masked, one dense product."""
    (b, channels, h, w), g = c.shape, layer.groups
    n = channels // g
    flat = c.permute(1, 0, 2, 3).reshape(channels, -1)
    z = flat - flat.mean(1, keepdim=True)
    cov = torch.stack([part @ part.T / (b * h * w - 1) + 1e-5 * torch.eye(n, dtype=DOUBLE) for part in z.split(n)])
    mask = torch.block_diag(*[torch.ones(n, n, dtype=DOUBLE)] * g)
    X, U = [], []
    for style in s:
        blocks = [through(layer.coloring_net, piece).view(n, n) for piece in style.split(s.shape[1] // g)]
        norms = [(K**2).sum(0).sqrt() + 1e-8 for K in blocks]
        U.append(torch.stack([K / d for K, d in zip(blocks, norms, strict=True)]))
        X.append(
            torch.cat([part @ d.diag() @ part.T for part, d in zip(U[-1], norms, strict=True)]).repeat(1, g) * mask
        )
    X, U = torch.stack(X), torch.stack(U)
    colored = (X @ z.view(channels, b, h * w).permute(1, 0, 2)).view(c.shape)
    y = layer.alpha * (colored + through(layer.mean_net, s)[:, :, None, None]) + (1 - layer.alpha) * c
    eye = torch.eye(n, dtype=DOUBLE)
    return {"y": y, "Sigma": cov, "U": U, "X": X, "R_w": (cov - eye).abs().mean(), "R_c": (U.mT @ U - eye).abs().mean()}


def ours(layer, c, s):
    y, terms = layer(c, s)
    n = layer.channels // layer.groups
    K = layer.coloring_net(s.reshape(len(s) * layer.groups, -1)).view(len(s), layer.groups, n, n)
    X = torch.stack([torch.block_diag(*blocks) for blocks in K @ coloring_factors(K)[0].mT])
    return {"y": y, "Sigma": terms.cov, "U": terms.U, "X": X, "R_w": terms.whitening(), "R_c": terms.coloring()}


@pytest.mark.parametrize("sizes", [(12, 8, 4), (6, 9, 1), (10, 10, 5)])
def test_the_block_its_terms_and_all_gradients_equal_the_method_written_down_with_dense_matrices(sizes):
    layer, c, s = made(*sizes)
    wanted, got = written_down(layer, c, s), ours(layer, c, s)
    inputs = [c, s, *layer.parameters()]
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=name: f"{k}: {m}")
        pull = torch.randn_like(value)
        grads = [torch.autograd.grad((side[name] * pull).sum(), inputs, retain_graph=True, allow_unused=True,
                                     materialize_grads=True) for side in (got, wanted)]  # fmt: skip
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, k=name: f"grad of {k}: {m}")


def test_grouped_equals_dense_masked_in_single_precision():
    layer, c, s = made()
    wanted, layer = written_down(layer, c, s)["y"], layer.float()
    y, _ = layer(c.float(), s.float())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=2e-5)  # of numbers up to 30
    gx, wanted_gx = torch.autograd.grad(y.square().mean(), c)[0], torch.autograd.grad(wanted.square().mean(), c)[0]
    torch.testing.assert_close(gx, wanted_gx, rtol=1e-5, atol=1e-6)


def test_the_coloring_matrix_is_symmetric_and_positive_semi_definite():
    torch.manual_seed(0)
    K = torch.randn(3, 4, 6, 6, dtype=DOUBLE)
    U, d = coloring_factors(K)
    X = U * d[..., None, :] @ U.mT
    torch.testing.assert_close(X, X.mT, rtol=0, atol=1e-6)
    assert torch.linalg.eigvalsh(X).min() >= -1e-6
    torch.testing.assert_close(U.square().sum(-2), torch.ones(3, 4, 6, dtype=DOUBLE))  # columns, not rows
    z = torch.randn(3, 24, 5, 2, dtype=DOUBLE)
    torch.testing.assert_close(group_coloring(z, K).view(3, 4, 6, 10), X @ z.view(3, 4, 6, 10))


def test_orthogonal_columns_are_the_eigenvectors_and_cost_nothing():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2, 3, 5, 5, dtype=DOUBLE))[0]
    d = 0.1 + torch.rand(2, 3, 5, dtype=DOUBLE)
    K = Q * d[..., None, :]
    U, found = coloring_factors(K)
    torch.testing.assert_close((U, found), (Q, d), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(K @ U.mT, Q @ d.diag_embed() @ Q.mT, rtol=1e-6, atol=1e-6)
    assert coloring_penalty(U) < 1e-6
    assert coloring_penalty(U, "released") > 0.1  # which asks for the identity instead
    assert coloring_penalty(torch.eye(5).expand(2, 3, 5, 5), "released") == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_blocks_of_identity_and_the_contents_own_mean_change_nothing(alpha):
    layer, c, s = made()
    asks_for(layer, torch.eye(3, dtype=DOUBLE), c.detach().mean((0, 2, 3)))
    nn.init.constant_(layer.alpha, alpha)
    torch.testing.assert_close(layer(c, s)[0], c, rtol=0, atol=1e-6)


def asks_for(layer, block, mean):
    """Makes the layer colour every group by the same block, whatever the style."""
    with torch.no_grad():
        for net, value in ((layer.coloring_net, block.flatten()), (layer.mean_net, mean)):
            net[-1].weight.zero_()
            net[-1].bias.copy_(value)


def test_one_channel_a_group_scales_and_shifts_as_adain_does_on_centred_features():
    layer, c, s = made(6, 6, 6)
    k = layer.coloring_net(s.reshape(18, 1)).view(3, 6, 1, 1)
    z = c - c.mean((0, 2, 3), keepdim=True)
    styled = k.abs() * z + layer.mean_net(s)[..., None, None]
    torch.testing.assert_close(layer(c, s)[0], layer.alpha * styled + (1 - layer.alpha) * c, rtol=1e-6, atol=1e-6)


def test_exactly_white_features_reach_any_target_covariance_through_its_symmetric_root():
    torch.manual_seed(0)
    z = torch.randn(1, 8, 6, 10, dtype=DOUBLE).flatten(2)
    z = z - z.mean(2, keepdim=True)
    z = torch.linalg.qr(z[0].T)[0].T.reshape(1, 8, 6, 10) * 59**0.5
    torch.testing.assert_close(group_covariance(z, 2, eps=0), torch.eye(4, dtype=DOUBLE).expand(2, 4, 4))
    assert group_whitening_penalty(z, 2) < 1e-5
    A = torch.randn(2, 4, 4, dtype=DOUBLE)
    values, vectors = torch.linalg.eigh(A @ A.mT)  # the target, with its root X = V sqrt(w) V^T
    K = (vectors * values.sqrt()[:, None, :])[None]
    torch.testing.assert_close(group_covariance(group_coloring(z, K), 2, eps=0), A @ A.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_exact_transfer_gives_every_image_the_mean_and_group_covariance_of_its_exemplar(groups):
    torch.manual_seed(0)
    mix = torch.randn(2, 6, 6, dtype=DOUBLE)
    content = torch.randn(2, 6, 8, 9, dtype=DOUBLE) * 3 + 1
    style = (mix @ torch.randn(2, 6, 63, dtype=DOUBLE)).view(2, 6, 9, 7) - 2
    y = exact_group_wct(content, style, groups)
    for mine, wanted in zip(y, style, strict=True):
        torch.testing.assert_close(mine.mean((1, 2)), wanted.mean((1, 2)))
        ours, theirs = (group_covariance(x[None], groups, 0) for x in (mine, wanted))
        assert ((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_with_one_group_the_exact_transfer_is_the_ordinary_one():
    torch.manual_seed(0)
    c, s = torch.randn(4, 30, dtype=DOUBLE), torch.randn(4, 50, dtype=DOUBLE).exp()
    root = torch.linalg.eigh(s.cov())
    inner = torch.linalg.eigh(c.cov())
    whiten = inner[1] @ (inner[0] + 1e-5).rsqrt().diag() @ inner[1].T
    wanted = root[1] @ root[0].sqrt().diag() @ root[1].T @ whiten @ (c - c.mean(1, True)) + s.mean(1, True)
    torch.testing.assert_close(exact_group_wct(c.view(1, 4, 5, 6), s.view(1, 4, 5, 10)).view(4, 30), wanted)


def test_alpha_of_zero_returns_the_content_and_teaches_the_style_nothing():
    layer, c, s = made()
    nn.init.zeros_(layer.alpha)
    y, _ = layer(c, s)
    assert torch.equal(y, c)
    grads = torch.autograd.grad(y.square().sum(), [s, *layer.coloring_net.parameters(), *layer.mean_net.parameters()])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_alpha_is_projected_after_the_step_and_used_as_it_is_before():
    layer, c, s = made()
    assert layer.__class__(12, 8, 4).alpha.item() == pytest.approx(0.6)
    optimizer = torch.optim.SGD([layer.alpha], lr=1.0)
    for sign, bound in ((1, 0.0), (-1, 1.0)):
        optimizer.zero_grad()
        (sign * 5 * layer.alpha).backward()
        optimizer.step()
        assert not 0 <= layer.alpha <= 1
        torch.testing.assert_close(layer(c, s)[0], written_down(layer, c, s)["y"])
        assert project_alpha(layer) is layer and layer.alpha == bound
    with pytest.raises(ValueError, match="holds no GDWCT"):
        project_alpha(nn.Linear(2, 2))


def test_a_column_of_zeros_has_finite_output_and_gradient():
    K = torch.randn(1, 2, 3, 3, dtype=DOUBLE)
    K[0, 1, :, 2] = 0
    K.requires_grad_()
    z = torch.randn(1, 6, 4, dtype=DOUBLE)
    y = group_coloring(z, K)
    for target in ("paper", "released"):
        loss = y.square().sum() + coloring_penalty(coloring_factors(K)[0], target)
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, K, retain_graph=True)[0]).all()


def test_gradients_of_first_and_second_order_are_those_of_finite_differences():
    torch.manual_seed(0)
    z, K = (torch.randn(shape, dtype=DOUBLE, requires_grad=True) for shape in ((2, 4, 3), (2, 2, 2, 2)))
    assert gradcheck(group_coloring, (z, K)) and gradcheck(lambda K: coloring_factors(K), (K,))
    assert gradcheck(lambda z: group_whitening_penalty(z, 2), (z,))
    layer, c, s = made(4, 4, 2)
    c, s = c[:2, :, :2, :2].detach().requires_grad_(), s[:2].detach().requires_grad_()
    for stats in ("batch", "instance"):
        layer.stats = stats
        assert gradcheck(lambda c, s: (lambda y, t: (y, t.cov, t.U))(*layer(c, s)), (c, s))
        assert gradgradcheck(lambda c, s: (lambda y, t: (y, t.cov))(*layer(c, s)), (c, s))


def test_sigma_is_the_covariance_of_the_flattened_pixels_over_the_whole_batch():
    layer, c, s = made()
    _, terms = layer(c, s)
    for group, pixels in zip(terms.cov, c.permute(1, 0, 2, 3).reshape(4, 3, -1), strict=True):
        torch.testing.assert_close(group, pixels.cov() + 1e-5 * torch.eye(3, dtype=DOUBLE), rtol=0, atol=1e-6)
    torch.testing.assert_close(terms.cov, group_covariance(c, 4), rtol=0, atol=1e-12)
    assert group_whitening_penalty(c, 4) == whitening_penalty(group_covariance(c, 4)) > 0


def test_features_far_from_zero_keep_their_covariance_in_single_precision():
    torch.manual_seed(0)
    c = torch.randn(2, 4, 8, 8, dtype=DOUBLE)
    wanted = group_covariance(c, 2)
    torch.testing.assert_close(group_covariance((c + 1000).float(), 2).double(), wanted, rtol=1e-3, atol=1e-4)


def test_all_groups_share_one_coloring_network():
    layer, c, s = made(12, 8, 4)
    same = s[:, :2].repeat(1, 4)
    U = layer(c, same)[1].U
    torch.testing.assert_close(U, U[:, :1].expand_as(U))
    assert layer.coloring_net[0].in_features == 2 and layer.coloring_net[-1].out_features == 9
    assert len([m for m in layer.coloring_net if isinstance(m, nn.Linear)]) == 1 + 3 + 1
    assert [m.out_features for m in layer.mean_net if isinstance(m, nn.Linear)] == [8, 8, 12]


@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_mix_images_and_instance_statistics_do_not(training):
    for stats, alone in (("batch", False), ("instance", True)):
        layer, c, s = made(stats=stats)
        layer.train(training)
        one = layer(c[:1], s[:1])[0]
        assert torch.allclose(layer(c, s)[0][:1], one) == alone
    assert not layer.state_dict().keys() & {"running_mean", "running_var"}


def test_training_and_evaluation_are_the_same_and_keep_no_state():
    layer, c, s = made()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = layer.train()(c, s)[0], layer.eval()(c, s)[0]
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_what_is_not_a_number_goes_through_and_poisons_nothing():
    layer, c, s = made(stats="instance")
    bad = c.detach().clone()
    bad[1, 0, 0, 0] = torch.nan
    y = layer(bad, s)[0]
    assert y[1, :3].isnan().all() and torch.isfinite(y[[0, 2]]).all() and torch.isfinite(y[1, 3:]).all()
    assert torch.isfinite(layer(c, s)[0]).all()
    bad[1, 0, 0, 0] = torch.inf
    assert not torch.isfinite(layer(bad, s)[0]).all()


def test_a_batch_of_one_and_a_style_with_two_axes_of_one():
    layer, c, s = made()
    torch.testing.assert_close(layer(c[:1], s[:1, :, None, None])[0], written_down(layer, c[:1], s[:1])["y"])


@pytest.mark.parametrize(
    ("shape", "style", "words"),
    [
        ((0, 12, 4, 5), (0, 8), "two positions"),
        ((1, 12, 1, 1), (1, 8), "two positions"),
        ((3, 12, 4), (3, 8), r"the content is \(B, 12, H, W\)"),
        ((3, 10, 4, 5), (3, 8), r"the content is \(B, 12, H, W\)"),
        ((3, 12, 4, 5), (2, 8), r"the style is \(3, 8\)"),
        ((3, 12, 4, 5), (3, 8, 2, 2), r"the style is \(3, 8\)"),
        ((3, 12, 4, 5), (3, 9), r"the style is \(3, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_met_with_a_sentence(shape, style, words):
    with pytest.raises(ValueError, match=words):
        GDWCT(12, 8, 4)(torch.randn(shape), torch.randn(style))


def test_settings_that_do_not_fit_are_met_with_a_sentence():
    for given, words in (
        ({"groups": 5}, "groups must divide channels"),
        ({"channels": 16, "style_dim": 6, "groups": 4}, "groups must divide style_dim"),
        ({"groups": 0}, "groups must divide"),
        ({"stats": "layer"}, '"batch" or "instance"'),
        ({"alpha_init": 1.5}, "alpha_init between 0 and 1"),
        ({"mlp_dim": 0}, "mlp_dim is at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            GDWCT(**{"channels": 12, "style_dim": 8, "groups": 4, **given})
    x = torch.randn(2, 4, 3, 3)
    for call, words in (
        (lambda: group_whitening_penalty(x, 3), "groups must divide C"),
        (lambda: group_whitening_penalty(x[0, 0], 1), "axis of space"),
        (lambda: group_covariance(x[:1, :, :1, :1], 1), "two positions"),
        (lambda: group_coloring(x, torch.randn(2, 2, 3, 3)), r"K is \(B, G, n, n\)"),
        (lambda: coloring_factors(torch.randn(2, 3)), "square blocks"),
        (lambda: coloring_penalty(torch.eye(2), "mean"), '"paper" or "released"'),
        (lambda: exact_group_wct(x, x[:1]), "the same B and C"),
        (lambda: exact_group_wct(x, x[..., :1, :1]), "two positions"),
        (lambda: GDWCT(4, 4, 4, stats="instance")(x[..., :1, :1], torch.randn(2, 4)), "two positions"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_singular_covariance_is_told_once():
    layer = GDWCT(8, 8, 1, mlp_dim=8)
    c, s = torch.randn(1, 8, 2, 3), torch.randn(1, 8)
    with pytest.warns(UserWarning, match="8 channels from 6 positions are singular"):
        layer(c, s)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(c, s)
        GDWCT(8, 8, 4, mlp_dim=8)(c, s)


def test_under_autocast_statistics_and_factors_stay_in_full_precision():
    layer, c, s = made()
    wanted = layer(c, s)
    layer, c, s = layer.float(), c.detach().bfloat16().requires_grad_(), s.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, terms = layer(c, s)
        penalty = terms.whitening() + terms.coloring()
    assert y.dtype == torch.bfloat16 and terms.cov.dtype == terms.U.dtype == penalty.dtype == torch.float32
    torch.testing.assert_close(terms.cov.double(), wanted[1].cov, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y.double(), wanted[0], rtol=5e-2, atol=0.3)
    (y.float().square().mean() + penalty).backward()
    assert c.grad.dtype == torch.bfloat16 and torch.isfinite(c.grad.float()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_is_near_the_one_in_double(dtype):
    layer, c, s = made()
    wanted = layer(c, s)[0]
    y, terms = layer.to(dtype)(c.detach().to(dtype), s.detach().to(dtype))
    assert y.dtype == dtype and terms.cov.dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted, rtol=5e-2, atol=0.5)


def test_it_compiles_into_one_graph():
    layer, c, s = made()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, terms = compiled(c, s)
    torch.testing.assert_close((y, terms.cov, terms.U), (lambda y, t: (y, t.cov, t.U))(*layer(c, s)))
    grads = [torch.autograd.grad(f(c, s)[0].square().sum() + f(c, s)[1].whitening(), [c, s]) for f in (compiled, layer)]
    torch.testing.assert_close(*grads)


def test_copies_and_states_carry_everything_also_the_released_shape_of_alpha():
    layer, c, s = made()
    other = copy.deepcopy(layer)
    assert torch.equal(other(c, s)[0], layer(c, s)[0])
    fresh = GDWCT(12, 8, 4, mlp_dim=10).double()
    state = layer.state_dict()
    state["alpha"] = state["alpha"].reshape(1)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(c, s)[0], layer(c, s)[0]) and fresh.alpha.shape == ()


def test_content_in_another_memory_order_gives_the_same():
    layer, c, s = made()
    turned = c.detach().to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(turned, s)[0], layer(c, s)[0])


def test_it_is_on_the_face():
    assert hw.norms.GDWCT is GDWCT and hw.functional.group_coloring is group_coloring
    assert isinstance(GDWCT(8, 8)(torch.randn(2, 8, 3, 3), torch.randn(2, 8))[1], GDWCTTerms)


STEP = (slice(0, 1), slice(1, 3))


def _pass(layer, c, s, pull):
    y, terms = layer(c, s)
    grads = torch.autograd.grad((y * pull).sum() + 10 * len(c) / 3 * terms.whitening(), [c, *layer.parameters()])
    return y.detach(), terms.cov.detach(), grads


def _rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        found = {}
        for stats in ("batch", "instance"):
            layer, c, s = made(stats=stats, sync=True)
            pull = torch.linspace(-1, 1, c.numel(), dtype=DOUBLE).view(c.shape)
            mine = [t[STEP[rank]].detach() for t in (c, s, pull)]
            found[stats] = _pass(layer, mine[0].requires_grad_(), *mine[1:])
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_with_sync_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for stats in ("batch", "instance"):
        layer, c, s = made(stats=stats, sync=True)
        pull = torch.linspace(-1, 1, c.numel(), dtype=DOUBLE).view(c.shape)
        y, cov, grads = _pass(layer, c, s, pull)
        (y0, cov0, grads0), (y1, cov1, grads1) = (part[stats] for part in parts)
        torch.testing.assert_close(torch.cat([y0, y1]), y)
        torch.testing.assert_close((cov0, cov1), (cov, cov))
        torch.testing.assert_close(torch.cat([grads0[0], grads1[0]]), grads[0])
        for mine, other, wanted in zip(grads0[1:], grads1[1:], grads[1:], strict=True):
            torch.testing.assert_close(mine + other, wanted)
