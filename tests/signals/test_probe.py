"""The probe against the theory of signal propagation, and what it leaves of a model: nothing changed."""

import copy
import math
import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import headway as hw
from headway.signals.points import find


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds) + sum(
        len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()
    )


def conv_net(norm=nn.BatchNorm2d, depth=4, inplace=False, dropout=0.0):
    layers, channels = [], 1
    for _ in range(depth):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), norm(8), nn.ReLU(inplace=inplace), nn.Dropout(dropout)]
        channels = 8
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 5))


def digits(batch=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 1, 6, 6, generator=generator), torch.randint(0, 5, (batch,), generator=generator)


def same(a, b, rel=1e-12, skip=()):
    assert [r.name for r in a.rows] == [r.name for r in b.rows]
    for x, y in zip(a.rows, b.rows, strict=True):
        for key, value in x.to_dict().items():
            other = y.to_dict()[key]
            if key in skip:
                continue
            if isinstance(value, float) and isinstance(other, float):
                assert value == pytest.approx(other, rel=rel, abs=rel), (x.name, key)
            else:
                assert value == other, (x.name, key)


# oracle 1
def test_outputs_losses_and_gradients_are_bitwise_those_of_the_unwatched_model():
    torch.manual_seed(0)
    model = conv_net(dropout=0.2)
    twin = copy.deepcopy(model)
    x, y = digits()
    results = []
    for subject, watched in ((model, True), (twin, False)):
        torch.manual_seed(1)
        monitor = hw.watch(subject, every=1)
        if watched:
            monitor.attach()
        output = subject(x)
        loss = nn.functional.cross_entropy(output, y)
        loss.backward()
        results.append((output, loss, [p.grad for p in subject.parameters()], list(subject.buffers())))
        if watched:
            assert len(monitor.last) == 9
        monitor.close()
    for a, b in zip(results[0][2] + results[0][3], results[1][2] + results[1][3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_the_reported_loss_and_gradients_are_bitwise_those_of_a_plain_pass():
    torch.manual_seed(0)
    model, (x, y) = conv_net(), digits()
    twin = copy.deepcopy(model)
    flow = hw.probe(model, x, loss=nn.CrossEntropyLoss(), targets=y)
    loss = nn.CrossEntropyLoss()(twin(x), y)
    loss.backward()
    assert flow.loss == loss.item()
    weight = twin[0].weight.grad
    assert flow["0"].weight_grad_norm == pytest.approx(float(weight.double().norm()), rel=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_generators_gradients_modes_and_hooks_are_restored_even_after_an_exception(fails):
    model, (x, y) = conv_net(dropout=0.5), digits()
    model.train()
    model[1].eval()
    model(x).sum().backward()
    own = nn.Linear(2, 2)
    model[0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad for p in model.parameters()]
    hooks, state, python = hooks_of(model), torch.get_rng_state(), random.getstate()

    def loss(output, target):
        torch.rand(3), random.random()
        if fails:
            raise ZeroDivisionError("the user's own")
        return nn.functional.cross_entropy(output, target)

    if fails:
        with pytest.raises(ZeroDivisionError):
            hw.probe(model, x, loss=loss, targets=y, mode="train")
    else:
        hw.probe(model, x, loss=loss, targets=y, mode="train")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert hooks_of(model) == hooks
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert model.training and not model[1].training and own.training
    assert torch.autograd.graph.saved_tensors_hooks is not None
    model(x).sum().backward()


def test_an_exception_inside_the_forward_pass_leaves_nothing_behind():
    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken layer")

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Breaks())
    with pytest.raises(RuntimeError, match="broken layer"):
        hw.probe(model, torch.randn(3, 4))
    assert hooks_of(model) == 0
    model[:2](torch.randn(3, 4)).sum().backward()


def test_a_hook_that_cannot_be_removed_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    class Stubborn(nn.Linear):
        def register_forward_pre_hook(self, hook, **settings):
            handle = super().register_forward_pre_hook(hook, **settings)
            handle.remove = lambda: None
            return handle

    model[0].__class__ = Stubborn
    with pytest.raises(RuntimeError, match="could not be removed"):
        hw.probe(model, torch.randn(3, 4))


# oracle 3
def test_a_wide_relu_net_follows_the_arc_cosine_map_and_keeps_its_second_moment():
    torch.manual_seed(0)
    width, depth = 4096, 10
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / width))
        layers += [linear, nn.ReLU()]
    x = torch.randn(4, width)
    flow = hw.probe(nn.Sequential(*layers), x, backward=False)
    c = float(hw.functional.mean_cosine(x))
    first = flow.of("post")[0].rms ** 2
    for row in flow.of("post"):
        c = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
        assert row.cos == pytest.approx(c, abs=0.02)
        assert row.rms**2 == pytest.approx(first, rel=0.1)


