"""The layers: constants, gates, and the stack of skips; the law of the second moment; agreement with the authors' code."""

import copy
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headway as hw
from headway.claims.scale_long import SumSkips
from headway.residual import LongSkips, SkipGate, SkipScale, feature_growth, perturbation_gain, skip_scales
from headway.residual.scale_long import ScaleLong
from headway.tasks.unets import UViT


def test_the_constants_of_cs_decay_from_the_outermost_to_the_innermost():
    assert skip_scales(6, "cs", 0.5, "outer_first") == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert skip_scales(6, "cs", 0.5, "inner_first") == [0.03125, 0.0625, 0.125, 0.25, 0.5, 1]
    assert skip_scales(3, "none") == [1, 1, 1] and skip_scales(3, "sqrt2") == [2**-0.5] * 3
    assert skip_scales(3, [3, 2, 1]) == [3, 2, 1] and skip_scales(3, "cs", 1.0) == [1, 1, 1]


@given(n=st.integers(1, 30), kappa=st.floats(0.05, 1))
def test_the_sum_of_squared_constants_stays_below_its_bound_for_any_number_of_skips(n, kappa):
    total = sum(s * s for s in skip_scales(n, "cs", kappa))
    assert total <= n + 1e-9 and (kappa > 0.999 or total <= 1 / (1 - kappa**2) + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0,), "n is the number of long skips"),
        ((3, "cs", 0.0), "kappa lies in"),
        ((3, "cs", 1.1), "kappa lies in"),
        ((3, "ls"), "none, sqrt2, cs"),
        ((3, [1, 2]), "need 3 finite numbers"),
        ((2, [1, math.nan]), "need 2 finite numbers"),
        ((3, "cs", 0.5, "inside"), "order is one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        skip_scales(*arguments)


def test_a_constant_of_one_leaves_the_skip_bitwise_and_the_gradient_is_scaled_like_the_skip():
    scale, x = SkipScale(3, "cs", 0.5), torch.randn(2, 4, requires_grad=True)
    assert scale(x, 1) is x and torch.equal(scale(x, 3), 0.25 * x)
    scale(x, 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.25))
    with pytest.raises(ValueError, match="numbered 1"):
        scale(x, 4)


@pytest.mark.parametrize(("mode", "kappa"), [("none", 0.7), ("sqrt2", 0.7), ("cs", 0.7), ("cs", 0.5)])
@pytest.mark.parametrize(("width", "within", "seeds"), [(128, 0.35, 20), (1024, 0.1, 2)])
def test_the_second_moment_is_one_plus_the_sum_of_squared_constants(mode, kappa, width, within, seeds):
    for n in (3, 12):
        ratios = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            net = SumSkips(n, width, mode, kappa)
            ratios.append(feature_growth(net, torch.randn(16, width)))
        law = 1 + sum(s * s for s in skip_scales(n, mode, kappa))
        assert statistics.mean(ratios) == pytest.approx(law, rel=within)


def test_noise_in_the_input_is_amplified_less_under_decaying_constants():
    gains = {}
    for mode in ("none", "cs"):
        torch.manual_seed(0)
        net = SumSkips(12, 64, mode)
        gains[mode] = perturbation_gain(net, torch.randn(32, 64), n=2, generator=torch.Generator().manual_seed(0))
    # a linear network stretches noise as it stretches its input
    assert gains["none"] == pytest.approx(math.sqrt(13), rel=0.2) and gains["cs"] < 0.6 * gains["none"]
    with pytest.raises(ValueError, match="at least one sample"):
        perturbation_gain(net, torch.randn(0, 64))
    with pytest.raises(ValueError, match="eps > 0"):
        perturbation_gain(net, torch.randn(1, 64), eps=0.0)


def test_constants_of_zero_stop_the_gradient_through_the_skips_and_the_middle_still_trains():
    torch.manual_seed(0)
    model = hw.apply(UViT(4, 1, 2, 8, 2, 2), ScaleLong([0.0, 0.0]))
    given_to_decoder = []

    def cut(module, args):
        given_to_decoder.append(args[0].detach().requires_grad_())
        return given_to_decoder[-1], args[1]

    model.long_skips.register_forward_pre_hook(cut)
    model(torch.randn(3, 1, 4, 4), torch.rand(3)).square().mean().backward()
    assert len(given_to_decoder) == 2
    assert all(torch.count_nonzero(skip.grad) == 0 for skip in given_to_decoder)
    assert model.in_blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_a_gate_is_the_published_one():
    torch.manual_seed(0)
    gate, x = SkipGate(33, reduction=8), torch.randn(5, 33, 6)
    pooled = x.mean(-1)
    expected = torch.sigmoid(
        F.relu(pooled @ gate.layer1.weight.T + gate.layer1.bias) @ gate.layer2.weight.T + gate.layer2.bias
    )
    torch.testing.assert_close(gate.gate(x), expected[..., None], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gate(x), x * expected[..., None], rtol=1e-6, atol=1e-7)
    assert gate.layer1.weight.shape == (4, 33)
    assert sum(p.numel() for p in gate.parameters()) == 2 * 33 * 4 + 33 + 4


