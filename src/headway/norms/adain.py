"""From adaptive instance norm to group-wise whitening and colouring in one call, and the adaptive instance norm itself.

    model = hw.apply(model, hw.ReplaceAdaIN(groups=8), optimizer=optimizer)
    with record_terms(model) as terms:
        loss = ...                                  # passes of the model, as many as the step needs
    (loss + terms.penalty()).backward()             # 0.001 R_w + 10 R_c over all blocks and passes

Every AdaIN module, called with (content, style), becomes a block that styles with channel covariances (:mod:`headway.norms.whitening`,
arXiv 1812.09912) and gives back the features alone; with ``optimizer`` its alpha is kept between 0 and 1. The function of the model is
another one: it has to be trained (on).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from headway.norms.whitening import GDWCT, ColoringTarget, GDWCTTerms, Stats, mlp, project_alpha
from headway.surgery import Site, Technique, Where, apply


class AdaIN(nn.Module):
    """Adaptive instance norm: y = (1 + gamma(s)) (c - mean) / sqrt(var + eps) + beta(s), by channel of each image.

    The baseline of :class:`headway.norms.GDWCT`, with such a network behind its numbers: ``blocks`` hidden layers of ``mlp_dim``, as many
    as the style has numbers if None ("Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", Huang and Belongie,
    2017, arXiv 1703.06868).

    Shapes:
        content (B, C, H, W), style (B, style_dim) or (B, style_dim, 1, 1); output (B, C, H, W).

    Raises:
        ValueError: inputs of other shapes.
    """

    def __init__(
        self, num_features: int, style_dim: int, mlp_dim: int | None = None, blocks: int = 1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_features, self.style_dim = num_features, style_dim
        self.norm = nn.InstanceNorm2d(num_features, eps)
        self.net = mlp(style_dim, style_dim if mlp_dim is None else mlp_dim, blocks, 2 * num_features)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        if content.dim() != 4 or content.shape[1] != self.num_features or style.shape[:2].numel() != style.numel():
            raise ValueError(
                f"AdaIN takes (B, {self.num_features}, H, W) and a style (B, {self.style_dim}); they are {tuple(content.shape)} and "
                f"{tuple(style.shape)}"
            )
        gamma, beta = self.net(style.flatten(1))[..., None, None].chunk(2, 1)
        return torch.addcmul(beta, 1 + gamma, self.norm(content))


class Terms(list[GDWCTTerms]):
    """The terms of every block and pass of a step."""

    def whitening(self) -> Tensor:
        """R_w, averaged; 0 without any term."""
        return _average([each.whitening() for each in self])

    def coloring(self, target: ColoringTarget = "paper") -> Tensor:
        """R_c, averaged; 0 without any term."""
        return _average([each.coloring(target) for each in self])

    def penalty(self, whitening: float = 1e-3, coloring: float = 10.0, target: ColoringTarget = "paper") -> Tensor:
        """What is added to the loss: both regularisers with the paper's weights."""
        return whitening * self.whitening() + coloring * self.coloring(target)


def _average(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean() if terms else torch.zeros(())


class DropInGDWCT(GDWCT):
    """:class:`headway.norms.GDWCT` that gives back the features alone, as AdaIN does; :func:`record_terms` catches its terms."""

    _record: Terms | None = None

    def forward(self, content: Tensor, style: Tensor) -> Tensor:  # type: ignore[override]
        y, terms = super().forward(content, style)
        if self._record is not None:
            self._record.append(terms)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_record": None}  # a graph can be neither copied nor stored


@contextmanager
def record_terms(model: nn.Module) -> Iterator[Terms]:
    """Within it, every pass of every :class:`DropInGDWCT` of the model adds its terms to the list that it gives."""
    found = [module for module in model.modules() if isinstance(module, DropInGDWCT)]
    before, terms = [module._record for module in found], Terms()
    for module in found:
        module._record = terms
    try:
        yield terms
    finally:
        for module, outer in zip(found, before, strict=True):
            module._record = outer
        for outer in {id(outer): outer for outer in before if outer is not None}.values():
            outer.extend(terms)


@dataclass(frozen=True)
class ReplaceAdaIN(Technique):
    """Replaces every AdaIN module by a :class:`DropInGDWCT`.

    An AdaIN module is one that is called with two inputs and consists of one instance norm of C channels and linear layers that make
    2 C numbers (or twice C) from the style.

    Attributes:
        groups, mlp_dim, coloring_blocks, mean_blocks, alpha_init, stats, eps, sync: as :class:`headway.norms.GDWCT` has them.

    Raises:
        ValueError: groups that do not divide the channels and the style of a module.
    """

    groups: int = 8
    mlp_dim: int = 256
    coloring_blocks: int = 3
    mean_blocks: int = 1
    alpha_init: float = 0.6
    stats: Stats = "batch"
    eps: float = 1e-5
    sync: bool = False

    looks_for: ClassVar[str] = "AdaIN modules (an instance norm and linear layers, called with content and style)"

    def change(self, site: Site) -> nn.Module | None:
        sizes = _sizes(site.module)
        if sizes is None:
            return None
        try:
            return DropInGDWCT(*sizes, **self.settings())
        except ValueError as error:
            raise ValueError(f"{site.name or type(site.module).__name__}: {error}") from None

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Keeps every alpha between 0 and 1 after the optimiser's steps."""

        def project(*_: Any) -> None:
            project_alpha(model)

        optimizer.register_step_post_hook(project)
        return optimizer


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Channels and numbers of the style of an AdaIN module, None for another one."""
    parts = [part for part in module.modules() if part is not module]
    norms = [part for part in parts if isinstance(part, _InstanceNorm)]
    linears: list[Any] = [part for part in parts if hasattr(part, "in_features") and hasattr(part, "out_features")]
    known = {id(part) for part in (*norms, *linears)}
    others = any(id(part) not in known and next(part.parameters(recurse=False), None) is not None for part in parts)
    inputs = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    positional = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in inputs)
    if len(norms) != 1 or not linears or others or len(inputs) != 2 or not positional:
        return None
    channels, style = norms[0].num_features, linears[0].in_features
    pair = len(linears) == 2 and all((each.in_features, each.out_features) == (style, channels) for each in linears)
    return (channels, style) if pair or linears[-1].out_features == 2 * channels else None


def replace_adain(
    model: nn.Module, where: Where | None = None, optimizer: torch.optim.Optimizer | None = None, **settings: Any
) -> nn.Module:
    """:class:`ReplaceAdaIN` applied in place: ``replace_adain(model, groups=4)``.

    Raises:
        NothingToChange: no AdaIN module was found.
        ValueError: groups that do not fit.
    """
    return apply(model, ReplaceAdaIN(**settings), where=where, optimizer=optimizer)
