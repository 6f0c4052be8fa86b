import copy
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from model_families import MOVABLE, TimmViT, build, run
from torch import nn

import headway as hw
from headway.residual.additions import find_additions
from headway.residual.depth import NotTowerFormWarning, Residual, Scaled, ScaleResiduals, fold, scaled_add
from headway.residual.expansion import Tower
from headway.surgery import NothingToChange


class Block(nn.Module):
    """A torchvision-style basic block."""

    def __init__(self, inside: int, out: int, after: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1), nn.BatchNorm2d(out)) if inside != out else None
        self.after = after

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out) if self.after else out


def resnet(after: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Block(4, 4, after), Block(4, 8, after), Block(8, 8, after))


class PreMLP(nn.Module):
    def __init__(self, dim: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(F.gelu(norm(x)))
        return x


def test_a_factor_of_one_leaves_the_model_bitwise_and_zero_gives_decoder_of_encoder():
    torch.manual_seed(0)
    x, ends = torch.randn(4, 3), (nn.Linear(3, 8), nn.Linear(8, 2))
    branches = [nn.Linear(8, 8) for _ in range(5)]
    h = ends[0](x)
    assert torch.equal(Tower(branches, 0.0, *ends)(x), ends[1](h))
    for branch in branches:
        h = h + branch(h)
    assert torch.equal(Tower(branches, 1.0, *ends)(x), ends[1](h))
    model, y = PreMLP(), torch.randn(4, 8)
    before = model(y)
    assert torch.equal(hw.apply(model, ScaleResiduals(1.0))(y), before)
    hw.undo(model)
    assert torch.equal(hw.apply(model, ScaleResiduals(0.0))(y), y)


def test_variance_grows_by_one_plus_lam_squared_a_branch():
    n, ratios = 32, []
    for seed in range(20):
        torch.manual_seed(seed)
        branches = []
        for _ in range(n):
            a, b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            nn.init.normal_(a.weight, std=64**-0.5)
            nn.init.normal_(b.weight, std=(2 / 64) ** 0.5)
            branches.append(nn.Sequential(a, nn.ReLU(), b))
        x = torch.randn(256, 64)
        with torch.no_grad():
            ratios.append((Tower(branches)(x).var() / x.var()).log().item())
    law = n * math.log(1 + 1 / n)
    assert statistics.mean(ratios) == pytest.approx(law, rel=0.15)


def test_a_batch_of_one_equals_the_row_of_a_batch_of_sixty_four():
    torch.manual_seed(0)
    tower, x = Tower([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(9)]), torch.randn(64, 8)
    torch.testing.assert_close(tower(x)[5:6], tower(x[5:6]), rtol=1e-6, atol=1e-6)
    assert tower(x[:0]).shape == (0, 8)


def test_folding_preserves_the_function_and_the_state_round_trips_the_mode():
    torch.manual_seed(0)
    tower, x = Tower([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(9)]), torch.randn(4, 8)
    state, before = copy.deepcopy(tower.state_dict()), tower(x)
    other = Tower([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(9)], 0.7)
    other.load_state_dict(state)
    assert torch.equal(other(x), before) and other.blocks[0].scale_mode == "1/sqrt(n)"
    fold(tower)
    torch.testing.assert_close(tower(x), before, rtol=1e-6, atol=1e-6)
    assert tower.blocks[0].branch_scale == 1.0
    learned = Tower([nn.Linear(8, 8) for _ in range(9)], "learnable")
    with pytest.raises(ValueError, match="same mode"):
        learned.load_state_dict({k: v for k, v in state.items() if "extra" in k}, strict=False)


def test_zero_start_stops_every_weight_gradient_and_no_scalar_gradient():
    torch.manual_seed(0)
    model, x = hw.apply(PreMLP(), ScaleResiduals("zero")), torch.randn(4, 8)
    model(x).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("branch_scale"):
            assert parameter.grad.item() != 0
        else:
            assert torch.count_nonzero(parameter.grad) == 0
    assert sum(name.endswith("branch_scale") for name, _ in model.named_parameters()) == 3


@pytest.mark.parametrize("name", MOVABLE)
def test_every_branch_of_a_known_family_is_scaled_and_undone(name):
    model = build(name)
    before, keys = run(name, model), set(model.state_dict())
    changed = hw.apply(model, ScaleResiduals(1.0))
    scaled = [m for m in changed.modules() if isinstance(m, Scaled)]
    assert len(scaled) == 8
    torch.testing.assert_close(run(name, changed), before, rtol=1e-4, atol=1e-5)
    hw.undo(changed)
    hw.apply(model, ScaleResiduals())
    assert not torch.allclose(run(name, model), before, atol=1e-4)
    assert all(m.branch_scale == pytest.approx(8**-0.5) for m in model.modules() if isinstance(m, Scaled))
    hw.undo(model)
    assert torch.equal(run(name, model), before) and set(model.state_dict()) == keys


def test_basic_blocks_are_found_by_structure_with_their_stages():
    with pytest.warns(NotTowerFormWarning, match="tower"):
        hw.plan(resnet(), ScaleResiduals())
    found = find_additions(resnet(False))
    assert [a.name for a in found] == ["1.bn2", "2.bn2", "3.bn2"]
    assert [a.stage for a in found] == [0, 1, 1]
    model = hw.apply(resnet(False), ScaleResiduals("1/n", per_stage=True))
    assert [m.branch_scale for m in model.modules() if isinstance(m, Scaled)] == [1.0, 0.5, 0.5]


def test_removing_norms_keeps_biases_and_makes_samples_independent():
    model, x = resnet(False), torch.randn(8, 1, 6, 6)
    nn.init.constant_(model[1].bn2.bias, 3.0)
    bias = model[1].bn2.bias
    hw.apply(model, ScaleResiduals(remove_norm=True))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert model[1].bn2.bias is bias
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-5, atol=1e-5)
    hw.undo(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 7


def test_residual_keeps_what_bfloat16_would_lose_in_a_float32_stream():
    branch = nn.Identity()
    x = torch.ones(4, dtype=torch.bfloat16)
    assert torch.equal(Residual(branch, "1/n", 1024)(x), x)
    kept = Residual(branch, "1/n", 1024, torch.float32)(x)
    assert kept.dtype == torch.float32 and kept[0].item() == pytest.approx(1 + 1 / 1024)


def test_scaled_add_agrees_for_numbers_and_tensors_and_differentiates():
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(scaled_add(x, y, 0.3), scaled_add(x, y, alpha))
    assert torch.autograd.gradcheck(scaled_add, (x, y, alpha))


def test_lists_globs_copies_and_errors():
    model = hw.apply(PreMLP(), ScaleResiduals([0.1, 0.2, 0.3]))
    assert [m.branch_scale for m in model.layers] == [0.1, 0.2, 0.3]
    twin, x = copy.deepcopy(model), torch.randn(2, 8)
    assert torch.equal(twin(x), model(x))
    part = hw.apply(PreMLP(), ScaleResiduals("1/n", layers="layers.1"))
    assert [isinstance(m, Scaled) for m in part.layers] == [False, True, False]
    with pytest.raises(ValueError, match="one number a branch"):
        hw.apply(PreMLP(), ScaleResiduals([0.1]))
    with pytest.raises(ValueError, match="positive"):
        ScaleResiduals(n=0)
    with pytest.raises(ValueError, match="scale must be"):
        ScaleResiduals("1/n^2")
    with pytest.raises(ValueError, match="needs n"):
        Residual(nn.Identity())
    with pytest.raises(ValueError, match="keep the shape"):
        Residual(nn.Linear(3, 2), 0.5)(torch.randn(1, 3))
    with pytest.raises(NothingToChange, match="residual stream"):
        hw.apply(nn.Sequential(nn.Linear(3, 3)), ScaleResiduals())


class Functional(nn.Module):
    """Two branches of which the second ends as told."""

    def __init__(self, ending) -> None:
        super().__init__()
        self.a, self.b, self.ending = nn.Linear(8, 8), nn.Linear(8, 8), ending

    def forward(self, x):
        x = x + self.a(x)
        return x + self.ending(self.b(x))


def test_a_branch_that_ends_in_a_function_is_refused_or_scaled_before_it_never_passed_over():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"1 of 2 residual branches cannot be scaled.* ends in the function relu"):
        hw.apply(Functional(F.relu), ScaleResiduals())
    named = hw.apply(Functional(F.relu), ScaleResiduals(0.5, layers="a"))
    assert isinstance(named.a, Scaled) and not isinstance(named.b, Scaled)
    turned = Functional(lambda y: F.dropout(y.view(-1, 8), 0.0).reshape(4, 8))
    before, middle = turned(x), x + turned.a(x)
    hw.apply(turned, ScaleResiduals(0.5, layers="b"))
    torch.testing.assert_close(turned(x) - middle, 0.5 * (before - middle))

    class Twice(Functional):
        def forward(self, x):
            x = x + self.a(x)
            return x + self.a(x)

    with pytest.raises(ValueError, match="called 2 times"):
        hw.apply(Twice(F.relu), ScaleResiduals())


