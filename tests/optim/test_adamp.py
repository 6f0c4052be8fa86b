"""AdamP and SGDP against the paper's rule, against torch's optimisers, and against one another's implementations."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headway.functional import adamp, project_radial, sgdp
from headway.kernels import radial
from headway.kernels.radial import reference
from headway.optim import SGDP, AdamP, effective_step, projected

SHAPES = [(7,), (5, 1), (1, 9), (4, 3, 3, 3), (64, 70), (30, 40), (3, 700), (2, 2, 2, 2, 2)]
WAYS = [{"foreach": False}, {"foreach": True}, {}] + ([{"fused": True}] if radial.built else [])


def cosine_row(p, g, eps):
    return abs((g * p).sum()) / (max(g.norm(), eps) * max(p.norm(), eps))


def naive_project(p, g, u, delta, wd_ratio, eps):
    """The card's rule, word by word."""
    if p.dim() > 1:
        for view in (lambda t: t.reshape(t.shape[0], -1), lambda t: t.reshape(1, -1)):
            P, G, U = view(p), view(g), view(u)
            if max(cosine_row(a, b, eps) for a, b in zip(P, G, strict=True)) < delta / math.sqrt(P.shape[1]):
                out = torch.stack([c - a * (a @ c) / (a.norm() + eps) ** 2 for a, c in zip(P, U, strict=True)])
                return out.reshape(p.shape), wd_ratio
    return u, 1


def naive_adamp(p, g, state, k, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8, wd=0.1, delta=0.1, wd_ratio=0.1, nesterov=False):
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g * g
    den = v.sqrt() / math.sqrt(1 - b2**k) + eps
    u = (b1 * m + (1 - b1) * g if nesterov else m) / den
    u, ratio = naive_project(p, g, u, delta, wd_ratio, eps)
    return p * (1 - lr * wd * ratio) - lr / (1 - b1**k) * u


def naive_sgdp(p, g, state, k, lr=0.1, mom=0.9, damp=0.2, eps=1e-8, wd=0.1, delta=0.1, wd_ratio=0.1, nesterov=False,
               inplace=False):  # fmt: skip
    buf = state["m"] = mom * state.get("m", 0) + (1 - damp) * g
    u, ratio = naive_project(p, g, g + mom * buf if nesterov else buf, delta, wd_ratio, eps)
    if inplace and not nesterov:
        state["m"] = u
    return p * (1 - lr * wd * ratio / (1 - mom)) - lr * u


def gradient(p, i, k, draw):
    """Gradients that take every branch, each well away from its threshold."""
    g = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    p = p.detach().double()
    if p.dim() > 1 and ((i % 3 == 0 and k % 3 != 2) or i == 2):
        rows, flat = p.reshape(len(p), -1), g.reshape(len(p), -1)
        g = (flat - rows * (flat * rows).sum(1, True) / rows.square().sum(1, True)).reshape(p.shape)
    elif p.dim() > 1 and i % 2 == 0:
        g = g + p
        g = g - p * (g * p).sum() / p.square().sum()
        rows = p.reshape(len(p), -1)
        if len(rows) > 1:
            swing = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
            swing -= (swing * rows.square().sum(1)).sum() / rows.square().sum()
            g = g + p * swing.view(-1, *[1] * (p.dim() - 1))
    return g


def train(make, steps=6, shapes=SHAPES, dtype=torch.float64, seed=0, layout=None):
    draw = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype)) for s in shapes]
    if layout is not None:
        params = [nn.Parameter(p.detach().contiguous(memory_format=layout)) if p.dim() == 4 else p for p in params]
    optimizer, reports = make(params), []
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(p, i, k, draw).to(dtype)
        optimizer.step()
        reports.append(optimizer.projection_report())
    return [p.detach() for p in params], reports, optimizer


def expected(rule, steps=6, shapes=SHAPES, seed=0, **options):
    draw = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    states = [{} for _ in params]
    for k in range(steps):
        for i, p in enumerate(params):
            params[i] = rule(p, gradient(p, i, k, draw), states[i], k + 1, **options)
    return params


