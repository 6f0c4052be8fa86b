# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""The translation network: its losses written down, who learns from which, and its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import headway as hw
from headway.norms import GDWCT, AdaIN, DropInGDWCT
from headway.vision.translation import (
    ContentEncoder,
    Discriminator,
    GDWCTTranslator,
    LossWeights,
    MultiHopDecoder,
    StyleEncoder,
    lsgan,
)
from headway.vision.translation_networks import _renamed

SMALL = {"base_dim": 4, "downs": 1, "blocks": 2, "groups": 4, "mlp_dim": 8, "scales": 2, "layers": 2}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return GDWCTTranslator(**SMALL).double()


def images():
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(2, 3, 16, 16, generator=draw, dtype=torch.float64).tanh() for _ in range(2))


def far(a, b):
    return (a - b).abs().mean()


@pytest.mark.parametrize("target", ["paper", "released"])
def test_losses_are_those_of_the_recipe_written_down(net, target):
    net.coloring_target = target
    (x_a, x_b), A, B = images(), net.a, net.b
    got = net.training_losses(x_a, x_b)
    c_a, c_b, s_a, s_b = A.content(x_a), B.content(x_b), A.style(x_a), B.style(x_b)
    (x_ab, t1), (x_ba, t2) = B.decoder(c_a, s_b), A.decoder(c_b, s_a)
    c_ab, s_ab, c_ba, s_ba = B.content(x_ab), B.style(x_ab), A.content(x_ba), A.style(x_ba)
    (x_aba, t3), (x_bab, t4) = A.decoder(c_ab, s_ba), B.decoder(c_ba, s_ab)
    hops = [t1, t2, t3, t4]
    assert all(
        len(t) == 3 for t in hops
    )  # one style block before the first residual block and one after each of the two
    eye = torch.eye(2, dtype=torch.float64)
    judged = [net.judge_a(x_ba), net.judge_a(x_a), net.judge_b(x_ab), net.judge_b(x_b)]
    wanted = {
        "adversarial": sum((m - 1).square().mean() for maps in (judged[0], judged[2]) for m in maps),
        "reconstruction": far(A.decoder(c_a, s_a)[0], x_a) + far(B.decoder(c_b, s_b)[0], x_b),
        "cycle": far(x_aba, x_a) + far(x_bab, x_b),
        "content": far(c_ab, c_a) + far(c_ba, c_b),
        "style": far(s_ab, s_b) + far(s_ba, s_a),
        "whitening": sum(far(each.cov, eye) for t in hops for each in t) / 12,
        "coloring": sum(far(each.U.mT @ each.U if target == "paper" else each.U, eye) for t in hops for each in t) / 12,
        "discriminator": sum((m - i % 2).square().mean() for i, maps in enumerate(judged) for m in maps),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(got, name), value, msg=lambda m, k=name: f"{k}: {m}")
    total = sum({"reconstruction": 10, "cycle": 10, "whitening": 0.001, "coloring": 10}.get(name, 1) * value
                for name, value in wanted.items() if name != "discriminator")  # fmt: skip
    torch.testing.assert_close(got.generator, total)
    assert torch.equal(net(*images()).discriminator, got.discriminator)


def test_generators_and_discriminators_learn_from_their_own_loss_alone(net):
    losses = net.training_losses(*images())
    made, judges = [*net.a.parameters(), *net.b.parameters()], [*net.judge_a.parameters(), *net.judge_b.parameters()]
    losses.generator.backward(retain_graph=True)
    assert all(p.grad is not None for p in made) and all(p.grad is None and p.requires_grad for p in judges)
    before = [p.grad.clone() for p in made]
    losses.discriminator.backward()
    assert all(p.grad is not None for p in judges)
    assert all(torch.equal(p.grad, old) for p, old in zip(made, before, strict=True))


def test_a_step_moves_the_discriminators_first_and_keeps_alpha_within_bounds(net):
    x_a, x_b = images()
    alphas = [m.alpha for m in net.modules() if isinstance(m, GDWCT)]
    nn.init.constant_(alphas[0], 1.7)
    optimizers = net.optimizers(lr=1e-3)
    assert optimizers[0].defaults["betas"] == (0.5, 0.999) and optimizers[0].defaults["weight_decay"] == 1e-4
    assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(list(net.parameters()))
    ahead = copy.deepcopy(net)
    judging = ahead.optimizers(lr=1e-3)[1]
    ahead.training_losses(x_a, x_b).discriminator.backward()
    judging.step()
    first = net.training_step(x_a, x_b, *optimizers)
    assert all(0 <= a <= 1 for a in alphas) and not any(loss.requires_grad for loss in first)
    torch.testing.assert_close(first.adversarial, ahead.training_losses(x_a, x_b).adversarial.detach())
    for _ in range(8):
        last = net.training_step(x_a, x_b, *optimizers)
    assert last.reconstruction < first.reconstruction and last.discriminator < first.discriminator


