"""Normalize-and-Project: norms that stay, functions that stay, and the rate that was written."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headway as hw
from headway.kernels import sphere
from headway.weights import NaP, apply_nap, find_scale_invariant, followed_by_norm, normalize_, rescaled_lr

pytestmark = pytest.mark.filterwarnings("ignore:weight decay is set to 0")


def net(eps=1e-5, dtype=torch.float32, affine=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16, bias=False), nn.LayerNorm(16, eps, affine), nn.ReLU(),
        nn.Linear(16, 16, bias=False), nn.LayerNorm(16, eps, affine), nn.ReLU(),
        nn.Linear(16, 3),
    ).to(dtype)  # fmt: skip


def data(dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=draw)
    return x.to(dtype), x[:, :3].argmax(1)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


# --- oracle 1


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize(("dtype", "eps", "near"), [(torch.float32, 1e-5, 1e-5), (torch.float64, 0.0, 1e-12)])
def test_after_every_step_the_norms_are_those_of_the_start_and_the_function_that_before(dtype, eps, near, per):
    model, (x, y) = net(eps, dtype), data(dtype)
    nap = NaP(model, scale_offset="none", per=per)
    dims = 1 if per == "row" else None
    start = {n: p.detach().flatten(1).norm(dim=dims) for n, p in nap.weights.items()}
    assert list(nap.weights) == ["0.weight", "3.weight"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        step(model, optimizer, x, y)
        before = model(x).detach()
        nap.project()
        for name, p in nap.weights.items():
            found = p.detach().flatten(1).norm(dim=dims)
            assert ((found - start[name]).abs() <= 1e-6 * start[name]).all()
        if per == "tensor":
            torch.testing.assert_close(model(x).detach(), before, rtol=10 * near, atol=10 * near)


# --- oracle 2


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.Adam(p, 0.01)], ids=["sgd", "adam"]
)
def test_eight_steps_equal_a_loop_written_by_hand(make):
    model, (x, y) = net(dtype=torch.float64), data(torch.float64)
    hand = copy.deepcopy(model)
    optimizer, other = make(model.parameters()), make(hand.parameters())
    nap = NaP(model, scale_offset="decay", decay=0.05).attach(optimizer)
    rho = {i: hand[i].weight.detach().norm() for i in (0, 3)}
    for _ in range(8):
        step(model, optimizer, x, y)
        step(hand, other, x, y)
        lr = other.param_groups[0]["lr"]
        with torch.no_grad():
            for i in (0, 3):
                hand[i].weight.copy_(hand[i].weight * rho[i] / hand[i].weight.norm())
                gain, offset = hand[i + 1].weight, hand[i + 1].bias
                gain.copy_(gain - lr * 0.05 * (gain - 1))
                offset.copy_((1 - lr * 0.05) * offset)
    for a, b in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert nap.steps == 8


# --- oracle 3


def test_rescaled_rates_compute_the_same_functions_with_plain_sgd_and_not_with_adam():
    for make, same in ((lambda p: torch.optim.SGD(p, 0.3), True), (lambda p: torch.optim.Adam(p, 0.02), False)):
        model, (x, y) = net(0.0, torch.float64), data(torch.float64)
        twin = copy.deepcopy(model)
        optimizer, other = make(model.parameters()), make(twin.parameters())
        NaP(model, scale_offset="none").attach(optimizer)
        rescaled_lr(other, NaP(twin, scale_offset="none"))
        losses = [(step(model, optimizer, x, y), step(twin, other, x, y)) for _ in range(60)]
        gap = max(abs(a - b) for a, b in losses)
        assert gap < 1e-10 if same else gap > 1e-6
        assert losses[-1][0] < losses[0][0]


# --- oracle 4


def test_the_gradient_of_a_scale_invariant_layer_is_orthogonal_and_shrinks_with_its_weight():
    model, (x, y) = net(0.0, torch.float64), data(torch.float64)
    slopes = []
    for c in (1.0, 3.0):
        scaled = copy.deepcopy(model)
        scaled[0].weight.data.mul_(c)
        F.cross_entropy(scaled(x), y).backward()
        g, w = scaled[0].weight.grad, scaled[0].weight.detach()
        assert (g * w).sum().abs() <= 1e-5 * g.norm() * w.norm()
        slopes.append(g)
    torch.testing.assert_close(slopes[1], slopes[0] / 3)


# --- oracle 5


def test_joint_leaves_the_firing_units_alone_and_scales_all_outputs_alike():
    model, (x, _) = net(), data()
    nap = NaP(model, scale_offset="joint")
    with torch.no_grad():
        model[1].weight.normal_()
        model[1].bias.normal_()
    before = model[:3](x).detach()
    nap.balance()
    after = model[:3](x).detach()
    assert torch.equal(before > 0, after > 0)
    ratio = after[before > 0] / before[before > 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=1e-6)
    size = model[1].weight.square().sum() + model[1].bias.square().sum()
    torch.testing.assert_close(size.detach(), torch.tensor(16.0))
    with pytest.raises(ValueError, match="Tanh follows"):
        NaP(nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.Tanh()), scale_offset="joint")


# --- oracle 6


def test_the_last_layer_biases_gains_and_offsets_are_bitwise_untouched():
    model = net()
    nap = NaP(model, scale_offset="none")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    nap.project()
    nap.balance()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"0.weight", "3.weight"}


# --- oracle 7


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, 1e-9)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, 1e-9)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6, 1e-9)
        self.block, self.head = Block(6), nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.block(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


def test_exactly_the_tensors_followed_by_a_norm_are_found():
    torch.manual_seed(0)
    model = ResidualNet().double()
    wanted = ["stem.weight", "block.conv1.weight", "block.conv2.weight"]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert find_scale_invariant(model, torch.randn(8, 1, 8, 8).double()) == wanted
    assert sorted(followed_by_norm(model)) == sorted(wanted)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    transformers = pytest.importorskip("transformers")
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )
    ids = torch.randint(0, 31, (2, 8))
    # in a Pre-LN transformer the norms stand before the matrices: no single one is free
    assert find_scale_invariant(gpt, {"input_ids": ids, "use_cache": False}) == []
    assert followed_by_norm(gpt) == {}


def test_projecting_every_ten_steps_ends_near_projecting_every_step():
    task = hw.tasks.get("digits-relabelled", every=150)
    ends = []
    for every in (1, 10):
        torch.manual_seed(0)
        model = task.model(0)
        optimizer = task.optimizer(model.parameters())
        hw.apply(model, hw.NormalizeAndProject(every=every), optimizer=optimizer)
        batches = task.train_batches(0, 64)
        for _ in range(150):
            optimizer.zero_grad()
            task.loss(model, next(batches)).backward()
            optimizer.step()
        with torch.no_grad():
            ends.append(task.evaluate(model)["accuracy"])
    assert abs(ends[0] - ends[1]) <= 2.0 and min(ends) > 40


# --- oracle 8


@pytest.mark.parametrize("every", [1, 3])
def test_save_load_and_continue_is_an_uninterrupted_run(every):
    def start():
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        return model, optimizer, NaP(model, every).attach(optimizer)

    x, y = data()
    model, optimizer, _ = start()
    for _ in range(4):
        step(model, optimizer, x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert "nap_state" in saved[1]
    for _ in range(4):
        step(model, optimizer, x, y)
    again, other, nap = start()
    with torch.no_grad():
        for p in nap.weights.values():
            p.mul_(2)
    again, other, nap = again, torch.optim.Adam(again.parameters(), 1e-2), NaP(again, every)
    nap.attach(other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for _ in range(4):
        step(again, other, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(KeyError, match="differ in"):
        NaP(net(), exclude="0.*").load_state_dict(saved[1]["nap_state"])


# --- one pass for Adam and the projection


@pytest.mark.skipif(not sphere.built, reason="needs the C++ kernels")
@pytest.mark.parametrize(
    "settings", [{}, {"every": 2}, {"per": "row"}, {"tangent": True}, {"scale_offset": "joint"}], ids=str
)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_adam_steps_and_projects_in_one_pass_and_ends_where_the_other_way_ends(kind, settings):
    x, y = data(torch.float64)
    models, naps, optimizers = [], [], []
    for fused in (True, False):
        models.append(net(dtype=torch.float64))
        optimizers.append(kind(models[-1].parameters(), 1e-2, fused=fused))
        naps.append(NaP(models[-1], **settings).attach(optimizers[-1]))
    for k in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, x, y)
        taken = naps[0]._one_pass.done
        assert taken == (
            set(naps[0].weights) if k % settings.get("every", 1) == settings.get("every", 1) - 1 else set()
        )
        assert not naps[1]._one_pass.done and all(p.grad is not None for p in models[0].parameters())
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    states = [[optimizer.state[p] for p in m.parameters()] for m, optimizer in zip(models, optimizers, strict=True)]
    for a, b in zip(*states, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] == 6
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(not sphere.built, reason="needs the C++ kernels")
def test_what_one_pass_does_not_do_is_left_to_the_optimiser():
    model, (x, y) = net(), data()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0, fused=True)
    nap = NaP(model).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def norms_stay(taken):
        assert bool(nap._one_pass.done) == taken
        for name, p in nap.weights.items():
            torch.testing.assert_close(p.norm().detach(), nap.rho[name], rtol=1e-6, atol=0)

    optimizer.step(closure)
    norms_stay(False)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    norms_stay(False)
    step(model, optimizer, x, y)
    norms_stay(True)
    # as Accelerate calls it
    optimizer.step(None)
    norms_stay(True)
    later = optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
    step(model, optimizer, x, y)
    norms_stay(False)
    later.remove()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    step(model, optimizer, x, y)
    norms_stay(False)
    nap.detach()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# --- the interface


def test_one_call_inserts_norms_drops_biases_and_attaches_and_undo_takes_all_of_it_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.GELU(), nn.Linear(8, 3))
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    report = hw.plan(model, hw.NormalizeAndProject())
    assert [row.name for row in report.rows if row.after == "norm kept at its start"] == ["0.weight", "3.weight"]
    hw.apply(model, hw.NormalizeAndProject(), optimizer=optimizer)
    assert model[0].bias is None and model[3].bias is None and model[5].bias is not None
    assert isinstance(model[1][0], nn.GroupNorm) and isinstance(model[4][0], nn.LayerNorm)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    start = {n: float(p.norm()) for n, p in model.named_parameters() if n in ("0.weight", "3.weight", "5.weight")}
    x = torch.randn(8, 1, 8, 8)
    for _ in range(5):
        step(model, optimizer, x, torch.arange(8) % 3)
    end = {n: float(p.norm()) for n, p in model.named_parameters() if n in start}
    assert end["0.weight"] == pytest.approx(start["0.weight"], rel=1e-6)
    assert end["3.weight"] == pytest.approx(start["3.weight"], rel=1e-6) and end["5.weight"] != start["5.weight"]
    hw.undo(model)
    assert str(model) == str(before) and not optimizer._optimizer_step_post_hooks


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 5), nn.Linear(5, 6), nn.ReLU()
        self.c, self.head = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.head(self.act(self.c(self.act(self.b(F.relu(self.a(x)))))))


@pytest.mark.parametrize("norm", ["layer", "rms", "group"])
def test_functional_and_shared_nonlinearities_get_their_norms_too(norm):
    model, report = normalize_(Functional(), norm)
    assert len(report.rows) == 6 and all(isinstance(getattr(model, n), nn.Sequential) for n in "abc")
    assert isinstance(model.head, nn.Linear) and model(torch.randn(3, 4)).shape == (3, 2)
    assert len(followed_by_norm(model)) == 3
    assert hw.NormalizeAndProject().norm == "layer"
    with pytest.raises(ValueError, match='"layer", "rms" or "group"'):
        normalize_(Functional(), "batch")
    with pytest.raises(hw.NothingToChange):
        normalize_(nn.Sequential(nn.Linear(3, 2)))


def test_apply_nap_checks_the_weights_and_moves_weight_decay_away():
    model, (x, _) = net(), data()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    with pytest.warns(UserWarning, match="weight decay is set to 0 for 0.weight, 3.weight"):
        nap = apply_nap(model, optimizer, x)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 2]
    assert optimizer.param_groups[1]["weight_decay"] == 0
    norm = float(model[0].weight.norm())
    assert nap.elr(optimizer)["0.weight"] == pytest.approx(1e-2 / norm)
    with pytest.raises(ValueError, match=r"not scale invariant.*6.weight"):
        apply_nap(net(), torch.optim.SGD(net().parameters(), 0.1), x, include="6.weight")
    with pytest.raises(ValueError, match="no weight of this model"):
        apply_nap(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))


def test_awkward_tensors():
    p = nn.Parameter(torch.randn(4, 3))
    zero, tied = nn.Parameter(torch.zeros(2, 2)), p
    vector, deep = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    with pytest.warns(UserWarning, match="zero is zero and stays zero"):
        nap = NaP([("p", p), ("zero", zero), ("tied", tied), ("vector", vector), ("deep", deep)])
    assert list(nap.weights) == ["p", "zero", "deep"]
    with torch.no_grad():
        p.mul_(3)
        deep.mul_(3)
    nap.project()
    torch.testing.assert_close(p.norm().detach(), nap.rho["p"])
    torch.testing.assert_close(deep.detach().abs().norm(), nap.rho["deep"])
    assert zero.eq(0).all() and nap.skipped == 0
    with torch.no_grad():
        p[0, 0] = math.nan
    before = p.detach().clone()
    nap.project()
    assert nap.skipped == 1 and torch.equal(p.isnan(), before.isnan()) and torch.equal(p[1:], before[1:])
    empty = NaP(iter(()))
    empty.project()
    with pytest.raises(ValueError, match="whole number of steps"):
        NaP([("p", p)], every=0)
    with pytest.raises(ValueError, match='"tensor" or "row"'):
        NaP([("p", p)], per="column")


def test_a_bfloat16_weight_is_corrected_once_its_norm_has_moved_further_than_a_rounding():
    p = nn.Parameter(torch.randn(64, 64).bfloat16())
    nap = NaP([("p", p)])
    rho = float(nap.rho["p"])
    with torch.no_grad():
        for _ in range(50):
            p.mul_(1.01)
            nap.project()
    assert float(p.detach().float().norm()) == pytest.approx(rho, rel=0.01)


def test_tangent_takes_the_radial_part_out_of_the_momentum():
    model, (x, y) = net(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    NaP(model, tangent=True).attach(optimizer)
    for _ in range(3):
        step(model, optimizer, x, y)
    w, m = model[0].weight.detach(), optimizer.state[model[0].weight]["exp_avg"]
    assert (w * m).sum().abs() < 1e-5 * w.norm() * m.norm()


def test_a_projection_asks_no_value_of_the_device_and_compiles():
    meta = NaP([("p", nn.Parameter(torch.randn(4, 3)))])
    meta.weights["p"] = nn.Parameter(torch.randn(4, 3, device="meta"))
    meta.rho["p"] = meta.rho["p"].to("meta")
    meta.project()
    p = nn.Parameter(torch.randn(4, 3))
    nap = NaP([("p", p)])
    p.data.mul_(2)
    torch.compile(nap.project, backend="eager", fullgraph=True)()
    torch.testing.assert_close(p.norm().detach(), nap.rho["p"])


def test_arms_of_a_comparison_normalise_and_project(tmp_path):
    options = {
        "seeds": 1,
        "budget": 20,
        "device": "cpu",
        "progress": False,
        "probe": False,
        "store": tmp_path / "s.sqlite",
    }
    found = hw.compare("digits-relabelled(every=10)", ["baseline", "normalize-and-project"], **options)
    assert found.finished and found.curves("baseline", 0)["loss"] != found.curves("normalize-and-project", 0)["loss"]