# --- oracle 1: trajectories of the official rule, every branch


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_adamp_follows_the_papers_rule_on_eight_shapes_through_every_branch(way, nesterov):
    ours, reports, _ = train(lambda p: AdamP(p, 1e-2, weight_decay=0.1, nesterov=nesterov, **way))
    assert {kind for report in reports for kind in report.values()} == {"none", "channel", "layer"}
    for a, b in zip(ours, expected(naive_adamp, nesterov=nesterov), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("nesterov", "inplace"), [(False, False), (False, True), (True, False), (True, True)])
def test_sgdp_follows_the_papers_rule_and_the_official_code_with_its_projected_buffer(way, nesterov, inplace):
    options = {"weight_decay": 0.1, "nesterov": nesterov, "official_inplace": inplace, **way}
    ours, reports, _ = train(lambda p: SGDP(p, 0.1, 0.9, 0.2, **options))
    assert {kind for report in reports for kind in report.values()} == {"none", "channel", "layer"}
    for a, b in zip(ours, expected(naive_sgdp, nesterov=nesterov, inplace=inplace), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_two_buffers_of_sgdp_are_not_the_same():
    one, _, _ = train(lambda p: SGDP(p, 0.1, 0.9))
    other, _, _ = train(lambda p: SGDP(p, 0.1, 0.9, official_inplace=True))
    assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) > 1e-3