# oracle 5
def test_an_orthogonal_linear_net_keeps_gradient_norm_and_variance_in_every_layer():
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32, bias=False, dtype=torch.float64) for _ in range(12)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    x = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    flow = hw.probe(nn.Sequential(*layers), x)
    norms = [row.grad_norm for row in flow.rows]
    assert max(norms) / min(norms) - 1 < 1e-5
    seconds = [row.rms**2 for row in flow.rows]
    assert max(seconds) / min(seconds) - 1 < 1e-5
    assert all(row.cos == pytest.approx(0, abs=1e-9) and row.stable_rank == pytest.approx(32) for row in flow.rows)
    assert flow.growth.law == "flat"


class Residual(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.first, self.second = nn.Linear(width, width, False), nn.Linear(width, width, False)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=math.sqrt(1 / width))

    def forward(self, x):
        return x + self.second(self.first(self.norm(x)))


# oracle 6
def test_an_unnormalised_residual_tower_doubles_a_block_and_a_normalised_one_grows_by_one():
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    plain = hw.probe(nn.Sequential(*[Residual(256, False) for _ in range(12)]), x)
    assert plain.growth.kind == "stream" and plain.growth.law == "exponential"
    assert plain.growth.factor == pytest.approx(2, rel=0.1)
    assert any(f.problem == "explosion" and "residual-depth" in f.techniques for f in plain.findings)
    normed = hw.probe(nn.Sequential(*[Residual(256, True) for _ in range(12)]), x, mode="train")
    assert normed.growth.law == "linear" and normed.growth.slope == pytest.approx(1, rel=0.1)


# oracle 7
def test_an_in_place_relu_net_equals_the_out_of_place_net_in_every_number():
    torch.manual_seed(0)
    model, (x, y) = conv_net(), digits()
    twin = conv_net(inplace=True)
    twin.load_state_dict(model.state_dict())
    a = hw.probe(model, x, loss=nn.CrossEntropyLoss(), targets=y)
    b = hw.probe(twin, x, loss=nn.CrossEntropyLoss(), targets=y)
    same(a, b, skip=("saved_bytes",))


def test_a_module_used_three_times_gives_three_rows():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(self.linear(self.linear(x).tanh()).tanh())

    flow = hw.probe(Thrice(), torch.randn(5, 8))
    assert [row.name for row in flow.rows] == ["linear#1", "linear#2", "linear#3"]
    assert all(math.isfinite(row.grad_norm) for row in flow.rows) and len({row.grad_norm for row in flow.rows}) == 3


# oracle 8
def test_a_scaled_loss_with_its_grad_scale_equals_the_unscaled_report():
    model, (x, y) = conv_net(), digits()
    plain = hw.probe(model, x, loss=nn.functional.cross_entropy, targets=y)
    scaled = hw.probe(model, x, loss=lambda o, t: 1024 * nn.functional.cross_entropy(o, t), targets=y, grad_scale=1024)
    same(plain, scaled)
    assert plain.loss == pytest.approx(scaled.loss)


