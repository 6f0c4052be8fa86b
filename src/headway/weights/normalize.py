"""Normalize-and-Project as one call on a model you already have: norms before nonlinearities, weights kept on their spheres.

    hw.apply(model, hw.NormalizeAndProject(), optimizer=optimizer)

Between every linear map or convolution and its nonlinearity goes a normalisation, h = phi(sigma N(W h) + mu); the linear bias, which
the norm makes redundant, is dropped; then :class:`headway.weights.NaP` keeps the weights' norms as the optimiser steps. The last
layer, which no nonlinearity follows, is left alone. Transformers of known families get norms before the MLP's nonlinearity and on
each head's queries and keys (:mod:`headway.weights.transformer_norms` says where). Lyle et al., 2024 (arXiv 2407.01800); see
:mod:`headway.weights.project`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from headway.surgery import Edit, Plan, SetParameter, Site, Swap, Technique, apply, fused_paths_off, plan
from headway.weights.invariance import ACTIVATIONS, followed_by_norm, links
from headway.weights.project import NaP
from headway.weights.transformer_norms import HeadNorm, is_conv1d

Norm = Literal["layer", "rms", "group"]
_ATTACHED: WeakKeyDictionary[nn.Module, NaP] = WeakKeyDictionary()


class _OnSphere(Edit):
    """Says that a weight keeps its norm; what does it is attached to the optimiser, and taken off when this is undone."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def do(self) -> None:
        pass

    def undo(self) -> None:
        if nap := _ATTACHED.pop(self.model, None):
            nap.detach()

    def describe(self) -> tuple[str, str]:
        return "free to grow", "norm kept at its start"


@dataclass(frozen=True)
class NormalizeAndProject(Technique):
    """Inserts norms before nonlinearities and projects weights back to their initial norms after every step.

    Attributes:
        norm: "layer" (over a layer's outputs; ``GroupNorm(1, C)`` for convolutions), "rms" (linear maps; convolutions get the
            group norm), or "group".
        affine: norms with gain and offset. drop_bias: drop linear biases before them. eps: of the norms.
        project: also keep the weights' norms (False: normalise only). normalize: False inserts nothing.
        every, scale_offset, per, decay, tangent: of :class:`headway.weights.NaP`.

    Raises:
        ValueError: a ``norm`` that does not exist; settings of ``NaP`` out of range, once there is an optimiser.
    """

    norm: Norm = "layer"
    affine: bool = True
    drop_bias: bool = True
    normalize: bool = True
    project: bool = True
    every: int = 1
    scale_offset: Literal["decay", "joint", "none"] = "decay"
    per: Literal["tensor", "row"] = "tensor"
    decay: float = 1e-2
    tangent: bool = False
    eps: float = 1e-5

    looks_for: ClassVar[str] = "linear maps or convolutions straight before a nonlinearity or a norm"

    def __post_init__(self) -> None:
        if self.norm not in ("layer", "rms", "group"):
            raise ValueError(f'norm is "layer", "rms" or "group", not {self.norm!r}')

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        allowed = {site.name for site in sites}
        modules = dict(model.named_modules())
        found: list[Edit] = []
        kept = [name for name in followed_by_norm(model) if name.rpartition(".")[0] in allowed]
        for link in links(model) if self.normalize else []:
            linear: Any = modules[link.linear]
            after = modules[link.next] if link.next else None
            if link.linear not in allowed or not (after is None or isinstance(after, ACTIVATIONS)):
                continue
            norm = self._norm_for(linear, link.head_dim)
            if self.drop_bias and linear.bias is not None:
                # transformers' Conv1D cannot do without a bias
                none = nn.Parameter(torch.zeros_like(linear.bias), False) if is_conv1d(linear) else None
                found.append(SetParameter(linear, "bias", none, f"{link.linear}.bias"))
            if after is not None and link.alone:
                # the norm goes to the nonlinearity, so that the weight keeps its name
                found.append(
                    Swap(model, str(link.next), after, _alike(nn.Sequential(OrderedDict(norm=norm, phi=after)), linear))
                )
            else:
                found.append(
                    Swap(
                        model, link.linear, linear, _alike(nn.Sequential(OrderedDict(linear=linear, norm=norm)), linear)
                    )
                )
            kept.append(f"{link.linear}.weight")
        if found:
            found += fused_paths_off(model, [modules[link.linear] for link in links(model)] if self.normalize else [])
        if self.project:
            found += [_OnSphere(model, name) for name in kept]
        return found

    def _norm_for(self, linear: Any, head_dim: int | None) -> nn.Module:
        if head_dim is not None:
            return HeadNorm(head_dim, self.eps, self.norm == "rms", self.affine)
        features = linear.nf if is_conv1d(linear) else getattr(linear, "out_features", None)
        if features is None:
            return nn.GroupNorm(1, linear.out_channels, self.eps, self.affine)
        if self.norm == "rms":
            from headway.norms.rms import RMSNorm

            return RMSNorm(features, self.eps, self.affine, bias=self.affine)
        return nn.LayerNorm(features, self.eps, self.affine)

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.project:
            nap = NaP(model, self.every, self.scale_offset, per=self.per, decay=self.decay, tangent=self.tangent)
            _ATTACHED[model] = nap.attach(optimizer)
        return optimizer


def _alike(new: nn.Module, old: nn.Module) -> nn.Module:
    weight: Any = old.weight
    return new.to(weight.device, weight.dtype).train(old.training)


def normalize_(
    model: nn.Module, norm: Norm = "layer", affine: bool = True, drop_bias: bool = True
) -> tuple[nn.Module, Plan]:
    """Inserts norms before nonlinearities, in place; returns the model and what was done. The last linear layer is left alone."""
    technique = NormalizeAndProject(norm=norm, affine=affine, drop_bias=drop_bias, project=False)
    report = plan(model, technique)
    return apply(model, technique), report