def test_encoder_and_decoder_count_their_branches_apart():
    model = hw.apply(nn.Transformer(16, 2, 3, 2, 32, batch_first=True), ScaleResiduals("1/n"))
    scales = [
        {m.branch_scale for m in part.modules() if isinstance(m, Scaled)} for part in (model.encoder, model.decoder)
    ]
    assert scales == [{1 / 6}, {1 / 6}]
    model = hw.apply(build("t5"), ScaleResiduals("1/n"))
    scales = [
        {m.branch_scale for m in part.modules() if isinstance(m, Scaled)} for part in (model.encoder, model.decoder)
    ]
    assert scales == [{1 / 8}, {1 / 6}]


@pytest.mark.parametrize("name", ["gptj", "phi", "opt", "t5", "whisper", "clip", "timm"])
def test_branches_of_families_that_cannot_be_rewired_are_scaled_all_the_same(name):
    model = build(name)
    before = run(name, model)
    hw.apply(model, ScaleResiduals(0.5))
    assert not torch.allclose(run(name, model), before, atol=1e-5)
    hw.undo(model)
    assert torch.equal(run(name, model), before)


def test_layer_scale_gains_carry_the_factor():
    model = hw.apply(TimmViT(scale=True), ScaleResiduals(0.5))
    assert all(isinstance(block.ls1, Scaled) and not isinstance(block.attn.proj, Scaled) for block in model.blocks)


def test_graph_convolution_layers_are_scaled():
    gnn = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    layer = gnn.DeepGCNLayer(gnn.GCNConv(4, 4), nn.LayerNorm(4), nn.ReLU(), block="res+")
    x, edges = torch.randn(5, 4), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    model = nn.ModuleList([layer])
    before = model[0](x, edges)
    hw.apply(model, ScaleResiduals(0.5))
    torch.testing.assert_close(model[0](x, edges) - x, 0.5 * (before - x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_scaled_branches_compile_without_a_break():
    model, x = hw.apply(PreMLP(), ScaleResiduals("learnable")), torch.randn(2, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