@settings(deadline=None, max_examples=25)
@given(
    features=st.integers(1, 40),
    batch=st.integers(0, 3),
    axis=st.sampled_from(["token", "channel"]),
    ndim=st.integers(1, 3),
)
def test_a_gate_keeps_the_shape_and_lies_between_zero_and_one(features, batch, axis, ndim):
    shape = (batch, features, 5) if axis == "token" else (batch, features, *[2] * ndim)
    gate = SkipGate(features, axis=axis)
    s = gate.gate(torch.randn(shape))
    assert gate(torch.randn(shape)).shape == shape and bool(((s > 0) & (s < 1)).all())
    assert gate.layer1.out_features == max(features // 16, 1)


def test_a_gate_without_weights_is_the_sigmoid_of_its_bias_exactly():
    gate = SkipGate(7)
    nn.init.zeros_(gate.layer2.weight)
    nn.init.constant_(gate.layer2.bias, 0.3)
    assert torch.equal(gate.gate(torch.randn(2, 7, 3)), torch.sigmoid(torch.full((2, 7, 1), 0.3)))


def test_gates_start_near_one_half_or_near_one():
    torch.manual_seed(0)
    x = torch.randn(16, 257, 32)
    half, one = (SkipGate(257, init=start).gate(x).detach() for start in ("half", "one"))
    assert half.mean() == pytest.approx(0.5, abs=0.01) and half.std() == pytest.approx(0.036, abs=0.01)
    assert one.mean() == pytest.approx(torch.tensor(4.0).sigmoid().item(), abs=0.005)


def test_a_gate_for_another_number_of_tokens_says_so():
    with pytest.raises(ValueError, match=r"made for 17 tokens.*has shape \(2, 26, 8\).*features=26"):
        SkipGate(17)(torch.randn(2, 26, 8))
    with pytest.raises(ValueError, match="made for 4 channels"):
        SkipGate(4, axis="channel")(torch.randn(2, 5, 8, 8))
    for wrong in ({"features": 0}, {"features": 4, "axis": "time"}, {"features": 4, "init": "zero"}):
        with pytest.raises(ValueError):
            SkipGate(**wrong)
    # channels are free of the resolution
    gate = SkipGate(4, axis="channel")
    assert gate(torch.randn(2, 4, 8, 8)).shape == (2, 4, 8, 8) and gate(torch.randn(2, 4, 3, 5)).shape == (2, 4, 3, 5)


def test_a_nan_stays_in_its_sample():
    gate, x = SkipGate(9), torch.randn(3, 9, 4)
    clean = gate(x)
    x[1, 2, 3] = math.nan
    out = gate(x)
    assert torch.isnan(out[1]).all() and torch.equal(out[[0, 2]], clean[[0, 2]])
    x[1, 2, 3] = math.inf
    assert torch.equal(gate(x)[[0, 2]], clean[[0, 2]])


def test_the_gradient_of_gates_and_constants_is_the_derivative():
    torch.manual_seed(0)
    skips = LongSkips(2, "ls", features=5, reduction=2).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*skips.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(skips, dict(zip(names, values, strict=True)), (x, 2))

    assert torch.autograd.gradcheck(run, (x, *values))
    channels = SkipGate(3, axis="channel").double()
    assert torch.autograd.gradcheck(channels, torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda x: SkipScale(3, "cs")(x, 3), x)


def test_the_gradient_of_a_shared_gate_is_the_sum_over_its_uses():
    torch.manual_seed(0)
    shared, apart = LongSkips(3, "ls", features=6), LongSkips(3, "ls", share=False, features=6)
    for gate in apart.gates:
        gate.load_state_dict(shared.gates[0].state_dict())
    xs = [torch.randn(2, 6, 4) for _ in range(3)]
    for skips in (shared, apart):
        sum(skips(x, i).square().sum() for i, x in enumerate(xs, 1)).backward()
    assert len(shared.gates) == 1 and len(apart.gates) == 3
    for name, parameter in shared.gates[0].named_parameters():
        total = sum(dict(gate.named_parameters())[name].grad for gate in apart.gates)
        torch.testing.assert_close(parameter.grad, total)


def test_gates_are_shared_among_skips_of_equal_width():
    skips = LongSkips(4, "ls", features=[8, 8, 16, 16], axis="channel")
    assert [gate.features for gate in skips.gates] == [8, 16]
    assert skips(torch.randn(2, 16, 3, 3), 4).shape == (2, 16, 3, 3)
    with pytest.raises(ValueError, match="made for 16 channels"):
        skips(torch.randn(2, 8, 3, 3), 4)
    with pytest.raises(ValueError, match="needs features="):
        LongSkips(4, "ls")
    with pytest.raises(ValueError, match="need one number of features each"):
        LongSkips(4, "ls", features=[8, 16])


def test_half_precision_pools_and_squashes_in_single():
    torch.manual_seed(0)
    gate, x = SkipGate(17), 3 + torch.randn(4, 17, 64)
    with torch.autocast("cpu", torch.bfloat16):
        s = gate.gate(x.bfloat16())
        out = gate(x.bfloat16())
    assert s.dtype == torch.float32 and out.dtype == torch.bfloat16
    torch.testing.assert_close(s, gate.gate(x), rtol=2e-2, atol=2e-2)
    half = copy.deepcopy(gate).half()
    assert half.gate(x.half()).dtype == torch.float32 and half(x.half()).dtype == torch.float16
    scale = SkipScale(24, "cs", 0.5)
    assert scale(torch.ones(1, dtype=torch.float16), 24).item() > 0


def test_a_checkpoint_of_another_scaling_is_refused():
    cs = LongSkips(4, "cs", 0.7)
    LongSkips(4, "cs", 0.7).load_state_dict(cs.state_dict())
    for other in (LongSkips(4, "cs", 0.5), LongSkips(4, "sqrt2"), LongSkips(5, "cs", 0.7), LongSkips(4, [1, 1, 1, 1])):
        with pytest.raises(ValueError, match="the weights were trained with long skips scaled by"):
            other.load_state_dict(cs.state_dict())
    shared = LongSkips(2, "ls", features=[4, 4])
    with pytest.raises(ValueError, match="apply the same mode, kappa and share"):
        LongSkips(2, "cs").load_state_dict(shared.state_dict(), strict=False)
    again = LongSkips(2, "ls", features=[4, 4])
    again.load_state_dict(shared.state_dict())
    x = torch.randn(2, 4, 3)
    assert torch.equal(again(x, 2), shared(x, 2))


def test_skips_come_back_last_in_first_out_with_their_own_constant():
    skips, xs = LongSkips(3, "cs", 0.5), [torch.full((1,), float(v)) for v in (1, 10, 100)]
    for _ in range(2):
        for x in xs:
            assert skips.push(x) is x
        assert [skips.pop().item() for _ in range(3)] == [25, 5, 1]


def test_unequal_pushes_and_pops_are_refused_and_leave_nothing_behind():
    skips, x = LongSkips(2, "none"), torch.ones(1)
    with pytest.raises(RuntimeError, match="a pop after 0 pushes"):
        skips.pop()
    skips.push(x)
    with pytest.raises(RuntimeError, match="pushes 2 long skips and then pops 2"):
        skips.pop()
    skips.push(x), skips.push(x)
    with pytest.raises(RuntimeError, match="a push after 2 pushes"):
        skips.push(x)
    skips.push(x), skips.push(x), skips.pop()
    with pytest.raises(RuntimeError, match="1 pops"):
        skips.push(x)
    skips.push(x)
    skips.clear()
    skips.push(x), skips.push(x), skips.pop(), skips.pop()
    skips.push(x)
    assert copy.deepcopy(skips)._kept == []


def test_the_stack_compiles_without_a_break():
    torch.manual_seed(0)
    for mode in ("cs", "ls"):
        net = SumSkips(3, 8, "none")
        net.skips = LongSkips(3, mode, features=8, axis="token")
        x = torch.randn(4, 8, 8)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x))


