"""CEMA's parts: the choice of samples, the loss, batch renormalisation, against independent plain formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headway as hw
from headway.learning.cloud_edge.affine import affine_parameters, named_affine_parameters, only_norms_train, travelling
from headway.learning.cloud_edge.distillation import SelectiveEntropyDistillation, entropy_loss
from headway.learning.cloud_edge.renorm import BatchRenorm
from headway.learning.cloud_edge.selection import (
    EntropyThreshold,
    RandomSelection,
    RedundancyFilter,
    entropy,
    select_samples,
)

DOUBLE = {"dtype": torch.float64}


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


# selection


def test_entropy_is_natural_and_that_of_the_uniform_distribution_is_ln_C():
    torch.testing.assert_close(entropy(torch.zeros(3, 7)), torch.full((3,), math.log(7)))
    z = randn(5, 4)
    p = z.exp() / z.exp().sum(1, keepdim=True)
    torch.testing.assert_close(entropy(z), -(p * p.log()).sum(1))
    assert entropy(torch.tensor([[0.0, -math.inf, 0.0]])).item() == pytest.approx(math.log(2))
    assert entropy(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype is torch.float32


def test_a_sample_is_kept_strictly_between_the_thresholds():
    z = randn(64, 10, scale=3.0)
    h = entropy(z)
    low, high = h.sort().values[[10, 50]].tolist()
    mask = select_samples(z, low, high)
    assert mask.sum() == 39 and torch.equal(mask, (h > low) & (h < high))
    assert not select_samples(torch.tensor([[math.nan, 0.0], [math.inf, 0.0]]), -1.0, 9.0).any()
    assert select_samples(torch.zeros(0, 4), 0.0, 1.0).shape == (0,)


def test_masks_and_thresholds_over_six_batches_follow_the_released_form():
    threshold = EntropyThreshold(10, coeff=0.9, warmup=40)
    top, bottom, everything, warm = 0.4 * math.log(10), 0.02 * math.log(10), [], None
    for i in range(6):
        z = randn(16, 10, seed=i, scale=2.0 + i)
        H = entropy(z)
        threshold.update(H)
        everything += H.tolist()
        mean = sum(everything) / len(everything)
        if warm is None and len(everything) >= 40:
            warm = mean
        wanted = top if warm is None else top * 0.9 * mean / warm
        assert threshold.e_max == pytest.approx(wanted, abs=1e-12)
        assert threshold.mask(H).tolist() == [bottom < h < wanted for h in H.tolist()]
        # a stream that goes on elsewhere
        twin = EntropyThreshold(10, coeff=0.9, warmup=40)
        twin.load_state_dict(threshold.state_dict())
        threshold = twin
    assert threshold.e_max0 == pytest.approx(top) and i == 5


def test_a_constant_stream_keeps_the_threshold_and_a_doubled_one_doubles_it():
    threshold = EntropyThreshold(10, warmup=100)
    for _ in range(50):
        threshold.update(torch.full((10,), 0.3))
        assert threshold.e_max == pytest.approx(threshold.e_max0)
    for _ in range(20_000):
        threshold.update(torch.full((100,), 0.6))
    assert threshold.mean == pytest.approx(0.6, rel=1e-3)
    assert threshold.e_max == pytest.approx(2 * threshold.e_max0, rel=1e-3)


def test_the_mean_counts_every_sample_but_those_that_are_not_finite():
    threshold = EntropyThreshold(4, warmup=None)
    threshold.update(torch.tensor([0.0, 1.0, math.nan, 1.1]))
    threshold.update(torch.zeros(0))
    assert threshold.seen == 3 and threshold.mean == pytest.approx(0.7)
    assert threshold.e_max == threshold.e_max0


@pytest.mark.parametrize("bad", [{"hi": 0.02}, {"lo": -1.0}, {"coeff": 0.0}, {"warmup": 0}, {"num_classes": 1}])
def test_thresholds_with_nothing_between_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be|are needed"):
        EntropyThreshold(**{"num_classes": 10, **bad})


def test_redundant_samples_point_where_the_kept_ones_pointed():
    keep, q = RedundancyFilter(margin=0.6), None
    for i in range(5):
        z = randn(12, 6, seed=i, scale=4.0)
        p = z.softmax(1)
        mask = keep.mask(z)
        if q is None:
            wanted, q = [True] * 12, p.mean(0)
        else:
            wanted = [abs(float(F.cosine_similarity(row, q, dim=0))) < 0.6 for row in p]
            q = 0.9 * q + 0.1 * p[torch.tensor(wanted)].mean(0) if any(wanted) else q
        assert mask.tolist() == wanted
        torch.testing.assert_close(keep.average, q)
        twin = RedundancyFilter(margin=0.6)
        twin.load_state_dict(keep.state_dict())
        keep = twin
        keep.average = q
    assert 0 < sum(wanted) < 12
    assert RedundancyFilter().mask(torch.zeros(0, 3)).shape == (0,)


def test_the_random_control_keeps_its_share():
    assert 0.27 < RandomSelection(0.3).mask(torch.zeros(4000, 2)).double().mean() < 0.33
    assert RandomSelection(1.0).mask(torch.zeros(99, 2)).all()


# the loss


def plain_loss(s, T, e, alpha=3.0, beta=3.0, gamma=1.0, tau=1.0):
    """The loss sample by sample, class by class, in words of its own."""
    total = 0.0
    for a, b in zip(s, T.detach(), strict=True):
        p, q = torch.softmax(b, 0), torch.softmax(a, 0)
        H, HT = -(q * q.log()).sum(), -(p * p.log()).sum()
        pt, qt = torch.softmax(b / tau, 0), torch.softmax(a / tau, 0)
        kl = (pt * (pt / qt).log()).sum()
        v = torch.exp(e - HT)
        total = total + alpha * torch.exp(e - H.detach()) * H
        total = total + beta * v * tau**2 * kl - gamma * v * q[b.argmax()].log()
    return total / len(s)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), C=st.integers(2, 8), tau=st.sampled_from([0.5, 1.0, 4.0]), seed=st.integers(0, 99))
def test_the_loss_and_its_gradient_are_those_of_the_plain_formula(n, C, tau, seed):
    s, T = randn(n, C, seed=seed, scale=2.0).requires_grad_(), randn(n, C, seed=seed + 100, scale=3.0).requires_grad_()
    e = 0.4 * math.log(C)
    ours = SelectiveEntropyDistillation(2.0, 3.0, 0.5, tau, e)(s, T)
    plain = plain_loss(s, T, e, 2.0, 3.0, 0.5, tau)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    (mine,), (theirs,) = torch.autograd.grad(ours, s, retain_graph=True), torch.autograd.grad(plain, s)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(ours, T, allow_unused=True) == (None,)


def test_pseudo_labels_alone_are_cross_entropy():
    s, T = randn(9, 5), randn(9, 5, seed=1)
    loss = SelectiveEntropyDistillation(0.0, 0.0, 1.0)(s, T)
    torch.testing.assert_close(loss, F.cross_entropy(s, T.argmax(1)))


def test_a_teacher_that_says_the_same_has_no_divergence_and_no_gradient():
    s = randn(9, 5).requires_grad_()
    loss = SelectiveEntropyDistillation(0.0, 1.0, 0.0, 2.0, 0.5)(s, s.detach())
    loss.backward()
    assert abs(loss.item()) < 1e-12 and s.grad.abs().max() < 1e-12


def test_weights_are_one_where_the_entropy_is_the_threshold():
    z = randn(1, 5)
    H = entropy(z).item()
    torch.testing.assert_close(entropy_loss(z, H), torch.tensor(H, **DOUBLE))
    weighted = SelectiveEntropyDistillation(0.0, 3.0, 1.0, 1.0, H)(randn(1, 5, seed=3), z)
    torch.testing.assert_close(weighted, SelectiveEntropyDistillation(0.0, 3.0, 1.0)(randn(1, 5, seed=3), z))


def test_the_loss_refuses_what_it_cannot_mean():
    loss = SelectiveEntropyDistillation()
    with pytest.raises(ValueError, match="same samples and classes"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="teacher's logits are not finite"):
        loss(torch.zeros(2, 3), torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match="tau > 0"):
        SelectiveEntropyDistillation(tau=0)
    empty = torch.zeros(0, 3, requires_grad=True)
    assert loss(empty, torch.zeros(0, 3)).item() == 0
    assert loss(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)).dtype is torch.float32


# batch renormalisation


def renorm_by_hand(x, w, b, mean, var, eps=1e-5, momentum=0.1):
    """One training pass written out: the output, and the statistics after it."""
    mu = x.mean((0, 2, 3), keepdim=True)
    sd = (((x - mu) ** 2).sum((0, 2, 3), keepdim=True) / (x[:, 0].numel() - 1) + eps).sqrt()
    run = (var.view(1, -1, 1, 1) + eps).sqrt()
    r, d = (sd / run).detach(), ((mu - mean.view(1, -1, 1, 1)) / run).detach()
    y = w.view(1, -1, 1, 1) * ((x - mu) / sd * r + d) + b.view(1, -1, 1, 1)
    batch = mu.flatten().detach(), (sd.detach() ** 2 - eps).flatten()
    return y, mean + momentum * (batch[0] - mean), var + momentum * (batch[1] - var)


@pytest.mark.parametrize("reset", [False, True])
def test_three_batches_through_renorm_are_those_written_out(reset):
    layer = BatchRenorm(3, reset_stats=reset, **DOUBLE)
    with torch.no_grad():
        layer.weight.copy_(randn(3, seed=7) + 2)
        layer.bias.copy_(randn(3, seed=8))
    mean, var = torch.zeros(3, **DOUBLE), torch.ones(3, **DOUBLE)
    for i in range(3):
        x = (randn(4, 3, 5, 5, seed=i) * (i + 1) + i).requires_grad_()
        if reset and i == 0:
            mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3))
        wanted, mean, var = renorm_by_hand(x, layer.weight, layer.bias, mean, var)
        ours = layer(x)
        upstream = randn(4, 3, 5, 5, seed=i + 50)
        inputs = (x, layer.weight, layer.bias)
        mine, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (ours, wanted))
        torch.testing.assert_close((ours, *mine), (wanted, *theirs), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var), rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 3


def test_renorm_whose_statistics_are_the_batchs_is_batch_norm():
    x = randn(6, 3, 4, 4)
    layer, plain = BatchRenorm(3, reset_stats=True, **DOUBLE), nn.BatchNorm2d(3, **DOUBLE)
    # batch norm divides by the biased deviation, renorm by the unbiased one
    unbiased = plain(x) * ((x.var((0, 2, 3), unbiased=False) + 1e-5) / (x.var((0, 2, 3)) + 1e-5)).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(layer(x), unbiased)


def test_renorm_in_evaluation_is_batch_norm_and_its_training_output_is_that_too():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    for _ in range(3):
        net(randn(8, 3, 5, 5) * 2 + 1)
    twin = BatchRenorm.convert(copy.deepcopy(net))
    x = randn(5, 3, 5, 5, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))
    wanted = net.eval()(x)
    torch.testing.assert_close(twin.eval()(x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(twin.train()(x), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twin.eval()(x[:1]), twin(x)[:1])


def test_renorm_takes_any_axes_empty_batches_and_half_precision_and_refuses_single_values():
    for shape in [(8, 3), (8, 3, 4), (2, 3, 2, 2, 2)]:
        assert BatchRenorm(3)(torch.randn(shape)).shape == shape
    layer = BatchRenorm(3)
    assert layer(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2) and layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="more than one value"):
        layer(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"shape \(N, 3"):
        layer(torch.zeros(2, 4))
    half = layer.to(torch.bfloat16)
    assert half.running_mean.dtype is torch.float32
    assert half(torch.randn(8, 3).bfloat16()).dtype is torch.bfloat16
    with layer.freeze_statistics():
        before = layer.running_mean.clone()
        layer(torch.randn(8, 3).bfloat16())
    assert torch.equal(before, layer.running_mean)


def test_renorm_passes_gradcheck():
    # in training r and d have no gradient, so that no finite difference can see it; the formula written out above does
    layer = BatchRenorm(2, **DOUBLE).eval()
    assert torch.autograd.gradcheck(layer, (randn(5, 2, 3).requires_grad_(),))


def test_a_reset_renorm_is_defined_by_its_first_batch_also_in_evaluation_and_after_loading():
    layer = BatchRenorm(2, reset_stats=True).eval()
    x = torch.randn(50, 2) * 3 + 1
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    fresh = BatchRenorm(2, reset_stats=True)
    fresh.load_state_dict(BatchRenorm(2, reset_stats=True).state_dict())
    fresh(x)
    torch.testing.assert_close(fresh.running_var, x.var(0))
    loaded = BatchRenorm(2, reset_stats=True)
    trained = nn.BatchNorm1d(2)
    trained(x)
    loaded.load_state_dict(trained.state_dict())
    loaded.eval()(x)
    assert torch.equal(loaded.running_mean, trained.running_mean)


def test_apply_puts_renorm_in_and_undo_takes_it_out():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    changed = hw.apply(net, BatchRenorm)
    assert isinstance(changed[1], BatchRenorm)
    assert isinstance(hw.undo(changed)[1], nn.BatchNorm2d)
    bare = nn.Sequential(nn.Linear(2, 2))
    assert BatchRenorm.convert(bare) is bare


# what adapts


def test_only_scales_and_shifts_of_norms_are_adapted():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    net = nn.ModuleDict({
        "a": nn.BatchNorm2d(2), "b": nn.LayerNorm(4), "c": nn.GroupNorm(1, 2), "d": nn.RMSNorm(4), "e": OddRMSNorm(),
        "f": nn.Linear(2, 2), "g": nn.BatchNorm2d(2, affine=False), "h": nn.LayerNorm(4, bias=False), "i": BatchRenorm(2),
    })  # fmt: skip
    wanted = ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias", "d.weight", "e.weight", "h.weight",
              "i.weight", "i.bias"]  # fmt: skip
    assert list(named_affine_parameters(net)) == wanted
    assert len(affine_parameters(net)) == len(wanted)
    assert {name for name in travelling(net) if "running" in name} == {
        f"{key}.running_{what}" for key in "agi" for what in ("mean", "var")
    }
    with pytest.raises(ValueError, match=r"no normalisation.*Linear"):
        affine_parameters(nn.Linear(2, 2))


def test_only_norms_go_in_training_mode():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.LayerNorm(2))
    only_norms_train(net, True)
    assert [module.training for module in net] == [False, True, True]
    only_norms_train(net, False)
    assert not any(module.training for module in net.modules())


def test_two_processes_that_share_a_batch_are_one_with_the_whole_of_it(nets, forks, tmp_path):
    processes = [forks.Process(target=nets.renorm_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = nets.renorm_passes(slice(0, 6), False)
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([a[name], b[name]]), whole[name])
    for name in ("weight", "bias"):
        torch.testing.assert_close(a[name] + b[name], whole[name])
    for name in ("mean", "var"):
        torch.testing.assert_close(a[name], whole[name])
        assert torch.equal(a[name], b[name])