def test_bfloat16_autocast_is_within_two_percent_of_float32_on_std_and_cos():
    torch.manual_seed(0)
    model, (x, y) = conv_net(), digits(32)
    plain = hw.probe(model, x, loss=nn.CrossEntropyLoss(), targets=y)
    with torch.autocast("cpu", torch.bfloat16):
        half = hw.probe(model, x, loss=nn.CrossEntropyLoss(), targets=y)
    assert half["0"].dtype == "bfloat16"
    for a, b in zip(plain.rows, half.rows, strict=True):
        assert b.std == pytest.approx(a.std, rel=0.02)
        assert b.cos == pytest.approx(a.cos, abs=0.02)


# oracle 9
def test_group_norm_with_one_group_is_layer_norm_and_with_a_group_a_channel_instance_norm():
    class OverAll(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, channels, 1, 1, dtype=torch.float64))

        def forward(self, x):
            var, mean = torch.var_mean(x, dim=(1, 2, 3), keepdim=True, unbiased=False)
            return (x - mean) / torch.sqrt(var + 1e-5) * self.weight

    x, y = digits()
    pairs = [
        (lambda c: nn.GroupNorm(1, c), OverAll),
        (lambda c: nn.GroupNorm(c, c), lambda c: nn.InstanceNorm2d(c, affine=True)),
    ]
    for one, other in pairs:
        torch.manual_seed(0)
        a = conv_net(one).double()
        torch.manual_seed(0)
        b = conv_net(other).double()
        flows = [hw.probe(m, x.double(), loss=nn.CrossEntropyLoss(), targets=y, kinds=("pre", "post")) for m in (a, b)]
        same(*flows, rel=1e-9, skip=("saved_bytes",))


def test_the_reported_statistics_are_their_definitions():
    torch.manual_seed(0)
    model, (x, y) = conv_net().double(), digits()
    flow = hw.probe(model, x.double(), loss=nn.CrossEntropyLoss(), targets=y)
    kept = {}
    twin = copy.deepcopy(model)
    a = x.double()
    for name, module in twin.named_children():
        a = module(a)
        if a.requires_grad:
            a.retain_grad()
        kept[name] = a
    nn.CrossEntropyLoss()(a, y).backward()
    for row in flow.rows:
        a = kept[row.name].detach()
        over = (0, 2, 3) if a.dim() == 4 else (0,)
        assert row.std == pytest.approx(float(a.std(over).mean()), rel=1e-10)
        assert row.var == pytest.approx(float(a.var(over).mean()), rel=1e-10)
        assert row.rms == pytest.approx(float(a.square().mean().sqrt()), rel=1e-10)
        assert row.frac_zero == pytest.approx(float((a == 0).double().mean()))
        assert row.absmax == float(a.abs().max())
        d = a - a.mean()
        assert row.kurtosis == pytest.approx(float(d.pow(4).mean() / d.pow(2).mean() ** 2), rel=1e-8)
        rows = a.flatten(1) / a.flatten(1).norm(dim=1, keepdim=True)
        m = rows @ rows.T
        assert row.cos == pytest.approx(float(((m.sum(1) - 1) / (len(m) - 1)).mean()), abs=1e-10)
        assert row.stable_rank == pytest.approx(float(m.trace() / torch.linalg.matrix_norm(m, 2)), rel=1e-9)
        assert row.grad_norm == pytest.approx(float(kept[row.name].grad.norm()), rel=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_modules_give_one_row_each_with_the_same_numbers(reentrant):
    class Stack(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)])
            self.shared = nn.Linear(8, 8)
            self.on = on

        def forward(self, x):
            for layer in self.layers:

                def run(x, layer=layer):
                    return x + self.shared(layer(x))

                x = checkpoint(run, x, use_reentrant=reentrant) if self.on else run(x)
            return x

    torch.manual_seed(0)
    plain = Stack(False).double()
    saving = Stack(True).double()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    same(hw.probe(plain, x), hw.probe(saving, x), rel=1e-9, skip=("saved_bytes", "note", "weight_grad_norm"))


def test_saved_bytes_are_what_autograd_keeps_and_no_parameter():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(10, 16)
    flow = hw.probe(model, x)
    # the input of the first layer, and the activation, which ReLU and the second layer share
    assert flow.saved_bytes == 4 * 10 * (16 + 32)
    assert flow["0"].saved_bytes == 4 * 10 * 16 and flow["1"].saved_bytes == 4 * 10 * 32