@pytest.mark.parametrize("direction", ["ab", "ba"])
def test_a_translation_has_the_content_of_one_and_the_style_of_the_other(net, direction):
    content, exemplar = images()
    net.eval()
    source, target = (net.a, net.b) if direction == "ab" else (net.b, net.a)
    y = net.translate(content, exemplar, direction)
    assert y.shape == content.shape and y.abs().max() <= 1
    assert torch.equal(y, target.decoder(source.content(content), target.style(exemplar))[0])
    assert not torch.allclose(y, net.translate(content, exemplar.flip(0), direction))


def test_by_instance_a_translation_does_not_depend_on_the_rest_of_the_batch_and_by_batch_it_does():
    content, exemplar = images()
    for stats, alone in (("instance", True), ("batch", False)):
        torch.manual_seed(0)
        net = GDWCTTranslator(**SMALL, stats=stats).double().eval()
        assert torch.allclose(net.translate(content, exemplar)[:1], net.translate(content[:1], exemplar[:1])) == alone


def test_the_baseline_with_adaptive_instance_norms_becomes_the_method_in_one_call():
    torch.manual_seed(0)
    net = GDWCTTranslator(**SMALL, style_layer="adain").double()
    plain = net.training_losses(*images())
    assert plain.whitening == plain.coloring == 0 and len([m for m in net.modules() if isinstance(m, AdaIN)]) == 6
    net.training_step(*images(), *net.optimizers())
    hw.apply(net, hw.ReplaceAdaIN(groups=2, mlp_dim=8))
    assert len([m for m in net.modules() if isinstance(m, DropInGDWCT)]) == 6
    changed = net.training_losses(*images())
    assert (
        changed.whitening > 0
        and changed.coloring > 0
        and len(net.a.decoder(net.a.content(next(images())), torch.ones(2, 8).double())[1]) == 3
    )
    net.training_step(*images(), *net.optimizers())


def test_weights_of_the_losses_can_be_chosen():
    torch.manual_seed(0)
    net = GDWCTTranslator(**SMALL, weights=LossWeights(0, 2, 0, 0, 0, 0, 3)).double()
    losses = net.training_losses(*images())
    torch.testing.assert_close(losses.generator, 2 * losses.reconstruction + 3 * losses.coloring)


def test_shapes_and_norms_of_the_published_network():
    x = torch.randn(1, 3, 32, 32)
    content, style, decoder = ContentEncoder(), StyleEncoder(), MultiHopDecoder()
    c, s = content(x), style(x)
    assert c.shape == (1, 256, 8, 8) and s.shape == (1, 256)
    y, terms = decoder(c, s)
    assert y.shape == x.shape and len(terms) == 5
    assert terms[0].cov.shape == (8, 32, 32) and terms[0].U.shape == (1, 8, 32, 32)

    def kinds(module, kind):
        return [m for m in module.modules() if isinstance(m, kind)]

    instance = kinds(content, nn.InstanceNorm2d)
    assert len(instance) == 11 and all(m.track_running_stats and m.affine for m in instance)
    assert [m.num_groups for m in kinds(style, nn.GroupNorm)] == [8] * 4
    assert [m.num_groups for m in kinds(decoder, nn.GroupNorm)] == [1] * 2
    judge = Discriminator()
    assert [m.shape for m in judge(torch.randn(1, 3, 64, 64))] == [(1, 1, 4, 4), (1, 1, 2, 2), (1, 1, 1, 1)]
    assert [m.out_channels for m in kinds(judge.scales[0], nn.Conv2d)] == [64, 128, 256, 512, 1]


def test_weights_start_by_kaimings_rule_and_biases_at_zero(net):
    for module in net.b.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias.abs().max() == 0
            if module.weight.numel() > 500:
                assert module.weight.std().item() == pytest.approx((2 / module.weight[0].numel()) ** 0.5, rel=0.15)
    assert net.judge_a.scales[0][1].conv.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_the_least_squares_loss_sums_over_scales():
    assert lsgan([torch.tensor([1.0, 3.0]), torch.tensor([0.0])], 1) == 3