def test_the_lists_of_torch_give_the_same_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(radial, "built", False)
    for inplace in (False, True):
        make = lambda p, i=inplace: SGDP(p, 0.1, 0.9, 0.2, weight_decay=0.1, official_inplace=i, foreach=True)  # noqa: E731
        for a, b in zip(train(make)[0], expected(naive_sgdp, inplace=inplace), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for capturable in (False, True):
        make = lambda p, c=capturable: AdamP(p, 1e-2, weight_decay=0.1, foreach=True, capturable=c)  # noqa: E731
        for a, b in zip(train(make)[0], expected(naive_adamp), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- oracle 2: without a threshold they are torch's optimisers


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_with_delta_zero_adamp_is_adamw_and_sgdp_is_sgd_with_decoupled_decay(way):
    ours, _, _ = train(lambda p: AdamP(p, 1e-2, weight_decay=0.1, delta=0, **way))
    theirs, _, _ = train(lambda p: reporting(torch.optim.AdamW(p, 1e-2, weight_decay=0.1)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ours, _, _ = train(lambda p: SGDP(p, 0.1, 0.9, weight_decay=0.05, delta=0, **way))

    class Decayed(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(1 - 0.1 * 0.05 / (1 - 0.9))
            super().step()

    theirs, _, _ = train(lambda p: reporting(Decayed(p, 0.1, 0.9)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def reporting(optimizer):
    optimizer.projection_report = dict
    return optimizer


def test_projection_false_in_a_group_is_delta_zero_there_alone():
    def make(params):
        return AdamP([{"params": params[:4], "projection": False}, {"params": params[4:], "delta": 0.2}], 1e-2)

    ours, reports, _ = train(make)
    plain, _, _ = train(lambda p: AdamP(p, 1e-2, delta=0))
    assert all(torch.equal(a, b) for a, b in zip(ours[:4], plain[:4], strict=True))
    assert {reports[0][i] for i in range(4)} == {"none"} and "layer" in {reports[0][i] for i in range(4, 8)}


# --- oracle 3: what is left of a projected step


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["adamp", "sgdp"])
def test_a_projected_step_is_orthogonal_to_every_row_and_adds_its_own_square_to_the_norm(way, kind):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(16, 8, 3, 3, dtype=torch.float64))
    optimizer = AdamP([p], 1e-2, **way) if kind == "adamp" else SGDP([p], 0.1, 0.9, **way)
    for k in range(5):
        p.grad = gradient(p, 0, 0, torch.Generator().manual_seed(k + 1))
        before = p.detach().clone()
        optimizer.step()
        assert optimizer.projection_report() == {0: "channel"}
        rows, step = before.flatten(1), (p.detach() - before).flatten(1)
        assert ((rows * step).sum(1).abs() <= 1e-6 * rows.norm(dim=1) * step.norm(dim=1)).all()
        grown = p.detach().square().sum() - before.square().sum()
        torch.testing.assert_close(grown, step.square().sum(), rtol=1e-6, atol=1e-12)


# --- oracle 4: scale, and what is never projected


@given(c=st.sampled_from([1e-3, 0.1, 7.0, 1e3]), seed=st.integers(0, 30), i=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_the_branch_depends_on_directions_alone(c, seed, i):
    draw = torch.Generator().manual_seed(seed)
    p = torch.randn(SHAPES[i], generator=draw, dtype=torch.float64)
    g = gradient(p, i, 0, draw)
    kinds = [reference.project(a * p, g / a, g, 0.1, 1e-12)[1] for a in (1.0, c)]
    assert kinds[0] == kinds[1]


def test_vectors_follow_plain_adam_and_sgd_exactly():
    shapes = [(9,), (), (1,), (300,)]
    ours, _, _ = train(lambda p: AdamP(p, 1e-2, foreach=False), shapes=shapes)
    theirs, _, _ = train(lambda p: reporting(torch.optim.Adam(p, 1e-2, foreach=False)), shapes=shapes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
    ours, _, _ = train(lambda p: SGDP(p, 1e-2, 0.9, foreach=False), shapes=shapes)
    theirs, _, _ = train(lambda p: reporting(torch.optim.SGD(p, 1e-2, 0.9)), shapes=shapes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


# --- oracle 5: all implementations agree


def random_shapes(count=50):
    draw = torch.Generator().manual_seed(3)
    whole = lambda high: int(torch.randint(1, high, (), generator=draw))  # noqa: E731
    shapes = [(whole(40), 1), (1, whole(40)), (2, 3, 4, 5, 2), (6, 5, 3, 3), (2, 40000)]
    while len(shapes) < count:
        shapes.append(tuple(whole((400, 40, 12, 6, 4)[d]) for d in range(int(torch.randint(1, 5, (), generator=draw)))))
    return shapes


@pytest.mark.parametrize("layout", [None, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str
)
def test_all_implementations_agree_over_a_hundred_steps_on_fifty_shapes(dtype, tolerance, layout):
    steps = 100 if dtype is torch.float32 and layout is None else 12
    # squares of small gradients vanish in float16, here as in torch's Adam
    adamp_too = dtype is not torch.float16
    makers = [lambda p, way=way: AdamP(p, 1e-3, weight_decay=0.01, **way) for way in WAYS if adamp_too]
    makers += [lambda p, way=way: SGDP(p, 1e-2, 0.9, weight_decay=0.01, **way) for way in WAYS]
    shapes = random_shapes()
    # the fp32 master copy says how far low precision may drift; gradients are the same for all, whatever the weights do
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=draw) for s in shapes]
    gradients = [gradient(p, i, 0, draw).float() for i, p in enumerate(start)]
    results = []
    for make, kind in [
        *zip(makers, [dtype] * len(makers), strict=True),
        (makers[0], torch.float32),
        (makers[-1], torch.float32),
    ]:
        params = [nn.Parameter(p.to(kind, copy=True)) for p in start]
        if layout is not None:
            params = [nn.Parameter(p.detach().contiguous(memory_format=layout)) if p.dim() == 4 else p for p in params]
        optimizer = make(params)
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.to(kind).contiguous(memory_format=layout) if layout and p.dim() == 4 else g.to(kind)
        for _ in range(steps):
            optimizer.step()
        results.append([p.detach().float() for p in params])
    half = len(WAYS) * adamp_too
    for own, first in ((results[:half], 0), (results[half:-2], half)):
        master = results[-2] if first == 0 else results[-1]
        for other in [*own[1:], master] if own else []:
            for a, b in zip(own[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_compiled_step_agrees_with_the_plain_one():
    shapes = random_shapes()
    for make in (lambda p: AdamP(p, 1e-2, weight_decay=0.1), lambda p: SGDP(p, 1e-3, 0.9, weight_decay=0.1)):
        plain, _, _ = train(make, shapes=shapes, steps=100)

        def compiled(params, make=make):
            optimizer = make(params)
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
            return optimizer

        other, _, _ = train(compiled, shapes=shapes, steps=100)
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_operators_pass_opcheck():
    def lists():
        draw = torch.Generator().manual_seed(0)
        return [[torch.randn(s, generator=draw) for s in ((4, 3), (5,))] for _ in range(4)]

    p, g, m, v = lists()
    v = [t.abs() for t in v]
    checks = ("test_schema", "test_faketensor")
    arguments = (p, g, m, v, [torch.zeros(()), torch.zeros(())], 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, False, False)
    torch.library.opcheck(radial.adamp_, arguments, test_utils=checks)
    torch.library.opcheck(
        radial.sgdp_, (p, g, m, 0.1, 0.9, 0.0, 1e-8, 0.1, 0.1, 0.1, False, False, True), test_utils=checks
    )
    torch.library.opcheck(radial.radial_step_, (p, g, m, [0.1, 0.2], 0.1, 0.1, 0.1, 1e-8, True), test_utils=checks)


# --- oracle 6: what is found in networks


class Digits(nn.Module):
    """Two convolutions before batch norm, a plain classifier and one whose rows are normalised."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.plain, self.cosine = nn.Linear(24, 10), nn.Linear(24, 10, bias=False)

    def forward(self, x):
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))).mean((2, 3))
        return self.plain(x), 8 * F.normalize(x, dim=1) @ F.normalize(self.cosine.weight, dim=1).t()


@pytest.mark.parametrize("make", [lambda p: AdamP(p, 1e-2), lambda p: SGDP(p, 0.1, 0.9)], ids=["adamp", "sgdp"])
def test_convolutions_before_batch_norm_and_normalised_classifiers_are_found_and_a_plain_last_layer_is_not(make):
    from headway.tasks.task import get

    images, labels = get("digits").data()[:2]
    torch.manual_seed(0)
    net, steps = Digits(), 80
    optimizer = make(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    seen = {name: [] for name in names}
    for _ in range(steps):
        rows = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        sum(F.cross_entropy(logits, labels[rows]) for logits in net(images[rows])).backward()
        optimizer.step()
        for index, kind in optimizer.projection_report().items():
            seen[names[index]].append(kind)
    for name, kind in (("conv1", "channel"), ("conv2", "channel"), ("cosine", "channel"), ("plain", "none")):
        assert seen[f"{name}.weight"].count(kind) > 0.95 * steps, name


# --- oracle 7: no question to the device, and checkpoints


@pytest.mark.parametrize("capturable", [False, True])
def test_the_lists_never_ask_a_tensor_for_its_value(capturable):
    params = [nn.Parameter(torch.randn(s, device="meta")) for s in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    for optimizer in (AdamP(params, 1e-2, weight_decay=0.1, foreach=True, capturable=capturable),
                      SGDP(params, 1e-2, 0.9, weight_decay=0.1, foreach=True)):  # fmt: skip
        for _ in range(2):
            optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync_on_a_gpu():
    params = [nn.Parameter(torch.randn(s, device="cuda")) for s in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizers = AdamP(params, 1e-2, weight_decay=0.1, capturable=True), SGDP(params, 1e-2, 0.9, weight_decay=0.1)
    for optimizer in optimizers:
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_saved_and_loaded_run_goes_on_bit_for_bit(way):
    for make in (lambda p: AdamP(p, 1e-2, **way), lambda p: SGDP(p, 0.1, 0.9, **way)):
        params, _, optimizer = train(make, steps=3)
        saved, kept = copy.deepcopy(optimizer.state_dict()), [p.clone() for p in params]
        grads = [torch.randn_like(p) for p in params]
        continued = go_on(make([nn.Parameter(p) for p in kept]), saved, grads)
        live = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(live, grads, strict=True):
            p.grad = g
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(live, continued, strict=True))
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            other.step()
            assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def go_on(optimizer, saved, grads):
    optimizer.load_state_dict(saved)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    return params


def test_checkpoints_of_the_official_package_and_of_torch_go_on():
    draw = torch.Generator().manual_seed(0)
    p, g, m, v = (torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(4))
    v = v.abs()
    official = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.1,
                "nesterov": False, "params": [0]}  # fmt: skip
    saved = {"state": {0: {"step": 5, "exp_avg": m, "exp_avg_sq": v}}, "param_groups": [official]}
    (found,) = go_on(AdamP([nn.Parameter(p.clone())]), copy.deepcopy(saved), [g])
    torch.testing.assert_close(found.detach(), naive_adamp(p, g, {"m": m, "v": v}, 6), rtol=1e-13, atol=1e-13)
    official = {**official, "momentum": 0.9, "dampening": 0.2, "lr": 0.1}
    saved = {"state": {0: {"momentum": m}}, "param_groups": [official]}
    (found,) = go_on(SGDP([nn.Parameter(p.clone())], 1.0), copy.deepcopy(saved), [g])
    torch.testing.assert_close(found.detach(), naive_sgdp(p, g, {"m": m}, 6), rtol=1e-13, atol=1e-13)
    for theirs, ours in (
        (
            torch.optim.AdamW([nn.Parameter(p.clone())], 1e-2, weight_decay=0.1),
            AdamP([nn.Parameter(p.clone())], delta=0),
        ),
        (torch.optim.SGD([nn.Parameter(p.clone())], 0.1, 0.9), SGDP([nn.Parameter(p.clone())], 0.1, 0.9, delta=0)),
    ):
        for k in range(2):
            theirs.param_groups[0]["params"][0].grad = g + k
            theirs.step()
        ours.param_groups[0]["params"][0].data.copy_(theirs.param_groups[0]["params"][0])
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        ours.param_groups[0]["delta"] = 0
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["params"][0].grad = g - 1
            optimizer.step()
        torch.testing.assert_close(ours.param_groups[0]["params"][0], theirs.param_groups[0]["params"][0])


# --- the interface


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_awkward_parameters_nan_empty_zero_and_missing_gradients(way):
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=draw)) for s in [(4, 3), (0, 3), (3, 0), (4, 3), (2, 2), (0,)]]
    for p in params[:4]:
        p.grad = torch.randn(p.shape, generator=draw)
    params[5].grad = torch.zeros(0)
    params[3].grad[1, 1] = float("nan")
    untouched = params[4].detach().clone()
    optimizer = AdamP(params, 1e-2, weight_decay=0.1, **way)
    optimizer.step()
    report = optimizer.projection_report()
    assert 4 not in report and report[3] == "none" and torch.equal(params[4], untouched)
    bad = params[3].isnan()
    assert bad[1, 1] and int(bad.sum()) == 1
    params[0].grad.zero_()
    before = params[0].detach().clone()
    optimizer.step()
    assert optimizer.projection_report()[0] == "channel" and not torch.equal(params[0], before)


@pytest.mark.parametrize("kind", ["transposed", "strided gradient"])
def test_any_strides_give_the_same_step(kind):
    draw = torch.Generator().manual_seed(0)
    values, g = torch.randn(6, 5, generator=draw), torch.randn(6, 5, generator=draw)
    for make in (lambda p: AdamP(p, 1e-2), lambda p: SGDP(p, 0.1, 0.9)):
        plain = nn.Parameter(values.clone())
        other = nn.Parameter(values.t().contiguous().t() if kind == "transposed" else values.clone())
        plain.grad, other.grad = g, g.t().contiguous().t()
        first, second = make([plain]), make([other])
        for _ in range(2):
            first.step()
            second.step()
        torch.testing.assert_close(plain, other)


def test_a_complex_parameter_is_a_pair_of_real_ones():
    draw = torch.Generator().manual_seed(0)
    values, g = torch.randn(3, 4, 2, generator=draw), torch.randn(3, 4, 2, generator=draw)
    real, complex_ = nn.Parameter(values.clone()), nn.Parameter(torch.view_as_complex(values.clone()))
    real.grad, complex_.grad = g, torch.view_as_complex(g)
    for make in (lambda p: AdamP(p, 1e-2), lambda p: SGDP(p, 0.1, 0.9)):
        make([real]).step()
        make([complex_]).step()
        torch.testing.assert_close(torch.view_as_real(complex_.detach()), real.detach())


def test_maximize_closures_schedulers_and_a_tensor_as_rate():
    draw = torch.Generator().manual_seed(0)
    values, g = torch.randn(4, 3, generator=draw), torch.randn(4, 3, generator=draw)
    for make in (AdamP, lambda p, lr, **kw: SGDP(p, lr, 0.9, **kw)):
        for way in WAYS:
            up, down, rated = (nn.Parameter(values.clone()) for _ in range(3))
            up.grad, down.grad, rated.grad = g, -g, -g
            make([up], 0.1, maximize=True, **way).step()
            make([down], 0.1, **way).step()
            make([rated], torch.tensor(0.1), **way).step()
            assert torch.equal(up, down)
            torch.testing.assert_close(rated, down)
        p = nn.Parameter(values.clone())
        optimizer = make([p], 0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

        def closure(p=p, optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        losses = []
        for _ in range(5):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        assert losses == sorted(losses, reverse=True)
    optimizer = SGDP([nn.Parameter(values.clone())], 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    for _ in range(3):
        optimizer.param_groups[0]["params"][0].grad = g
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_grad_scaler_unscales_and_skips_steps_with_infinities(way):
    torch.manual_seed(0)
    layer, data = nn.Linear(4, 3), torch.randn(8, 4)
    plain = copy.deepcopy(layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled, simple = AdamP(layer.parameters(), 1e-2, **way), AdamP(plain.parameters(), 1e-2, **way)
    with torch.autocast("cpu", torch.bfloat16):
        loss, same = layer(data).square().mean(), plain(data).square().mean()
    scaler.scale(loss).backward()
    same.backward()
    scaler.step(scaled)
    scaler.update()
    simple.step()
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    before = [p.detach().clone() for p in layer.parameters()]
    layer.weight.grad.fill_(float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(scaled)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_the_functional_form_is_the_class():
    draw = torch.Generator().manual_seed(0)
    p, g = (torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    for name, rule, form, make in (
        ("adamp", naive_adamp, adamp, lambda q: AdamP(q, 1e-2, weight_decay=0.1)),
        ("sgdp", naive_sgdp, sgdp, lambda q: SGDP(q, 0.1, 0.9, 0.2, weight_decay=0.1)),
    ):
        own = nn.Parameter(p.clone())
        own.grad = g
        make([own]).step()
        other = p.clone()
        if name == "adamp":
            form(
                [other], [g], [torch.zeros_like(p)], [torch.zeros_like(p)], [torch.zeros(())], lr=1e-2, weight_decay=0.1
            )
        else:
            form([other], [g], [torch.zeros_like(p)], lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1)
        torch.testing.assert_close(other, own.detach())
        torch.testing.assert_close(other, rule(p, g, {}, 1), rtol=1e-13, atol=1e-13)
    u, ratio = project_radial(p, gradient(p, 0, 0, draw), g, 0.1, 1e-8)
    assert float(ratio) == pytest.approx(0.1) and ((u * p).sum(1).abs() < 1e-6).all()
    assert torch.equal(project_radial(p, p, g, 0.1, 1e-8)[0], g)


def test_the_effective_step_is_the_rate_over_the_norm():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    norm = float(net[0].weight.norm())
    assert effective_step(AdamP(net.parameters(), 0.1), net) == {"0.weight": pytest.approx(0.1 / norm)}
    assert effective_step(SGDP(net.parameters(), 0.1), net) == {"0.weight": pytest.approx(0.1 / norm**2)}


def test_bad_settings_are_one_sentence():
    p = [nn.Parameter(torch.zeros(2, 2))]
    for wrong, word in (({"lr": -1.0}, "lr must be at least 0"), ({"eps": -1.0}, "eps"), ({"delta": -0.1}, "delta"),
                        ({"wd_ratio": 1.5}, "between 0 and 1"), ({"weight_decay": -1}, "weight_decay"),
                        ({"betas": (0.9, 1.0)}, r"betas are two numbers in \[0, 1\)")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            AdamP(p, **wrong)
    with pytest.raises(ValueError, match="divided by 1 - momentum"):
        SGDP(p, 0.1, momentum=1)
    with pytest.raises(TypeError, match="lr"):
        SGDP(p)
    with pytest.raises(RuntimeError, match="cannot both be True"):
        AdamP(p, foreach=True, fused=True)
    with pytest.raises(RuntimeError, match="fused=True needs"):
        AdamP([nn.Parameter(torch.zeros(2, 2, device="meta"))], fused=True)
    FlatParameter = type("FlatParameter", (nn.Parameter,), {})
    flat = torch.zeros(4).as_subclass(FlatParameter)
    with pytest.raises(ValueError, match="has lost its rows"):
        AdamP([{"params": [flat.requires_grad_()]}])
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        AdamP(embedding.parameters()).step()
    assert projected.KINDS == ("none", "channel", "layer")