def filled(model):
    """Weights that anyone can write down: sines of the number of the element."""
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.arange(p.numel(), dtype=torch.float64).add(7 * k).mul(0.7).sin().reshape(p.shape)
            gain = "norm" in name and name.endswith("weight")
            p.copy_(0.3 * wave if p.dim() > 1 else 0.1 * wave + gain)
    return model


# loss, two outputs and two gradients of the authors' UViT (sail-sg/ScaleLong, libs/uvit.py) with these weights and inputs, in float64
OFFICIAL = {
    ("none", True): (0.15415989273, 0.42197260768, -0.27406452170, -0.00801533599, 0.05969496297),
    ("sqrt2", True): (0.30226260566, 0.85197108543, -0.17845846810, -0.00879699824, 0.09552754356),
    ("cs", True): (0.47861593543, 1.32207279114, 0.00874816581, -0.01994505761, 0.05625768016),
    ("ls", True): (0.28124328438, 0.40557494011, -0.19011376937, -0.01650916301, -0.01687010562),
    ("ls", False): (0.13850947360, 0.06923473302, -0.23733355688, -0.00141895871, -0.01317608940),
}


@pytest.mark.parametrize(("mode", "share"), list(OFFICIAL))
def test_a_u_vit_computes_what_the_authors_code_computes(mode, share):
    model = filled(hw.apply(UViT(8, 1, 2, 32, 4, 3).double(), ScaleLong(mode, 0.5, share=share)))
    x = torch.arange(3 * 64, dtype=torch.float64).mul(1.3).sin().reshape(3, 1, 8, 8)
    out = model(x, torch.tensor([3.0, 120.0, 900.0], dtype=torch.float64))
    loss = out.square().mean()
    loss.backward()
    grads = model.in_blocks[0].mlp.fc1.weight.grad[5, 7], model.out_blocks[0].skip_linear.weight.grad[3, 40]
    found = [value.item() for value in (loss.detach(), out.detach()[0, 0, 3, 3], out.detach()[2, 0, 7, 0], *grads)]
    assert found == pytest.approx(OFFICIAL[mode, share], abs=1e-9, rel=1e-6)
