"""Weight compander: the map and its gradients, registration on layers and models, the way back, and its optimiser groups."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import headway as hw
from headway.kernels.compander import _backward_op, _op, inverse, reference
from headway.weights import (
    CompandWeights,
    WeightCompander,
    clip_latent_,
    export_plain,
    fuse,
    histogram_report,
    param_groups,
    remove_weight_compander,
    weight_compander,
    weight_penalty,
)
from headway.weights.compander import compand, compander_of

MAPS = list(reference.MAPS)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=random, dtype=dtype), torch.randint(3, (12,), generator=random)


# oracle 1


@pytest.mark.parametrize("map", MAPS)
def test_the_map_has_the_right_derivatives_in_all_three(map):
    b = 0.7
    v = torch.tensor([[0.0, 0.3, -1.0], [2.5, 50 * b, -50 * b]], dtype=torch.float64, requires_grad=True)
    if map == "power":  # its slope at 0 is finite but huge
        v = (v.detach() + 0.05).requires_grad_()
    for shape in ((), (2, 1), (1, 3)):
        a_, b_ = (torch.full(shape, x, dtype=torch.float64, requires_grad=True) for x in (1.3, b))
        assert torch.autograd.gradcheck(lambda *t: compand(*t, map=map), (v, a_, b_))
        assert map in ("mu-law", "power") or torch.autograd.gradgradcheck(lambda *t: compand(*t, map=map), (v, a_, b_))


@pytest.mark.parametrize("rows", [1, 5])
def test_the_custom_backward_equals_plain_autograd(rows):
    torch.manual_seed(0)
    v, g = torch.randn(5, 7, dtype=torch.float64) * 3, torch.randn(5, 7, dtype=torch.float64)
    shape = (rows, 1) if rows > 1 else ()
    a, b = torch.rand(shape, dtype=torch.float64) + 0.5, torch.rand(shape, dtype=torch.float64) + 0.5
    leaves = [t.clone().requires_grad_() for t in (v, a, b)]
    ours = torch.autograd.grad(compand(*leaves), leaves, g)
    plain = torch.autograd.grad(leaves[1] * torch.atan(leaves[0] / leaves[2]), leaves, g)
    assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-12) for x, y in zip(ours, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5), (4, 1031), (40, 40, 3, 3)])
def test_the_cpp_body_is_the_plain_one(dtype, shape):
    torch.manual_seed(0)
    v, g = (torch.randn(shape, dtype=torch.float64).to(dtype) * k for k in (4, 1))
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-7}.get(dtype, 2 * torch.finfo(dtype).eps)
    for rows in {1, shape[0]} - {0}:
        a, b = (torch.rand(rows, dtype=torch.float64) + 0.5 for _ in range(2))
        ra, rb = (t.view(-1, *[1] * (len(shape) - 1)) for t in (a, b))
        wanted = reference.compand(v.double(), ra, rb)
        assert torch.allclose(_op(v, a, b).double(), wanted, rtol=tolerance, atol=tolerance)
        gv, ab = _backward_op(g, v, a, b, True)
        truth = reference.compand_backward(g.double(), v.double(), ra, rb)
        assert torch.allclose(gv.double(), truth[0], rtol=tolerance, atol=tolerance)
        sums = torch.stack([t.sum_to_size(ra.shape).flatten() for t in truth[1:]])
        size = max(1.0, math.sqrt(v.numel()))
        assert torch.allclose(ab, sums, rtol=1e-6, atol=2e-7 * size)
        assert torch.allclose(_backward_op(g, v, a, b, False)[0], gv, rtol=tolerance, atol=tolerance)


def test_arctan_of_the_cpp_body_is_off_by_two_and_a_half_units_in_the_last_place_at_most():
    v = torch.cat([torch.linspace(-30, 30, 60_001), torch.logspace(-20, 20, 4001)])
    one = torch.ones(1, dtype=torch.float64)
    truth = torch.atan(v.double())
    unit = torch.exp2(torch.floor(torch.log2(truth.abs().clamp(min=1e-37))) - 23)
    assert ((_op(v, one, one).double() - truth).abs() / unit).max() <= 2.5
    strange = _op(torch.tensor([math.inf, -math.inf, math.nan, -0.0]), one, one)
    assert strange[0].item() == pytest.approx(math.pi / 2) == -strange[1].item()
    assert strange[2].isnan() and strange[3] == 0


def test_the_operators_are_registered_as_torch_wants_them():
    v, a, b = torch.randn(4, 3), torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for op, args in ((_op, (v, a, b)), (_backward_op, (v, v, a, b, True))):
        torch.library.opcheck(op, args, test_utils=["test_schema", "test_faketensor"])


# oracle 2


def test_an_infinitely_wide_map_is_no_map():
    (x, y), plain = data(), net()
    mapped = copy.deepcopy(plain)
    for layer in mapped[::2]:
        parametrize.register_parametrization(layer, "weight", WeightCompander(1e6, 1e6, learn=False))
    for model in (plain, mapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert torch.allclose(plain(x), mapped(x), atol=1e-5)


# oracle 3


@pytest.mark.parametrize("map", MAPS)
def test_the_inverse_gives_back_what_was_mapped(map):
    a, b = torch.tensor(0.8), torch.tensor(0.3)
    v = torch.linspace(-5 * 0.3, 5 * 0.3, 301)
    if map == "tanh":  # float32 holds no more digits of tanh(5)
        v = v * 0.4
    assert torch.allclose(inverse(compand(v, a, b, map), a, b, map), v, rtol=2e-6, atol=1e-6)
    wide = [t.double() for t in (v, a, b)]
    again = inverse(compand(*wide, map=map), *wide[1:], map)
    assert torch.allclose(again, wide[0], rtol=1e-6 if map == "power" else 1e-9, atol=1e-9)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_registering_changes_no_output_where_nothing_is_clamped(granularity):
    x, _ = data()
    model = net()
    before = model(x)
    changed = hw.apply(model, CompandWeights(c=3, granularity=granularity))
    assert torch.allclose(changed(x), before, atol=1e-6) and compander_of(changed[0], "weight").clamped == 0


def test_more_than_one_percent_of_clamped_weights_is_told():
    layer = nn.Linear(40, 40)
    nn.init.normal_(layer.weight)
    with pytest.warns(UserWarning, match="clamped"):
        weight_compander(layer, c=0.8)
    compander = compander_of(layer, "weight")
    assert compander.clamped > 16 and layer.weight.abs().max().item() == pytest.approx(
        0.95 * math.pi / 2 * compander.log_a.exp().item(), rel=1e-5
    )


# oracle 4


def test_the_map_is_bounded_odd_monotone_and_has_its_slope():
    a, b = 0.4, 0.25
    v = torch.linspace(-400, 400, 4001, dtype=torch.float64)
    w = compand(v, a, b)
    assert w.abs().max() < a * math.pi / 2 and torch.equal(compand(-v, a, b), -w) and (w.diff() > 0).all()
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(compand(zero, a, b), zero)
    assert slope.item() == pytest.approx(a / b, abs=1e-7)
    assert compand(torch.tensor([math.inf]), a, b).item() == pytest.approx(a * math.pi / 2)
    nan = compand(torch.tensor([1.0, math.nan]), a, b)
    assert nan[1].isnan() and not nan[0].isnan() and compand(torch.empty(0, 3), a, b).shape == (0, 3)


# oracle 5


def test_one_step_on_v_moves_w_by_the_squared_slope():
    x, y = data(torch.float64)
    model = hw.apply(net(torch.float64), CompandWeights(c=1.7, slope=1.4))
    layer, rate = model[2], 1e-5
    v, compander = layer.parametrizations.weight.original, compander_of(model[2], "weight")
    a, b = (t.detach().exp() for t in (compander.log_a, compander.log_b))
    w = layer.weight
    (gradient,) = torch.autograd.grad(F.cross_entropy(F.linear(torch.tanh(F.linear(torch.tanh(model[0](x)), w, layer.bias)),
                                                               model[4].weight, model[4].bias), y), w, retain_graph=True)  # fmt: skip
    (gv,) = torch.autograd.grad(w, v, gradient)
    with torch.no_grad():
        q = 1 / (1 + (v / b) ** 2)
        v -= rate * gv
        moved = layer.weight - w
        wanted = -rate * (a / b) ** 2 * q**2 * gradient
    assert (moved - wanted).norm() <= 1e-3 * wanted.norm()


# oracle 6


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_gradients_of_a_and_b_are_those_of_the_whole_loss_with_ties(granularity):
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(5, (9,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    model[2].weight = model[0].weight
    hw.apply(model, CompandWeights(c=2, slope=1.3, learn=True, granularity=granularity))
    compander = compander_of(model[0], "weight")
    assert compander is compander_of(model[2], "weight")
    assert model[0].parametrizations.weight.original is model[2].parametrizations.weight.original
    F.cross_entropy(model(x), y).backward()
    for parameter in (compander.log_a, compander.log_b):
        for i in range(parameter.numel()):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * 1e-6
                    losses.append(F.cross_entropy(model(x), y).item())
                    parameter.view(-1)[i] -= sign * 1e-6
            wanted = (losses[0] - losses[1]) / 2e-6
            assert parameter.grad.view(-1)[i].item() == pytest.approx(wanted, abs=1e-5)


# oracle 7


def test_fused_and_exported_weights_give_the_same_outputs_bit_for_bit():
    x, _ = data()
    model = hw.apply(net(), CompandWeights(c=2, slope=1.5)).eval()
    with torch.no_grad():
        before = model(x)
        untouched = net().eval()
        untouched.load_state_dict(export_plain(model))
        assert torch.equal(untouched(x), before) and set(untouched.state_dict()) == set(net().state_dict())
        assert torch.equal(fuse(model)(x), before) and type(model[0]) is nn.Linear
    assert set(model.state_dict()) == set(net().state_dict())


def test_tied_weights_are_fused_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    hw.apply(model, CompandWeights(c=2)).eval()
    x = torch.randn(3, 4)
    before = model(x)
    assert torch.equal(fuse(model)(x), before) and model[0].weight is model[1].weight


def test_evaluation_computes_the_weight_once_and_never_an_old_one():
    model = hw.apply(net(), CompandWeights(learn=True)).eval()
    compander = compander_of(model[0], "weight")
    with torch.no_grad():
        first = model[0].weight
        assert model[0].weight is first
        model[0].parametrizations.weight.original.add_(0.1)
        second = model[0].weight
        assert second is not first and not torch.equal(second, first)
        compander.log_a.add_(0.1)
        assert not torch.equal(model[0].weight, second)
    assert model[0].weight.requires_grad
    with torch.inference_mode():
        kept = model[0].weight
    assert not kept.is_inference()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_companded_models_are_copied_and_saved(how):
    x, _ = data()
    model = hw.apply(net(), CompandWeights(c=2, learn=True))
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(1.1)
        model.eval()(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = hw.apply(net(), CompandWeights(learn=True))
        twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x)) and set(twin.state_dict()) == set(model.state_dict())
    twin(x).sum().backward()
    assert twin[0].parametrizations.weight.original.grad is not None and pickle.loads(pickle.dumps(twin))(x).shape == (
        12,
        3,
    )
    assert {"0.parametrizations.weight.original", "0.parametrizations.weight.0.log_a"} <= set(model.state_dict())


def test_companded_models_run_compiled_functional_and_under_vmap():
    x, _ = data()
    model = hw.apply(net(), CompandWeights(c=2, learn=True))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    a, b = (torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (compiled, model))
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(a, b, strict=True))
    state = {key: value.detach() for key, value in model.state_dict().items()}
    assert torch.allclose(torch.func.functional_call(model, state, x), model(x))

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, sample[None]).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x)
    whole = torch.autograd.grad(model(x).square().sum(), model[0].parametrizations.weight.original)[0]
    assert torch.allclose(per_sample["0.parametrizations.weight.original"].sum(0), whole, atol=1e-4)
    stacked = {key: torch.stack([value, 2 * value]) for key, value in state.items()}
    assert torch.func.vmap(lambda s: torch.func.functional_call(model, s, x))(stacked).shape == (2, 12, 3)


# oracle 8


def test_other_maps_stand_behind_the_same_interface():
    v = torch.randn(5, 5)
    assert torch.equal(compand(v, 1.0, 1.0, "tanh"), torch.tanh(v)) and compand(v, 2.0, 3.0, "identity") is v
    layer = nn.Linear(5, 5)
    before = layer.weight.detach().clone()
    weight_compander(layer, map="identity")
    assert torch.equal(layer.weight, before)
    for map in MAPS:
        changed = weight_compander(nn.Linear(5, 5), map=map)
        changed(torch.randn(2, 5)).sum().backward()
        assert torch.isfinite(changed.parametrizations.weight.original.grad).all()


# registration and errors


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.Bilinear(3, 4, 5), nn.LSTMCell(3, 4), nn.MultiheadAttention(8, 2)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_weights_of_every_kind_of_layer_are_companded_and_given_back(layer):
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    order = list(before)
    for granularity in ("tensor", "channel"):
        changed = hw.apply(layer, CompandWeights(granularity=granularity))
        weights = [name for name, module in changed.named_modules() if isinstance(module, WeightCompander)]
        assert weights and not any("bias" in name for name in weights)
        changed = hw.undo(changed)
        assert list(changed.state_dict()) == order
        assert all(torch.equal(changed.state_dict()[key], before[key]) for key in before)
    assert not hasattr(layer, "parametrizations")


def test_the_plan_touches_nothing_and_what_was_learned_survives_undo():
    x, y = data()
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    plan = hw.plan(model, hw.CompandWeights())
    assert len(plan.rows) == 3 and "arctan compander, a=" in plan.rows[0].after
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = hw.apply(model, hw.CompandWeights(), optimizer=optimizer)
    assert model[0].parametrizations.weight.original in optimizer.param_groups[0]["params"]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    learned = model(x)
    assert torch.equal(hw.undo(model, optimizer=optimizer)(x), learned)


def test_what_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head = nn.Linear(4, 2)
            self.norm, self.one = nn.LayerNorm(4), nn.Linear(1, 1)
            self.out.weight = self.embedding.weight

    assert [row.name for row in hw.plan(Tied(), CompandWeights()).rows] == ["body.weight"]
    names = [row.name for row in hw.plan(Tied(), CompandWeights(exclude=(), embeddings=True)).rows]
    assert names == ["embedding.weight", "body.weight", "out.weight", "head.weight"]


def test_a_gpt2_with_its_transposed_linear_layers_is_companded_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(11, (2, 5))
    with torch.no_grad():
        before = model(ids).logits
        model = hw.apply(model, CompandWeights(c=4, granularity="channel"))
        assert torch.allclose(model(ids).logits, before, atol=1e-5)
        assert compander_of(model.transformer.h[0].attn.c_attn, "weight").log_a.shape == (24,)
        model.save_pretrained(tmp_path)
        again = hw.load_pretrained(tmp_path)
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)


def test_bad_input_is_met_with_one_sentence():
    layer = weight_compander(nn.Linear(3, 3))
    cases = [
        (lambda: weight_compander(layer), ValueError, "has a compander already"),
        (lambda: hw.apply(layer, CompandWeights()), ValueError, "has a compander already"),
        (lambda: weight_compander(nn.Linear(3, 3), "wait"), ValueError, "it has weight, bias"),
        (lambda: weight_compander(nn.Linear(3, 3, dtype=torch.complex64)), ValueError, "real floating"),
        (lambda: weight_compander(nn.Linear(3, 3), c=0), ValueError, "c must lie above 0"),
        (lambda: CompandWeights(slope=-1), ValueError, "slope must lie above 0"),
        (lambda: WeightCompander(a=0.0), ValueError, "a must lie above 0"),
        (lambda: WeightCompander(b=torch.ones(3)), ValueError, "a single number"),
        (lambda: WeightCompander(granularity="channel"), ValueError, "a vector"),
        (lambda: CompandWeights(map="cubic"), ValueError, "it is one of arctan"),
        (lambda: compand(torch.ones(2), -1.0, 1.0), ValueError, "a must lie above 0"),
        (lambda: compand(torch.ones(2), torch.ones(3, 1), 1.0), ValueError, "does not broadcast"),
        (lambda: compand(torch.ones(2, dtype=torch.int64), 1.0, 1.0), TypeError, "floating"),
        (lambda: remove_weight_compander(nn.Linear(3, 3)), ValueError, "has no compander"),
        (lambda: param_groups(nn.Linear(3, 3), 0.1), ValueError, "CompandWeights"),
        (lambda: weight_penalty(nn.Linear(3, 3), 0.1), ValueError, "CompandWeights"),
        (lambda: hw.apply(nn.ReLU(), CompandWeights()), hw.NothingToChange, "linear layers"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_constant_and_empty_weights_start_at_one():
    for layer in (nn.Linear(4, 4), nn.Linear(4, 0)):
        nn.init.constant_(layer.weight, 0.5)
        weight_compander(layer)
        compander = compander_of(layer, "weight")
        assert compander.log_a == compander.log_b == 0
        assert torch.allclose(layer.weight, torch.full_like(layer.weight, 0.5))


# the optimiser


def test_a_and_b_have_their_own_small_rate_without_decay_and_clipped():
    model = hw.apply(net(), CompandWeights(slope=2.0, learn=True, exclude=("4",)))
    groups = param_groups(model, 0.1, 1e-3, normalize_lr=True)
    assert [len(g["params"]) for g in groups] == [2, 4, 4]
    assert groups[0]["lr"] == pytest.approx(0.1 / 4) and groups[-1]["lr"] == 0.1
    assert groups[-2]["lr"] == pytest.approx(1e-4) and groups[-2]["weight_decay"] == 0.0
    assert param_groups(model, 0.1, optimizer="adam")[-2]["lr"] == pytest.approx(1e-2)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    (1e4 * model(data()[0]).sum()).backward()
    assert compander_of(model[0], "weight").log_a.grad.abs() <= 1
    assert param_groups(model, 0.1, 1e-3, decay_on="w")[0]["weight_decay"] == 0.0


def test_decay_on_w_pulls_v_with_the_slope():
    model = hw.apply(net(torch.float64), CompandWeights(c=2))
    penalty = weight_penalty(model, 0.3)
    weights = [model[i].weight for i in (0, 2, 4)]
    assert penalty.item() == pytest.approx(0.15 * sum(w.square().sum().item() for w in weights))
    v, compander = model[0].parametrizations.weight.original, compander_of(model[0], "weight")
    (gv,) = torch.autograd.grad(penalty, v)
    a, b = (t.exp() for t in (compander.log_a, compander.log_b))
    assert torch.allclose(gv, 0.3 * weights[0] * a / b / (1 + (v / b) ** 2))


def test_latent_weights_come_back_from_where_the_gradient_has_died():
    layer = weight_compander(nn.Linear(3, 3))
    v, compander = layer.parametrizations.weight.original, compander_of(layer, "weight")
    with torch.no_grad():
        v.mul_(1e4)
    clip_latent_(layer)
    assert v.abs().max().item() == pytest.approx(20 * compander.log_b.exp().item(), rel=1e-5)


def test_the_report_counts_extreme_and_near_zero_weights():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 8]]))
    (spread,) = histogram_report(nn.Sequential(layer))
    std = layer.weight.std(correction=0).item()
    assert spread.name == "0.weight" and spread.largest == pytest.approx(8 / std) and spread.near_zero == 3 / 8
    assert spread.effective == pytest.approx(144 / 68) and spread.entries == 8 and spread.saturated == 0
    with pytest.warns(UserWarning, match="clamped"):
        weight_compander(layer, c=1.0)
    after = histogram_report(layer)[0]
    assert after.saturated == 1 / 8 and after.effective > spread.effective


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_mapped_in_float32(dtype):
    layer = weight_compander(nn.Linear(16, 16, dtype=dtype), learn=True)
    assert layer.weight.dtype == dtype and compander_of(layer, "weight").log_a.dtype == torch.float32
    v, compander = layer.parametrizations.weight.original, compander_of(layer, "weight")
    wanted = reference.compand(v.float(), compander.log_a.exp(), compander.log_b.exp())
    assert torch.allclose(layer.weight.float(), wanted, rtol=torch.finfo(dtype).eps)
    layer.weight.float().sum().backward()
    assert v.grad.dtype == dtype and torch.isfinite(compander.log_a.grad)


def test_under_autocast_the_map_stays_in_float32():
    model = hw.apply(net(), CompandWeights(learn=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0].weight.dtype == torch.float32
        y = model(data()[0])
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(torch.isfinite(p.grad).all() for p in model.parameters())