RELEASED = {
    "c_encoder.main.0.conv.weight": "content.layers.0.conv.weight",
    "c_encoder.main.1.norm.running_mean": "content.layers.1.norm.running_mean",
    "c_encoder.main.3.main.1.norm.num_batches_tracked": "content.layers.3.second.norm.num_batches_tracked",
    "s_encoder.main.2.norm.bias": "style.layers.2.norm.bias",
    "decoder.resblocks.1.main.0.conv.bias": "decoder.blocks.1.first.conv.bias",
    "decoder.gdwct_modules.0.alpha": "decoder.styles.0.alpha",
    "decoder.gdwct_modules.2.mlp_CT.main.4.fc.weight": "decoder.styles.2.coloring_net.8.weight",
    "decoder.gdwct_modules.1.mlp_mu.main.1.fc.bias": "decoder.styles.1.mean_net.2.bias",
    "decoder.main.1.norm.weight": "decoder.layers.1.norm.weight",
    "decoder.main.4.conv.bias": "decoder.layers.4.conv.bias",
}


@pytest.mark.parametrize("name", RELEASED)
def test_names_of_the_released_generators_are_understood(name):
    assert _renamed(name) == RELEASED[name]
    assert RELEASED[name] in GDWCTTranslator(base_dim=2, blocks=2, groups=1, mlp_dim=2).a.state_dict()


def test_a_released_generator_is_loaded_whole_or_not_at_all(net):
    other = GDWCTTranslator(**SMALL).double()
    inverse = {ours: theirs for theirs, ours in RELEASED.items()}

    def released(name):
        """Ours back to theirs, written apart from the renaming under test."""
        part, place, *rest = name.split(".")[0], name.split(".")[1], *name.split(".")[2:]
        if part != "decoder":
            rest = [w for word in rest for w in {"first": ("main", "0"), "second": ("main", "1")}.get(word, (word,))]
            return ".".join([{"content": "c_encoder", "style": "s_encoder"}[part], "main", *rest])
        if place == "styles" and rest[1] != "alpha":
            rest = [
                rest[0],
                {"coloring_net": "mlp_CT", "mean_net": "mlp_mu"}[rest[1]],
                "main",
                str(int(rest[2]) // 2),
                "fc",
                rest[3],
            ]
        if place == "blocks":
            rest = [rest[0], "main", {"first": "0", "second": "1"}[rest[1]], *rest[2:]]
        return ".".join(["decoder", {"styles": "gdwct_modules", "blocks": "resblocks", "layers": "main"}[place], *rest])

    state = {released(name): value for name, value in net.a.state_dict().items()}
    assert all(released(ours) == theirs for ours, theirs in inverse.items())
    state["decoder.gdwct_modules.0.alpha"] = state["decoder.gdwct_modules.0.alpha"].reshape(1)
    other.a.load_released(state)
    x, s = next(images()), torch.ones(2, 8).double()
    assert torch.equal(other.a.decoder(other.a.content(x), s)[0], net.a.decoder(net.a.content(x), s)[0])
    del state["decoder.main.1.norm.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.a.load_released(state)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((2, 3, 16, 16), (1, 3, 16, 16), "the same size"),
        ((2, 1, 16, 16), (2, 3, 16, 16), r"x_a is \(B, 3, H, W\)"),
        ((2, 3, 16, 17), (2, 3, 16, 16), "multiples of 2"),
        ((2, 3, 16, 16), (2, 3, 4, 16), "sides of at least 8"),
        ((2, 3, 16), (2, 3, 16, 16), r"x_a is \(B, 3, H, W\)"),
    ],
)
def test_images_that_do_not_fit_are_met_with_a_sentence(net, a, b, words):
    with pytest.raises(ValueError, match=words):
        net.training_losses(torch.zeros(a), torch.zeros(b))


def test_settings_that_do_not_fit_are_met_with_a_sentence(net):
    with pytest.raises(ValueError, match='"ab" or "ba"'):
        net.translate(*images(), direction="aa")
    with pytest.raises(ValueError, match='"gdwct" or "adain"'):
        GDWCTTranslator(**SMALL, style_layer="spade")
    with pytest.raises(ValueError, match="are at least 1"):
        GDWCTTranslator(**{**SMALL, "scales": 0})
    with pytest.raises(ValueError, match="groups must divide channels"):
        MultiHopDecoder(1, 12, 12, groups=5)


def test_the_smallest_images_pass_and_copies_translate_alike(net):
    least = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    assert torch.isfinite(net.training_losses(least, least + 0.1).generator)
    twin = copy.deepcopy(net).eval()
    fresh = GDWCTTranslator(**SMALL).double().eval()
    fresh.load_state_dict(net.state_dict())
    wanted = net.eval().translate(*images())
    assert torch.equal(twin.translate(*images()), wanted) and torch.equal(fresh.translate(*images()), wanted)
