"""Standardised weights in a model you already have: the convolutions in front of norms are changed, and folded once it is trained.

    model = hw.apply(model, hw.StandardiseWeights())
    deployed = fold_weight_standardization(model)

The weights, the equation and its paper (arXiv 1903.10520): :mod:`headway.weights.standardised`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from headway.surgery import Edit, Site, Swap, Technique, apply
from headway.weights.invariance import is_norm, links
from headway.weights.standardised import (
    CONVOLUTIONS,
    STANDARDISED,
    EpsMode,
    StandardisedConv,
    WeightStandardization,
    entries,
)


def before_norms(model: nn.Module) -> set[str]:
    """Names of the convolutions whose output goes into a norm: by the traced graph, or else by the order of siblings."""
    modules = dict(model.named_modules())
    found = {link.linear for link in links(model) if link.next is not None and is_norm(modules[link.next])}
    for prefix, module in model.named_modules():
        inner = list(module.named_children())
        for (name, child), (_, after) in pairwise(inner):
            if isinstance(child, CONVOLUTIONS) and is_norm(after):
                found.add(f"{prefix}.{name}" if prefix else name)
    return found


@dataclass(frozen=True)
class StandardiseWeights(Technique):
    """Makes the convolutions in front of norms use standardised weights. Parameters and their names stay.

    Attributes:
        eps, unbiased, eps_mode: of :func:`standardize`.
        skip_last: leave a convolution that is the last layer of the model, its classifier.
        require_norm: only convolutions that a norm follows.
    """

    eps: float = 1e-5
    unbiased: bool = False
    eps_mode: EpsMode = "var"
    skip_last: bool = True
    require_norm: bool = True

    looks_for: ClassVar[str] = "convolutions of more than one entry a filter in front of a norm"

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        allowed = {site.name for site in sites}
        return [
            self._swap(model, name, module) for name, module, why in self.judged(model) if not why and name in allowed
        ]

    def _swap(self, model: nn.Module, name: str, module: nn.Module) -> Edit:
        new = StandardisedConv.from_module(module, ws_eps=self.eps, unbiased=self.unbiased, eps_mode=self.eps_mode)
        assert new is not None
        return Swap(model, name, module, new)

    def judged(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
        """Every plain convolution, and why it is left alone ("" where it is not)."""
        plain = [(name, module) for name, module in model.named_modules() if type(module) in CONVOLUTIONS]
        followed = before_norms(model) if self.require_norm else set()
        last = [module for module in model.modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))][-1:]
        for name, module in plain:
            why = ""
            if entries(module) == 1:
                why = "its filters have one entry"
            elif self.require_norm and name not in followed:
                why = "no norm follows it"
            elif self.skip_last and module is last[0]:
                why = "it is the last layer"
            yield name, module, why


def standardize_convs(
    model: nn.Module, skip_last: bool = True, require_norm: bool = True, **settings: Any
) -> tuple[nn.Module, dict[str, str]]:
    """Standardises the convolutions of a model in place; returns it and {convolution that was left alone: why}."""
    technique = StandardiseWeights(skip_last=skip_last, require_norm=require_norm, **settings)
    left = {name: why for name, _, why in technique.judged(model) if why}
    return apply(model, technique), left


@torch.no_grad()
def fold_weight_standardization(model: nn.Module) -> nn.Module:
    """Plain convolutions with the standardised weights in place, for deployment: the same outputs, no cost. Returns the model (a
    new module where it is itself a convolution); a parametrised weight loses its parametrization."""
    root = model
    for name, module in list(model.named_modules()):
        if isinstance(module, StandardisedConv):
            plain = next(kind for kind, ours in STANDARDISED.items() if type(module) is ours)
            new: Any = copy.copy(module)
            new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
            new.__class__ = plain
            for setting in ("ws_eps", "unbiased", "eps_mode", "_kept"):
                new.__dict__.pop(setting, None)
            new.weight = nn.Parameter(module._standardised(module.weight), module.weight.requires_grad)
            swap = Swap(model, name, module, new)
            swap.do()
            root = new if module is model else root
        elif parametrize.is_parametrized(module):
            parts: Any = module.parametrizations
            for key, chain in list(parts.items()):
                if any(isinstance(part, WeightStandardization) for part in chain):
                    parametrize.remove_parametrizations(module, key, leave_parametrized=True)
    return root
