# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""One call pairs norms with their activations, replaces both, and says what it leaves."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headway as hw
from headway.norms import EvoNorm2dB0, EvoNorm2dS0, EvoNormS0, convert_bn_act


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Flatten(),
    )


class Block(nn.Module):
    def __init__(self, shared: bool = False, functional: bool = False, post: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.shared, self.functional, self.post = shared, functional, post

    def forward(self, x):
        if self.post:
            return self.act(x + self.norm(self.conv(x)))
        h = F.relu(self.norm(x)) if self.functional else self.act(self.norm(x))
        y = x + self.conv(h)
        return self.act(y) if self.shared else y


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


@pytest.mark.parametrize("build", [plain, Untraceable])
def test_pairs_become_one_layer_with_the_norms_own_parameters(build):
    model = build()
    body = model if build is plain else model.body
    gamma, optimizer = body[1].weight, torch.optim.SGD(model.parameters(), lr=0.1)
    body[1].running_var.fill_(3)
    hw.apply(model, hw.EvoNorm(groups=4), optimizer=optimizer)
    assert type(body[1]) is EvoNorm2dS0 and type(body[4]) is EvoNormS0 and body[1].groups == 4
    assert type(body[2]) is type(body[5]) is nn.Identity and body[1].weight is gamma
    assert body[1].v in {p for g in optimizer.param_groups for p in g["params"]}
    assert model(torch.rand(2, 1, 8, 8)).isfinite().all()
    hw.undo(model)
    assert type(body[1]) is nn.BatchNorm2d and type(body[2]) is nn.ReLU and body[1].weight is gamma


def test_the_b_series_takes_the_running_variance_over():
    model = plain()
    model[1].running_var.fill_(3)
    assert convert_bn_act(model, "B0") is model
    assert type(model[1]) is EvoNorm2dB0 and bool((model[1].running_var == 3).all())


def test_a_norm_without_activation_is_affine_or_stays():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    kept = hw.apply(model, hw.EvoNorm(keep_linear=False), copy=True)
    assert type(kept[1]) is nn.BatchNorm2d and type(kept[3]) is EvoNorm2dS0
    hw.apply(model, hw.EvoNorm())
    assert not model[1].apply_act and model[3].apply_act and model[1].v is None


def test_an_activation_that_reads_something_else_too_stays_and_is_named():
    with pytest.warns(UserWarning, match="0.norm .*0.act also reads"):
        model = hw.apply(nn.Sequential(Block(shared=True), Block()), hw.EvoNorm())
    assert type(model[0].norm) is nn.BatchNorm2d and type(model[1].norm) is EvoNorm2dS0


def test_a_functional_activation_keeps_its_norm():
    with pytest.warns(UserWarning, match="no module"), pytest.raises(hw.NothingToChange):
        hw.apply(Block(functional=True), hw.EvoNorm())


def test_a_norm_that_feeds_an_addition_brings_the_papers_warning():
    with pytest.warns(UserWarning, match="pre-activation"):
        hw.apply(Block(post=True), hw.EvoNorm())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hw.apply(Block(), hw.EvoNorm())


def test_one_activation_module_after_several_norms_goes_once_all_of_them_do():
    act = nn.ReLU()
    model = nn.Sequential(nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)
    with pytest.warns(UserWarning, match="also reads"), pytest.raises(hw.NothingToChange):
        hw.apply(model, hw.EvoNorm(), where="0")
    hw.apply(model, hw.EvoNorm())
    assert isinstance(model[0], EvoNorm2dS0) and isinstance(model[3], EvoNorm2dS0)
    assert type(model[1]) is type(model[4]) is nn.Identity


def test_norms_of_vectors_and_unknown_layers():
    with pytest.raises(hw.NothingToChange, match="batch or group norms"):
        hw.apply(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()), hw.EvoNorm())
    with pytest.raises(ValueError, match="S0"):
        hw.EvoNorm("S3")
    assert hw.technique("evo-norm", to="B0") == hw.EvoNorm("B0")


def test_a_converted_net_trains():
    torch.manual_seed(0)
    model = hw.apply(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)), hw.EvoNorm()
    )
    x = torch.randn(32, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
