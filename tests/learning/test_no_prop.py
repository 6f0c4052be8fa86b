"""The oracles of NoProp: the posterior, its law under a perfect block, locality, continuous time, and no label at prediction."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from headway.learning import (
    ConditionalBlock,
    CosineSchedule,
    LearnedSchedule,
    NoPropCT,
    NoPropDT,
    NoPropFM,
    conv_encoder,
    dense_encoder,
)
from headway.learning.no_prop.schedules import coefficients


def block(t=0, norm="batch", timed=False, classes=3, dim=None, features=5):
    encoder = dense_encoder(features, 8, norm, dropout=0.0)
    return ConditionalBlock(*encoder, dim or classes, 8, norm, classes, timed)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


class Knows(nn.Module):
    """A block that knows the label of each row, x (B, 1)."""

    def __init__(self, classes=3):
        super().__init__()
        self.classes = classes

    def forward(self, z, x, t=None):
        return 1e4 * F.one_hot(x[:, 0].long(), self.classes).to(z.dtype)


@pytest.mark.parametrize("T", [1, 2, 10, 40])
def test_oracle_1_the_coefficients_keep_mean_and_variance(T):
    schedule = CosineSchedule(T)
    for t in range(1, T + 1):
        a, b, c = schedule.coef(t)
        before, after = schedule.abar(t - 1), schedule.abar(t)
        assert abs(a + b * before.sqrt() - after.sqrt()) < 1e-12
        assert abs(b**2 * (1 - before) + c - (1 - after)) < 1e-12


def test_oracle_2_with_a_perfect_block_the_chain_has_the_law_of_the_noised_labels():
    model = NoPropDT(lambda t: Knows(), 3, T=6).double().eval()
    count, y = 100_000, 1
    z, draw = torch.randn(count, 3, generator=seeded(), dtype=torch.float64), seeded(1)
    u = model.W[y].expand(count, 3)
    # z_0 is drawn from q here; prediction begins at N(0, I), which differs by abar_0
    z = model.abar[0].sqrt() * u + (1 - model.abar[0]).sqrt() * z
    for t in range(1, model.T + 1):
        u_hat = model.label(Knows()(z, torch.full((count, 1), y)))
        z = model.step(z, u_hat, t, torch.randn(count, 3, generator=draw, dtype=torch.float64))
        mean, variance = model.abar[t].sqrt() * u[0], float(1 - model.abar[t])
        assert ((z.mean(0) - mean).abs() < 4 * math.sqrt(variance / count)).all()
        assert ((z.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / count)).all()


def test_oracle_3_a_step_is_the_posterior_step_of_ddpm_run_backwards():
    model = NoPropDT(block, 3, T=7).double()
    z, clean, noise = (torch.randn(4, 3, dtype=torch.float64, generator=seeded(i)) for i in range(3))
    for t in range(1, model.T + 1):
        # DDPM's time runs from the label to noise; its equations (6) and (7), Ho et al., 2020
        bar_previous, bar = float(model.abar[t]), float(model.abar[t - 1])
        beta = 1 - bar / bar_previous
        mean = (
            math.sqrt(bar_previous) * beta / (1 - bar) * clean
            + math.sqrt(1 - beta) * (1 - bar_previous) / (1 - bar) * z
        )
        variance = (1 - bar_previous) / (1 - bar) * beta
        torch.testing.assert_close(
            model.step(z, clean, t, noise), mean + math.sqrt(variance) * noise, atol=1e-10, rtol=0
        )


def test_oracle_4_the_weights_and_the_prior_are_those_of_the_bound():
    model = NoPropDT(block, 3, T=5, embed="learned", dim=4).double()
    abar = model.abar
    alpha = abar[:-1] / abar[1:]
    torch.testing.assert_close(model.snr_steps, abar[1:] * (1 - alpha) / ((1 - abar[1:]) * (1 - abar[:-1])))
    u = model.W.detach()[[0, 2]]
    for row, kl in zip(u, model.prior(abar[0], u), strict=True):
        q = MultivariateNormal(abar[0].sqrt() * row, (1 - abar[0]) * torch.eye(4, dtype=torch.float64))
        p = MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
        assert float(kl) == pytest.approx(float(kl_divergence(q, p)), rel=1e-6)


def test_the_loss_is_the_sum_of_its_three_terms_with_the_norm_summed_over_the_label():
    model = NoPropDT(block, 3, T=5, embed="learned", dim=4, eta=0.3)
    model.blocks = nn.ModuleList(block(dim=4) for _ in range(5))
    x, y = torch.randn(6, 5, generator=seeded()), torch.tensor([0, 1, 2, 0, 1, 2])
    found = model.local_loss(x, y, 3, seeded(7))
    draw, u = seeded(7), model.W[y]
    last, before = (
        model.abar[t].sqrt().float() * u + (1 - model.abar[t]).sqrt().float() * torch.randn(6, 4, generator=draw)
        for t in (5, 2)
    )
    u_hat = model.blocks[2](before, x).softmax(1) @ model.W
    snr = (model.abar / (1 - model.abar)).float()
    denoising = 5 / 2 * 0.3 * (snr[3] - snr[2]) * (u_hat - u).square().sum(1).mean()
    expected = F.cross_entropy(model.head(last), y) + model.prior(model.abar[0].float(), u).mean() + denoising
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("embed", ["onehot", "learned"])
def test_oracle_5_a_local_loss_reaches_its_own_block_and_no_other(embed):
    model = NoPropDT(block, 3, T=4, embed=embed)
    model.local_loss(torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2]), 2).backward()
    for t, one in enumerate(model.blocks, 1):
        assert all((p.grad is not None) == (t == 2) for p in one.parameters())
    assert model.head.weight.grad is not None
    assert model.learned == (embed == "learned")
    assert not model.learned or (model.W.grad is not None and model.W.grad.abs().sum() > 0)


def test_oracle_5_with_a_fixed_w_the_order_of_training_does_not_matter():
    x, y = torch.randn(6, 5, generator=seeded()), torch.tensor([0, 1, 2, 0, 1, 2])
    first = NoPropDT(block, 3, T=3)
    second = copy.deepcopy(first)
    for model, order in ((first, (1, 2, 3)), (second, (3, 1, 2))):
        for t in order:
            optimizer = torch.optim.AdamW(model.blocks[t - 1].parameters(), 1e-2)
            for step in range(3):
                optimizer.zero_grad()
                model.local_loss(x, y, t, seeded(10 * t + step)).backward()
                optimizer.step()
    for name, value in first.blocks.state_dict().items():
        assert torch.equal(value, second.blocks.state_dict()[name]), name


def test_oracle_6_the_mean_step_tends_to_the_drift_of_the_sde():
    schedule = LearnedSchedule().double().requires_grad_(False)
    z, u, t = 0.7, -0.4, torch.tensor(0.45, dtype=torch.float64)
    errors = []
    for T in (50, 100, 200):
        a, b, _ = coefficients(schedule.abar(t), schedule.abar(t + 1 / T))
        gamma_prime, abar = schedule.gamma_prime(t), schedule.abar(t)
        drift = -gamma_prime * (abar.sqrt() * u - (1 + abar) / 2 * z)
        errors.append(float((a * u + b * z - (z + drift / T)).abs()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15) and errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_oracle_6_the_ode_and_the_sde_end_in_the_same_law_with_a_perfect_block():
    model = NoPropCT(Knows(), 3).eval().requires_grad_(False)
    x = torch.ones(20_000, 1)
    ends = {}
    for method in ("sde", "ode"):
        draw = seeded(3)
        ends[method] = model.chain(x, 400, lambda draw=draw: torch.randn(len(x), 3, generator=draw), method=method)
    end = float(model.schedule.abar(torch.tensor(1.0)))
    for z in ends.values():
        assert (z.mean(0) - math.sqrt(end) * model.W[1]).abs().max() < 2e-3
        assert (z.std(0) / math.sqrt(1 - end) - 1).abs().max() < 0.1


def test_oracle_7_predictions_come_from_the_input_alone():
    # trained to copy its input, the model has accuracy 1 on true labels and 1/m on permuted ones
    model = NoPropDT(lambda t: Knows(), 3, T=4).eval()
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(3))
        model.head.bias.zero_()
    y = torch.arange(3).repeat(1000)
    predicted = model(y[:, None].float(), generator=seeded()).argmax(1)
    permuted = y[torch.randperm(len(y), generator=seeded(1))]
    assert (predicted == y).all()
    assert abs(float((predicted == permuted).double().mean()) - 1 / 3) < 4 * math.sqrt(2 / 9 / len(y))


@pytest.mark.parametrize("schedule", [LearnedSchedule().double(), CosineSchedule(1)])
def test_oracle_7_the_derivatives_of_the_schedules_match_finite_differences(schedule):
    t, h = torch.linspace(0.15, 0.85, 9, dtype=torch.float64), 1e-6
    numeric = (schedule.snr(t + h) - schedule.snr(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.snr_prime(t), numeric, rtol=1e-4, atol=1e-4)
    if isinstance(schedule, LearnedSchedule):
        numeric = (schedule.gamma(t + h) - schedule.gamma(t - h)) / (2 * h)
        torch.testing.assert_close(schedule.gamma_prime(t), numeric, rtol=1e-4, atol=1e-4)
        assert (schedule.gamma_prime(t) < 0).all()
        ends = schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(ends, torch.tensor([7.0, -7.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_oracle_7_the_exact_flow_arrives_in_one_step():
    start = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])

    class Exact(nn.Module):
        def forward(self, z, x, t):
            return F.one_hot(y, 3).to(z.dtype) - start

    model = NoPropFM(Exact(), 3).double().eval()
    torch.testing.assert_close(model.chain(torch.zeros(5, 1), 1, lambda: start), model.W[y], atol=1e-12, rtol=0)
    assert (model.read(model.W[y]).argmax(1) == y).all()


def test_the_learned_schedule_is_trained_by_the_loss():
    model = NoPropCT(block(norm="none", timed=True), 3)
    model.local_loss(torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.schedule.parameters())


@pytest.mark.parametrize("kind", ["dt", "ct", "fm"])
@pytest.mark.parametrize("embed", ["onehot", "learned"])
def test_the_gradients_are_right_in_double_precision(kind, embed):
    model = made(kind, embed).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    names = [n for n, p in model.named_parameters() if n in ("head.bias", "W") or n.endswith("join.6.bias")][:3]
    tensors = tuple(dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.local_loss(x, y, 2 if kind == "dt" else 0.4, seeded(4))

    def loss(*given):
        changed = {f"model.{n}": p for n, p in zip(names, given, strict=True)}
        return torch.func.functional_call(Loss(), changed, ())

    trained = [n for n in names if not (kind == "fm" and embed == "onehot" and n.startswith("head"))]
    keep = [i for i, n in enumerate(names) if n in trained]
    assert torch.autograd.gradcheck(
        lambda *given: loss(*[dict(zip(keep, given, strict=True)).get(i, tensors[i]) for i in range(len(names))]),
        tuple(tensors[i] for i in keep),
    )


def made(kind, embed="onehot", norm=None, dim=None, **settings):
    if kind == "dt":
        return NoPropDT(lambda t: block(t, norm or "layer", dim=dim), 3, T=3, embed=embed, dim=dim, **settings)
    made = {"ct": NoPropCT, "fm": NoPropFM}[kind]
    return made(block(0, norm or "none", True, dim=dim), 3, embed, dim, steps=4, **settings)


@pytest.mark.parametrize("kind", ["dt", "ct", "fm"])
def test_empty_batches_batches_of_one_and_copies(kind):
    model = made(kind, "learned")
    loss = model.local_loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    loss.backward()
    given = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.item() == 0 and given and all((g == 0).all() for g in given)
    assert torch.isfinite(model.local_loss(torch.randn(1, 5), torch.tensor([2])))
    model.eval()
    assert model(torch.zeros(0, 5)).shape == (0, 3)
    x = torch.randn(4, 5)
    twin = made(kind, "learned").eval()
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model)):
        assert torch.equal(other(x, samples=2, generator=seeded()), model(x, samples=2, generator=seeded()))


def test_a_batch_of_one_needs_another_norm_than_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made("dt", norm="batch").local_loss(torch.randn(1, 5), torch.tensor([0]))


@pytest.mark.parametrize("kind", ["dt", "ct", "fm"])
def test_nan_in_one_row_stays_in_that_row_at_prediction(kind):
    model = made(kind).eval()
    x = torch.randn(4, 5, generator=seeded())
    x[2] = math.nan
    bad = ~torch.isfinite(model(x, generator=seeded())).all(1)
    assert bad.tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", ["dt", "ct", "fm"])
def test_under_autocast_the_losses_and_the_chain_stay_in_float32(kind):
    model = made(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.local_loss(torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2]))
        logits = model.eval()(torch.randn(6, 5))
    assert loss.dtype == logits.dtype == torch.float32
    loss.backward()


def test_the_schedule_survives_half_precision():
    model = made("dt").bfloat16()
    assert model.abar.dtype == torch.float64 and model.head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model.local_loss(torch.randn(6, 5).bfloat16(), torch.tensor([0, 1, 2, 0, 1, 2])))


@pytest.mark.parametrize("kind", ["dt", "ct", "fm"])
def test_chains_and_losses_compile_without_a_break(kind):
    model = made(kind).eval()
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    plain = model(x)
    torch.manual_seed(0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain)
    at = 2 if kind == "dt" else None
    torch.manual_seed(0)
    loss = model.local_loss(x, y, at)
    torch.manual_seed(0)
    torch.testing.assert_close(
        torch.compile(lambda: model.local_loss(x, y, at), backend="eager", fullgraph=True)(), loss
    )


def test_several_draws_are_averaged_as_probabilities():
    model = made("dt").eval()
    x = torch.randn(4, 5)
    one = [model(x, generator=draw).softmax(1) for draw in [seeded(5)] for _ in range(3)]
    torch.testing.assert_close(model(x, samples=3, generator=seeded(5)).softmax(1), torch.stack(one).mean(0))
    together = model(x, generator=seeded(1), shared_noise=True)
    torch.testing.assert_close(model(x[2:3], generator=seeded(1), shared_noise=True), together[2:3])


def test_the_radial_head_scores_by_distance_to_the_class_vectors():
    model = made("dt", "learned", head="radial", dim=4)
    z = torch.randn(5, 4)
    near = model.head(z).softmax(1) @ model.W
    torch.testing.assert_close(model.scores(z), -torch.cdist(near, model.W).square() / 0.2, atol=1e-5, rtol=1e-4)


def test_prototypes_are_images_of_their_class():
    model = made("dt", "prototype", dim=5)
    images, labels = torch.randn(30, 5, generator=seeded()), torch.arange(30) % 3
    # around the second image the others of its class stand at one distance, and farther from each other
    images[labels == 1] = torch.cat([torch.zeros(1, 5), 3 * torch.eye(5), -3 * torch.eye(5)[:4]])
    model.place_prototypes(images, labels)
    assert all((model.W[c] == images[labels == c]).all(1).any() for c in range(3))
    assert torch.equal(model.W[1], images[1])
    with pytest.raises(ValueError, match="no image has the label 1"):
        model.place_prototypes(images[:1], labels[:1])


def test_a_convolutional_block_takes_images():
    model = NoPropDT(lambda t: ConditionalBlock(*conv_encoder(1, 8, (4, 4, 8)), 10, 16), 10, T=2)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    model.local_loss(images, labels, 1).backward()
    assert model.eval()(images).shape == (6, 10)


def test_what_is_wrong_is_said_in_one_sentence():
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    model = made("dt")
    with pytest.raises(ValueError, match="labels go from 0 to 2; these go from 0 to 3"):
        model.local_loss(x, y + torch.tensor([0, 0, 1, 0]))
    with pytest.raises(ValueError, match="one a sample"):
        model.local_loss(x, y[:3])
    with pytest.raises(ValueError, match="there is no block 4"):
        model.local_loss(x, y, 4)
    with pytest.raises(RuntimeError, match="training mode"):
        model(x)
    assert model(x, allow_train=True).shape == (4, 3)
    with pytest.raises(ValueError, match="at least 1; it is 0"):
        NoPropDT(block, 3, T=0)
    with pytest.raises(ValueError, match="dim is the width"):
        NoPropDT(block, 3, embed="learned", dim=0)
    with pytest.raises(ValueError, match='embed="onehot" dim is num_classes'):
        NoPropDT(block, 3, dim=4)
    with pytest.raises(ValueError, match="needs dim"):
        NoPropDT(block, 3, embed="prototype")

    class Falling:
        def abar(self, t):
            return 0.9 - 0.1 * t

    with pytest.raises(ValueError, match="abar must increase with t"):
        NoPropDT(block, 3, T=3, schedule=Falling())
    with pytest.raises(ValueError, match="choose a smaller clip"):
        CosineSchedule(64)
    assert CosineSchedule(64, clip=1e-5).T == 64
    with pytest.raises(ValueError, match='"sde" or "ode"'):
        made("ct").eval()(x, method="heun")
    with pytest.raises(ValueError, match="its T = 3 steps"):
        made("dt").eval()(x, steps=5)
    with pytest.raises(ValueError, match="times go from 0 to 1"):
        made("fm").local_loss(x, y, 1.5)
    with pytest.raises(ValueError, match="timed=True"):
        made("ct", norm="none").net(x[:, :3], x)
