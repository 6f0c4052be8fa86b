"""Region normalisation in a model you already have: RN-B in its first part, where holes are known, RN-L in the later ones.

    model = hw.apply(model, hw.RegionNorm(early=("encoder",), late=("middle", "decoder")))
    with hw.norms.region_mask(model, mask):
        out = model(image)

Yu et al., 2020, arXiv 1911.10375; the layers: :mod:`headway.norms.region`. Gain and offset of a norm go on in both regions of RN-B.
RN-L has none a channel: a norm that has learned some loses them, and a warning says which. The network has to be trained (on).
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from headway.norms.region import AffineMode, EpsMode, RegionNormB2d, RegionNormL2d, Statistics
from headway.surgery import Edit, Site, Technique, apply

_SOURCES: tuple[type[nn.Module], ...] = (nn.InstanceNorm2d, nn.BatchNorm2d)


@dataclass(frozen=True)
class RegionNorm(Technique):
    """Replaces norms by RN-B in the early parts of a model and by RN-L in the late ones.

    Attributes:
        early, late: names of submodules ("encoder" is all of ``model.encoder``), or globs ("blocks.?.norm1").
        source: classes of norms to replace; instance norms, batch norms and synchronised ones have what it needs.
        threshold, kernel_size: of RN-L.
        stats, eps_mode, sync: of both.
        affine_mode, hole_value: of RN-B.
        eps: None keeps that of each norm.

    Raises:
        ValueError: a setting the layers refuse. NothingToChange: no norm lies in the named parts.
    """

    early: tuple[str, ...] = ("encoder",)
    late: tuple[str, ...] = ("middle", "decoder")
    source: tuple[type[nn.Module], ...] = _SOURCES
    threshold: float = 0.8
    kernel_size: int = 7
    stats: Statistics = "instance"
    eps: float | None = None
    eps_mode: EpsMode = "plain"
    affine_mode: AffineMode = "paper"
    hole_value: int = 1
    sync: bool = False

    def __post_init__(self) -> None:
        for field in ("early", "late"):
            names = getattr(self, field)
            if isinstance(names, str):
                object.__setattr__(self, field, (names,))

    @property
    def looks_for(self) -> str:  # type: ignore[override]
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in self.source)
        parts = ", ".join([*self.early, *self.late])
        return f"{kinds} in the submodules {parts} (early= and late= name others)"

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        found = super().edits(model, sites)
        lost = [site.name for site in sites if self._late(site) and _has_learned(site.module)]
        if lost:
            warnings.warn(f"RN-L has no gain and offset a channel: {', '.join(lost)} lose theirs", stacklevel=4)
        return found

    def change(self, site: Site) -> nn.Module | None:
        if not self._early(site) and not self._late(site):
            return None
        shared = {"stats": self.stats, "eps_mode": self.eps_mode, "sync": self.sync}
        if self.eps is not None:
            shared["eps"] = self.eps
        if self._early(site):
            return RegionNormB2d.from_module(
                site.module, site=site, affine_mode=self.affine_mode, hole_value=self.hole_value, **shared
            )
        return RegionNormL2d.from_module(
            site.module, site=site, threshold=self.threshold, kernel_size=self.kernel_size, **shared
        )

    def _early(self, site: Site) -> bool:
        return type(site.module) in self.source and _within(site.name, self.early)

    def _late(self, site: Site) -> bool:
        return type(site.module) in self.source and _within(site.name, self.late) and not self._early(site)


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") or fnmatch.fnmatchcase(name, part) for part in parts)


@torch.no_grad()
def _has_learned(norm: nn.Module) -> bool:
    """Whether a norm's gain or offset is another than that of its start."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return bool((weight is not None and (weight != 1).any()) or (bias is not None and (bias != 0).any()))


def convert_region_norm(
    model: nn.Module,
    early: tuple[str, ...] = ("encoder",),
    late: tuple[str, ...] = ("middle", "decoder"),
    source: tuple[type[nn.Module], ...] = _SOURCES,
) -> nn.Module:
    """:class:`RegionNorm` applied to ``model``, in place; returns it."""
    return apply(model, RegionNorm(tuple(early), tuple(late), tuple(source)))
