# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false
"""AdaIN modules of any make become whitening and colouring in one call, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import headway as hw
from headway.norms import GDWCT, AdaIN, DropInGDWCT, record_terms, replace_adain
from headway.norms.whitening import GDWCTTerms


class OneLinear(nn.Module):
    """The common form: gain and offset from one linear layer of the style."""

    def __init__(self, style_dim, num_features):
        super().__init__()
        self.norm, self.fc = nn.InstanceNorm2d(num_features, affine=False), nn.Linear(style_dim, 2 * num_features)

    def forward(self, x, s):
        gamma, beta = self.fc(s)[..., None, None].chunk(2, 1)
        return (1 + gamma) * self.norm(x) + beta


class TwoLinears(nn.Module):
    def __init__(self, style_dim, num_features):
        super().__init__()
        self.norm = nn.InstanceNorm2d(num_features, affine=True)
        self.gain, self.offset = (nn.Linear(style_dim, num_features) for _ in range(2))

    def forward(self, x, style):
        return self.gain(style)[..., None, None] * self.norm(x) + self.offset(style)[..., None, None]


class Block(nn.Module):
    """A block with one AdaIN and a convolution, which is called with two inputs itself and must stay."""

    def __init__(self, inner):
        super().__init__()
        self.conv, self.adain = nn.Conv2d(8, 8, 3, padding=1), inner

    def forward(self, x, s):
        return x + self.adain(self.conv(x).relu(), s)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind(4, 8)) for kind in (OneLinear, TwoLinears))
        self.last = AdaIN(8, 4)
        self.norm = nn.InstanceNorm2d(8)

    def forward(self, x, s):
        for block in self.blocks:
            x = block(x, s)
        return self.norm(self.last(x, s))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X, S = (torch.linspace(-1, 1, 2 * 8 * 16).sin().view(2, 8, 4, 4), torch.linspace(-1, 1, 8).view(2, 4))


def test_every_kind_of_adain_is_found_and_nothing_else(net):
    plan = hw.plan(net, hw.ReplaceAdaIN(groups=4))
    assert {row.name for row in plan.rows} == {"blocks.0.adain", "blocks.1.adain", "last"}
    before = net(X, S)
    changed = hw.apply(net, hw.ReplaceAdaIN(groups=4))
    layers = [m for m in changed.modules() if isinstance(m, GDWCT)]
    assert len(layers) == 3 and all((m.channels, m.style_dim, m.groups) == (8, 4, 4) for m in layers)
    assert isinstance(changed.blocks[0], Block) and changed(X, S).shape == before.shape
    assert torch.equal(hw.undo(changed)(X, S), before)


def test_one_call_with_settings_and_a_filter(net):
    replace_adain(net, where="blocks.*", groups=2, stats="instance", mlp_dim=6)
    found = {name: m for name, m in net.named_modules() if isinstance(m, GDWCT)}
    assert found.keys() == {"blocks.0.adain", "blocks.1.adain"} and isinstance(net.last, AdaIN)
    assert all(m.groups == 2 and m.stats == "instance" and m.coloring_net[0].out_features == 6 for m in found.values())


def test_groups_that_do_not_fit_name_the_module_and_a_model_without_adain_is_told(net):
    with pytest.raises(ValueError, match=r"blocks\.0\.adain: groups must divide style_dim; they are 8 and 4"):
        hw.apply(net, hw.ReplaceAdaIN())
    assert isinstance(net.blocks[0].adain, OneLinear)
    with pytest.raises(hw.NothingToChange, match="AdaIN modules"):
        replace_adain(nn.Sequential(nn.Conv2d(3, 3, 3), nn.InstanceNorm2d(3)), groups=1)


def test_all_passes_of_all_blocks_are_recorded_within_the_context_alone(net):
    replace_adain(net, groups=4)
    with record_terms(net) as outer:
        net(X, S)
        with record_terms(net) as inner:
            net(X, S)
    net(X, S)
    assert len(inner) == 3 and len(outer) == 6 and all(isinstance(each, GDWCTTerms) for each in outer)
    wanted = sum(each.whitening() for each in outer) / 6, sum(each.coloring() for each in outer) / 6
    torch.testing.assert_close((outer.whitening(), outer.coloring()), wanted)
    torch.testing.assert_close(outer.penalty(), 0.001 * wanted[0] + 10 * wanted[1])
    released = sum(each.coloring("released") for each in outer) / 6
    torch.testing.assert_close(outer.penalty(1, 2, "released"), wanted[0] + 2 * released)
    outer.penalty().backward()
    assert net.last.coloring_net[0].weight.grad.abs().sum() > 0
    with record_terms(nn.Linear(2, 2)) as none:
        assert none.penalty() == 0


def test_it_gives_back_the_features_of_the_layer_and_can_be_copied_while_recorded(net):
    layer = DropInGDWCT(8, 4, 2)
    twin = GDWCT(8, 4, 2)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(layer(X, S), twin(X, S)[0])
    with record_terms(layer) as terms:
        layer(X, S)
        copied = copy.deepcopy(layer)
        copied(X, S)
    assert len(terms) == 1 and torch.equal(copied(X, S), layer(X, S))


def test_the_optimiser_keeps_alpha_within_bounds_and_trains_the_new_parameters(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    replace_adain(net, optimizer=optimizer, groups=4)
    alphas = [m.alpha for m in net.modules() if isinstance(m, GDWCT)]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in net.parameters()} <= held
    before = [a.item() for a in alphas]
    net(X, S).square().mean().backward()
    optimizer.step()
    assert all(0 <= a <= 1 for a in alphas) and [a.item() for a in alphas] != before


def test_dtype_and_mode_of_the_module_are_kept(net):
    net.double().eval()
    replace_adain(net, groups=4)
    assert not net.last.training and all(p.dtype == torch.float64 for p in net.parameters())
    assert net(X.double(), S.double()).dtype == torch.float64


def test_adaptive_instance_norm_gives_the_style_its_mean_and_deviation():
    torch.manual_seed(0)
    layer = AdaIN(8, 4)
    y = layer(5 + 3 * X, S[..., None, None])
    gamma, beta = layer.net(S).chunk(2, 1)
    torch.testing.assert_close(y.mean((2, 3)), beta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.std((2, 3), unbiased=False), (1 + gamma).abs(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"AdaIN takes \(B, 8, H, W\)"):
        layer(X[:, :4], S)


def test_a_compiled_model_with_replaced_modules_gives_the_same(net):
    replace_adain(net, groups=4)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(X, S), net(X, S))
    with record_terms(net) as terms:
        compiled(X, S)
    assert len(terms) == 3
