# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false, reportGeneralTypeIssues=false
# pyright: reportOptionalSubscript=false
"""AdaB2N against the method written down, and what its weights, its rate and its penalty must do."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from headway.kernels.planes import Tasks
from headway.norms.balanced import AdaB2N1d, AdaB2N2d, AdaB2N3d
from headway.norms.balancing import balance_penalty, start_task, task_batch

DOUBLE = torch.float64
# (current task, ids): one task; two; three; three of which the middle one is absent
STREAM = [(0, [0, 0, 0, 0]), (1, [1, 1, 0, 1]), (2, [2, 2, 0, 1]), (2, [2, 0, 2, 2]), (2, [1, 2, 0, 0])]


def randomised(layer, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return layer.double()


class WrittenDown:
    """Batch statistics, running values and rate, as in the paper, with loops over samples and tasks."""

    def __init__(self, channels, kappa, mu=0.1, renormalize=False):
        self.kappa, self.mu, self.renormalize, self.eta = kappa, mu, renormalize, None
        self.running = torch.stack([torch.zeros(channels), torch.ones(channels)]).double()

    def statistics(self, x, ids, cur, omega):
        if cur == 0:
            return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        n = [ids.count(j) for j in range(cur + 1)]
        pi = [omega[j].exp() + n[j] for j in range(cur + 1)]
        if self.renormalize:
            pi = [p if k else p * 0 for p, k in zip(pi, n, strict=True)]
        total = sum(pi)
        w = [pi[k] / total / n[k] for k in ids]
        mean = sum(w[i] * x[i].mean((1, 2)) for i in range(len(ids)))
        var = sum(w[i] * (x[i] - mean[:, None, None]).square().mean((1, 2)) for i in range(len(ids)))
        return mean, var

    def step(self, x, ids, cur, omega, weight, bias):
        mean, var = self.statistics(x, ids, cur, omega)
        self.eta = self.mu**self.kappa if self.eta is None else self.eta / (self.eta + (1 - self.mu) ** self.kappa)
        self.running = self.running + self.eta * (torch.stack([mean, var]).detach() - self.running)
        penalty = (mean - self.running[0]).square().mean() + (var - self.running[1]).square().mean()

        def channel(v):
            return v[:, None, None]

        y = channel(weight) * (x - channel(mean)) / channel(var + 1e-5).sqrt() + channel(bias)
        return y, penalty


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("kappa", [1, 0.4, 0])
def test_outputs_gradients_running_values_and_rate_equal_the_method_written_down(kappa, renormalize):
    torch.manual_seed(0)
    layer = randomised(AdaB2N2d(4, 3, kappa, renormalize=renormalize))
    account = WrittenDown(4, kappa, renormalize=renormalize)
    leaves = (layer.weight, layer.bias, layer.task_weight)
    for cur, ids in STREAM:
        start_task(layer, cur)
        x = (torch.randn(4, 4, 3, 2, dtype=DOUBLE) * 2 + 1).requires_grad_()
        gy = torch.randn_like(x)
        with task_batch(layer, torch.tensor(ids)):
            y = layer(x)
        wanted, penalty = account.step(x, ids, cur, layer.task_weight, layer.weight, layer.bias)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        ours, theirs = (y * gy).sum() + 0.3 * balance_penalty(layer, 0), (wanted * gy).sum() + 0.3 * penalty
        torch.testing.assert_close(balance_penalty(layer, 0), penalty, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(out, (x, *leaves), allow_unused=True) for out in (ours, theirs)]
        for got, expected in zip(*grads, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            torch.stack([layer.running_mean, layer.running_var]), account.running, rtol=1e-10, atol=1e-10
        )
        assert float(layer.eta) == pytest.approx(account.eta, rel=1e-10)


# oracle 2
def test_the_first_task_is_batch_norm_in_training():
    torch.manual_seed(0)
    layer, x = AdaB2N2d(4, 3).double(), (torch.randn(3, 4, 5, 5, dtype=DOUBLE) * 2 + 1).requires_grad_()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    gy, leaves = torch.randn(3, 4, 5, 5, dtype=DOUBLE), (x, layer.weight, layer.bias)
    y, wanted = layer(x), F.batch_norm(x, None, None, layer.weight, layer.bias, True)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, gy), torch.autograd.grad(wanted, leaves, gy), rtol=1e-6, atol=1e-6
    )


# oracle 2
def test_kappa_0_averages_all_batches_as_batch_norm_without_momentum_does():
    torch.manual_seed(0)
    layer, bn = AdaB2N2d(4, 1, kappa=0), nn.BatchNorm2d(4, momentum=None)
    means = []
    for _ in range(20):
        x = torch.randn(3, 4, 2, 2) + torch.randn(4, 1, 1)
        layer(x), bn(x)
        means.append(x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_mean, bn.running_mean, rtol=1e-6, atol=1e-6)


def balanced(omega, ids, renormalize=False, cur=2):
    """Momentum 1 makes the running values those of the batch."""
    layer = AdaB2N2d(4, 3, momentum=1.0, init_task_weight=omega, renormalize=renormalize).double()
    start_task(layer, cur)
    torch.manual_seed(0)
    x = torch.randn(len(ids), 4, 3, 3, dtype=DOUBLE) * 2 + torch.tensor(ids)[:, None, None, None]
    with task_batch(layer, torch.tensor(ids)):
        layer(x)
    return layer, x, (layer.running_mean.clone(), layer.running_var.clone())


# oracle 3
def test_omega_far_below_0_gives_ordinary_batch_statistics():
    _, x, (mean, var) = balanced(-40.0, [0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, x.var((0, 2, 3), unbiased=False), rtol=1e-6, atol=1e-6)


# oracle 4
@pytest.mark.parametrize("omega", [40.0, 2000.0])
def test_omega_far_above_0_weighs_every_task_the_same(omega):
    ids = [0, 0, 0, 1, 2, 2]
    _, x, (mean, _) = balanced(omega, ids)
    by_task = torch.stack([x[torch.tensor(ids) == k].mean((0, 2, 3)) for k in range(3)])
    torch.testing.assert_close(mean, by_task.mean(0), rtol=1e-6, atol=1e-6)


# oracle 5
def test_the_rate_follows_its_recursion_to_its_fixed_point():
    mu = 0.1
    layer, seen = AdaB2N1d(2, 1, kappa=0.4), []
    for _ in range(400):
        layer(torch.randn(4, 2))
        seen.append(float(layer.eta))
    assert seen[:3] == pytest.approx([0.398, 0.293, 0.234], abs=5e-4)
    for before, after in pairwise(seen):
        assert after == pytest.approx(before / (before + (1 - mu) ** 0.4), rel=1e-12)
    assert seen[-1] == pytest.approx(1 - (1 - mu) ** 0.4, abs=1e-6) == pytest.approx(0.0413, abs=1e-4)
    layer = AdaB2N1d(2, 1, kappa=1e-6)
    for t in range(1, 101):
        layer(torch.randn(4, 2))
        assert float(layer.eta) == pytest.approx(1 / t, abs=1e-3)
    layer = AdaB2N1d(2, 1, kappa=1)
    for _ in range(5):
        layer(torch.randn(4, 2))
        assert float(layer.eta) == pytest.approx(mu, rel=1e-12)


# oracle 6
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("ids", [[0, 1, 2, 2], [0, 2, 2, 2]])
def test_a_shift_moves_the_mean_by_the_sum_of_the_shares(ids, renormalize):
    layer, x, (mean, _) = balanced(0.0, ids, renormalize)
    counts = torch.bincount(torch.tensor(ids), minlength=3)
    total = float(Tasks(layer.task_weight.detach(), torch.tensor(ids), counts, 3, renormalize).shares().sum())
    with task_batch(layer, torch.tensor(ids)):
        layer(x + 5)
    torch.testing.assert_close(layer.running_mean - mean, torch.full((4,), 5 * total, dtype=DOUBLE))
    assert (abs(total - 1) < 1e-12) == (renormalize or 1 in ids)


# oracle 7
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck_with_the_penalty(renormalize):
    torch.manual_seed(0)
    # so slow that what the penalty is compared with stays, as the constant that it counts as
    layer = randomised(AdaB2N2d(3, 3, 1, momentum=1e-12, renormalize=renormalize))
    start_task(layer, 2)
    x, names = torch.randn(4, 3, 2, 2, dtype=DOUBLE, requires_grad=True), ("weight", "bias", "task_weight")

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        with task_batch(layer, torch.tensor([2, 0, 2, 2])), layer.freeze_statistics():
            return torch.func.functional_call(layer, given, x), layer.penalty()

    layer.running_mean.copy_(torch.rand(3))
    assert torch.autograd.gradcheck(call, (x, *(getattr(layer, name) for name in names)))


# oracle 8
def test_two_forwards_then_two_backwards_give_each_its_own_penalty():
    torch.manual_seed(0)
    layer = AdaB2N2d(3, 2, 0.4).double()
    start_task(layer, 1)
    twin, xs = copy.deepcopy(layer), torch.randn(2, 4, 3, 2, 2, dtype=DOUBLE)
    ids, wanted = torch.tensor([1, 0, 1, 1]), []
    for x in xs:  # one after the other
        twin.zero_grad()
        with task_batch(twin, ids):
            twin(x)
        balance_penalty(twin).backward()
        wanted.append(twin.task_weight.grad.clone())
    penalties = []
    for x in xs:
        with task_batch(layer, ids):
            layer(x)
        penalties.append(balance_penalty(layer))
    for penalty, expected in zip(penalties, wanted, strict=True):
        layer.zero_grad()
        penalty.backward()
        torch.testing.assert_close(layer.task_weight.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kappa", [1, 0.4, 0])
def test_a_released_state_without_the_rate_goes_on_at_the_rate_of_its_batches(kappa):
    layer = AdaB2N2d(3, 2, kappa)
    for _ in range(7):
        layer(torch.randn(2, 3, 2, 2))
    state = {key: value for key, value in layer.state_dict().items() if key != "eta"}
    other = nn.Sequential(AdaB2N2d(3, 2, kappa))
    other.load_state_dict({f"0.{key}": value for key, value in state.items()})
    torch.testing.assert_close(other[0].eta, layer.eta, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind, shape", [(AdaB2N1d, (4, 3)), (AdaB2N1d, (4, 3, 5)), (AdaB2N3d, (4, 3, 2, 2, 2))])
def test_other_dimensions_are_the_same_layer(kind, shape):
    torch.manual_seed(0)
    x, layer, flat = torch.randn(shape), kind(3, 2), AdaB2N2d(3, 2)
    for one in (layer, flat):
        start_task(one, 1)
    with task_batch(nn.ModuleList([layer, flat]), torch.tensor([1, 0, 1, 1])):
        torch.testing.assert_close(layer(x), flat(x.reshape(4, 3, -1, 1)).reshape(shape))
    torch.testing.assert_close(layer.state_dict(), flat.state_dict())


def test_nan_empty_and_single_batches():
    layer = AdaB2N2d(3, 2, 0.4)
    layer(torch.randn(2, 3, 2, 2))
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "num_batches_tracked"}
    layer(torch.full((1, 3, 2, 2), torch.nan))
    empty = layer(torch.zeros(0, 3, 2, 2, requires_grad=True))
    empty.sum().backward()
    assert empty.shape == (0, 3, 2, 2)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())
    with pytest.warns(UserWarning, match="variance is 0"):
        y = layer(torch.randn(1, 3, 1, 1))
    torch.testing.assert_close(y, torch.zeros(1, 3, 1, 1))


def test_checkpointing_moves_the_statistics_once():
    torch.manual_seed(0)
    layer, x = AdaB2N2d(3, 2, 0.4), torch.randn(4, 3, 2, 2, requires_grad=True)
    start_task(layer, 1)
    plain, ids = copy.deepcopy(layer), torch.tensor([1, 0, 1, 1])
    contexts = lambda: (layer.freeze_statistics(), nullcontext())  # noqa: E731
    with task_batch(plain, ids):
        plain(x).pow(3).sum().backward()
    with task_batch(layer, ids):
        checkpoint(layer, x, use_reentrant=False, context_fn=contexts).pow(3).sum().backward()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    torch.testing.assert_close(layer.task_weight.grad, plain.task_weight.grad)


def test_compiled_and_half_precision_training():
    torch.manual_seed(0)
    layer, x = AdaB2N2d(3, 2, 0.4), torch.randn(4, 3, 2, 2, requires_grad=True)
    start_task(layer, 1)
    other, ids = copy.deepcopy(layer), torch.tensor([1, 0, 1, 1])
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with task_batch(layer, ids), task_batch(other, ids):
            y, z = layer(x), fast(x)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(z.square().sum(), x))
    torch.testing.assert_close(layer.state_dict(), other.state_dict())
    half = AdaB2N2d(3, 2).bfloat16()
    start_task(half, 1)
    with task_batch(half, ids):
        assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.running_mean.dtype == torch.float32 and half.eta.dtype == torch.float64
    assert half.eval()(x.bfloat16()).dtype == torch.bfloat16
    single = AdaB2N2d(3, 2).double().float()
    single(x)
    assert single.running_mean.dtype == torch.float32 and single.eta.dtype == torch.float64
    with task_batch(layer, ids), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(layer(x)).all()


def test_bad_input_is_refused():
    for settings, words in (({"kappa": 1.5}, "kappa"), ({"momentum": None}, "momentum"), ({"momentum": 0}, "momentum")):
        with pytest.raises(ValueError, match=words):
            AdaB2N2d(3, 2, **settings)
    with pytest.raises(ValueError, match="num_tasks"):
        AdaB2N2d(3, 0)
    with pytest.raises(ValueError, match="momentum"):
        AdaB2N2d.from_batchnorm(nn.BatchNorm2d(3, momentum=None), 2)
    with pytest.raises(ValueError, match="keeps no running"):
        AdaB2N2d.from_batchnorm(nn.BatchNorm2d(3, track_running_stats=False), 2)
    layer, x = AdaB2N2d(3, 2), torch.randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match="3 channels"):
        layer(torch.randn(2, 4, 2, 2))
    with pytest.raises(ValueError, match="current task 0"), task_batch(layer, torch.tensor([0, 1])):
        pass
    with pytest.raises(ValueError, match="integers"), task_batch(layer, torch.tensor([0.0])):
        pass
    start_task(layer, 1)
    with pytest.raises(RuntimeError, match="task_batch"):
        layer(x)
    with pytest.raises(ValueError, match="3 task ids"), task_batch(layer, torch.tensor([0, 1, 1])):
        layer(x)
    assert float(balance_penalty(nn.Linear(2, 2))) == 0
