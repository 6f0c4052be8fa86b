"""How many features training has switched off: gains near zero, layer by layer, and the network without them.

    disabled: |gamma_c| < threshold;  a ReLU behind it then gives the constant max(beta_c, 0)

"Training BatchNorm and Only BatchNorm" (2020, arXiv 2003.00152) finds about a third of them in deep networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from headway.learning.batchnorm_only.choose import affine_normalisers, reads_offset


@dataclass(frozen=True)
class GammaReport:
    """Gains below a threshold.

    Attributes:
        share: of all gains.
        threshold: on |gamma|.
        layers: that share, normaliser by normaliser.
        counts: how many gains each has.
    """

    share: float
    threshold: float
    layers: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(len(name) for name in self.layers)
        lines = [f"{name:<{width}}  {share:6.1%} of {self.counts[name]}" for name, share in self.layers.items()]
        return "\n".join([*lines, f"{self.share:.1%} of all gains are below {self.threshold:g}"])


def _gains(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    found = False
    for norm in affine_normalisers(model):
        if norm.gain is not None:
            gain = norm.module._parameters[norm.gain]
            assert gain is not None
            found = True
            yield norm.name, gain.detach() + 1 if reads_offset(norm.module) else gain.detach()
    if not found:
        raise ValueError("the model has no normaliser with a gain, so no feature can be switched off by one")


def _check(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"threshold is a size of gains, 0 or above; it is {threshold}")


def gamma_report(model: nn.Module, threshold: float = 1e-2) -> GammaReport:
    """The share of gains with |gamma| below ``threshold``, in all and normaliser by normaliser.

    Raises:
        ValueError: no normaliser with a gain, or a negative threshold.
    """
    _check(threshold)
    off = {name: gain.abs() < threshold for name, gain in _gains(model)}
    total = sum(mask.numel() for mask in off.values())
    return GammaReport(
        float(sum(int(mask.sum()) for mask in off.values())) / max(1, total),
        threshold,
        {name: float(mask.double().mean()) for name, mask in off.items()},
        {name: mask.numel() for name, mask in off.items()},
    )


@contextmanager
def without_disabled(model: nn.Module, threshold: float = 1e-2) -> Iterator[nn.Module]:
    """Within it, gains with |gamma| below ``threshold`` are exactly zero: what the network owes to them shows in its accuracy.

    Raises:
        ValueError: as :func:`gamma_report`; also for a norm that reads its weight as ``1 + weight``.
    """
    _check(threshold)
    if offset := [norm.name for norm in affine_normalisers(model) if norm.gain and reads_offset(norm.module)]:
        raise ValueError(f"{offset[0]} reads its weight as 1 + weight; gains of such norms are not switched off here")
    kept = [(gain, gain.clone()) for _, gain in _gains(model)]
    try:
        with torch.no_grad():
            for gain, _ in kept:
                gain[gain.abs() < threshold] = 0
        yield model
    finally:
        with torch.no_grad():
            for gain, value in kept:
                gain.copy_(value)
