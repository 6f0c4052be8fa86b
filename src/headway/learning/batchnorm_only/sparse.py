"""Weights of which a few entries train: what is fixed, the places of the few, and their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headway.learning.batchnorm_only.choose import output_layer
from headway.learning.batchnorm_only.layers import CONVOLUTIONS, Become, _Kin
from headway.surgery import Edit, SetParameter, Site


class Some(_Kin):
    """A layer whose weight is ``fixed`` with ``some`` at ``places`` (indices into each output channel)."""

    @property
    def weight(self) -> Tensor:
        layer: Any = self
        return layer.fixed.flatten(1).scatter(1, layer.places, layer.some).view(layer.fixed.shape)


class SetBuffer(Edit):
    """Puts a buffer under a new name of a module."""

    def __init__(self, owner: nn.Module, attribute: str, value: Tensor) -> None:
        self.owner, self.name, self.value = owner, attribute, value

    def do(self) -> None:
        self.owner.register_buffer(self.name, self.value)

    def undo(self) -> None:
        del self.owner._buffers[self.name]

    def describe(self) -> tuple[str, str]:
        return "not set", f"buffer {tuple(self.value.shape)}"


class _SetSome(SetParameter):
    """Puts the few trained values beside the rest, and says in the plan how many they are."""

    def __init__(self, owner: Any, new: nn.Parameter, name: str) -> None:
        super().__init__(owner, "some", new, name)
        self.whole: nn.Parameter = owner.weight

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        assert self.new is not None
        return [self.whole], [self.new]

    def describe(self) -> tuple[str, str]:
        assert self.new is not None
        channels, each = self.new.shape
        return "at rest", f"trains {each} random weights of each of {channels} output channels"

    def undo(self) -> None:
        del self.owner._parameters[self.attribute]


class _Hide(SetParameter):
    """Takes the whole weight out of the module; what comes for it is the business of :class:`_SetSome`."""

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [], []


def _wanted(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    convolutions = [site for site in sites if type(site.module) in CONVOLUTIONS]
    if convolutions or any(isinstance(m, CONVOLUTIONS) for m in model.modules()):
        return convolutions
    linears = [site for site in sites if type(site.module) is nn.Linear]
    try:
        out = {id(module) for module in output_layer(model)[1].modules()}
    except ValueError:
        out = set()
    return [site for site in linears if id(site.module) not in out]


def train_some(model: nn.Module, sites: Sequence[Site], per_channel: int, seed: int) -> list[Edit]:
    """The edits that let ``per_channel`` random weights of every output channel train.

    Raises:
        ValueError: a channel has fewer weights than that.
    """
    draw = torch.Generator().manual_seed(seed)
    found: list[Edit] = []
    for site in _wanted(model, sites):
        layer: Any = site.module
        rows = layer.weight.detach().flatten(1)
        if rows.shape[1] < per_channel:
            raise ValueError(
                f"{site.name} has {rows.shape[1]} weights an output channel, fewer than per_channel={per_channel}; give less"
            )
        places = torch.rand(rows.shape, generator=draw).argsort(1)[:, :per_channel].to(rows.device)
        values = nn.Parameter(rows.gather(1, places).clone())
        prefix = f"{site.name}." if site.name else ""
        found += [
            SetBuffer(layer, "fixed", layer.weight.detach()),
            SetBuffer(layer, "places", places),
            _SetSome(layer, values, f"{prefix}weight"),
            _Hide(layer, "weight", None, f"{prefix}weight"),
            Become(layer, Some, site.name),
        ]
    return found