def test_an_illegal_in_place_change_is_still_an_error():
    class Illegal(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = torch.sigmoid(self.linear(x))
            y.mul_(2)
            return y

    with pytest.raises(RuntimeError, match="inplace"):
        hw.probe(Illegal(), torch.randn(3, 4))


def test_nan_is_counted_and_the_first_offending_layer_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].bias[2] = float("nan")
    flow = hw.probe(model, torch.randn(5, 4))
    assert flow["1"].nonfinite == 5 and math.isfinite(flow["1"].std)
    worst = flow.findings[0]
    assert worst.severity == "critical" and worst.where == "1" and worst.value == 5


def test_one_sample_gives_nan_likeness_with_a_note_and_the_rest_works():
    flow = hw.probe(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(1, 4))
    assert math.isnan(flow["0"].cos) and "batch" in flow["0"].note and flow["0"].rms > 0


def test_wrong_use_is_met_with_one_sentence():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    with pytest.raises(ValueError, match="matches no module"):
        hw.probe(model, x, layers="decoder.*")
    with pytest.raises(ValueError, match="no gradient"):
        hw.probe(model, x, loss=lambda out: out.detach().mean())
    with pytest.raises(ValueError, match="one number"):
        hw.probe(model, x, loss=lambda out: out)
    with pytest.raises(ValueError, match="no samples"):
        hw.probe(model, x[:0])
    with pytest.raises(ValueError, match="kinds"):
        hw.probe(model, x, kinds=("before",))
    with pytest.raises(TypeError, match="Module"):
        hw.probe(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode"):
        hw.probe(model, x, mode="test")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TorchScript"):
        hw.probe(torch.jit.trace(model, x), x)


def test_a_compiled_model_is_refused_unless_unwrapped():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    compiled = torch.compile(model)
    with pytest.raises(TypeError, match="unwrap=True"):
        hw.probe(compiled, x)
    same(hw.probe(compiled, x, unwrap=True), hw.probe(model, x))
    model.compile()
    with pytest.raises(TypeError, match="compiled"):
        hw.probe(model, x)
    assert len(hw.probe(model, x, unwrap=True)) == 2 and model._compiled_call_impl is not None


def test_layers_and_kinds_choose_what_is_looked_at():
    model = conv_net()
    assert {p.kind for p in find(model)} == {"pre", "post"}
    assert [p.name for p in find(model, "1")] == ["1"]
    assert [p.name for p in find(model, lambda name, module: isinstance(module, nn.Flatten))] == ["16"]
    assert len(find(model, kinds=("norm",))) == 4


def test_a_batch_may_be_a_tuple_with_targets_or_the_loss_may_run_the_model():
    model, (x, y) = conv_net(), digits()
    a = hw.probe(model, x, loss=nn.CrossEntropyLoss(), targets=y)
    same(a, hw.probe(model, (x, y), loss=nn.CrossEntropyLoss()))
    same(a, hw.probe(model, loss=lambda: nn.functional.cross_entropy(model(x), y)))


def test_effective_learning_rates_follow_the_optimiser():
    model = nn.Linear(4, 3)
    sgd = hw.probe(model, torch.randn(5, 4), optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    norm = float(model.weight.norm())
    assert sgd.rows[0].effective_lr == pytest.approx(0.5 / norm**2, rel=1e-5)
    adam = hw.probe(model, torch.randn(5, 4), optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert adam.rows[0].effective_lr == pytest.approx(1e-3 / (norm / math.sqrt(12)), rel=1e-5)


def test_empty_and_odd_outputs_are_skipped():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(7, 4), nn.Linear(4, 4)

        def forward(self, tokens):
            return {"ids": tokens, "state": (None, self.linear(self.embed(tokens)))}

    flow = hw.probe(Odd(), torch.randint(0, 7, (3, 5)))
    assert [row.name for row in flow.rows] == ["linear"] and math.isfinite(flow.rows[0].between_tokens)
