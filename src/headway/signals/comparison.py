"""Which normaliser keeps this network's signal alive? The probe over a set of normalisers and seeds, as one table.

    table = hw.compare_normalizers(plain_net(depth=12), (x, y), ("none", "batch", "layer", "group:4", "instance"))
    print(table)

Larger groups make samples alike (slow training); smaller ones make early gradients large (unstable training): the trade-off of
"Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning", 2021, arXiv 2106.05956.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.norms.evo import EvoNormB0, EvoNormS0
from headway.signals import normalizers as N
from headway.signals.flow import Flow, aligned
from headway.signals.probe import probe

NORMALIZERS = (
    "none",
    "batch",
    "layer",
    "instance",
    "group:N",
    "filter-response",
    "variance",
    "evo-b0",
    "evo-s0",
    "weight",
    "scaled-weight-std",
)
DEFAULT = ("none", "batch", "layer", "group:16", "group:4", "instance")


@dataclass(frozen=True)
class Normalizer:
    """How one normaliser of the study builds a layer: ``conv``, then ``norm``, then ``activation``.

    ``name`` is one of ``NORMALIZERS``; ``group:N`` normalises groups of N channels (torch's GroupNorm counts groups instead).
    Raises ValueError for any other name.
    """

    name: str

    def __post_init__(self) -> None:
        kind, _, size = self.name.partition(":")
        known = {name.partition(":")[0] for name in NORMALIZERS}
        if kind not in known or (kind == "group") != bool(size) or (size and not (size.isdigit() and int(size) > 0)):
            raise ValueError(
                f"normalizer {self.name!r} is unknown; choose from {', '.join(NORMALIZERS)} (N channels a group)"
            )

    def conv(self, in_channels: int, out_channels: int, kernel_size: int = 3, **settings: Any) -> nn.Conv2d:
        """A convolution with He-normal weights, reparametrised where the normaliser acts on weights."""
        kinds = {"weight": N.WeightNormConv2d, "scaled-weight-std": N.ScaledStdConv2d}
        settings = {"padding": kernel_size // 2, "bias": self.name in kinds, **settings}
        layer = kinds.get(self.name, nn.Conv2d)(in_channels, out_channels, kernel_size, **settings)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        return layer

    def norm(self, channels: int) -> nn.Module:
        """The layer between convolution and activation; Identity where there is none.

        Raises:
            ValueError: the channels do not divide into the groups asked for.
        """
        kind, _, size = self.name.partition(":")
        if kind == "batch":
            return nn.BatchNorm2d(channels)
        if kind == "layer":
            return nn.GroupNorm(1, channels)
        if kind == "instance":
            return nn.GroupNorm(channels, channels)
        if kind == "group":
            if channels % int(size):
                raise ValueError(
                    f"{self.name}: {channels} channels do not divide into groups of {size}; choose a divisor"
                )
            return nn.GroupNorm(channels // int(size), channels)
        if kind == "filter-response":
            return N.FilterResponseNorm(channels)
        return N.VarianceNorm(channels) if kind == "variance" else nn.Identity()

    def activation(self, channels: int) -> nn.Module:
        """The activation that belongs to the normaliser."""
        kinds = {
            "filter-response": lambda: N.ThresholdedLinearUnit(channels),
            "evo-b0": lambda: EvoNormB0(channels),
            "evo-s0": lambda: EvoNormS0(channels, groups=8),
            "weight": N.BiasCorrectedReLU,
        }
        return kinds.get(self.name, lambda: nn.ReLU(inplace=True))()


def plain_net(
    depth: int = 12, width: int = 32, in_channels: int = 1, classes: int = 10
) -> Callable[[Normalizer], nn.Module]:
    """A builder of plain nets: ``depth`` times convolution, normaliser, activation; then mean over space and a linear layer."""

    def build(normalizer: Normalizer) -> nn.Module:
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [
                normalizer.conv(width if index else in_channels, width),
                normalizer.norm(width),
                normalizer.activation(width),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    return build


class ResidualBlock(nn.Module):
    """``x + norm(conv(act(norm(conv(x)))))``; (B, width, H, W) -> (B, width, H, W)."""

    def __init__(self, normalizer: Normalizer, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            normalizer.conv(width, width),
            normalizer.norm(width),
            normalizer.activation(width),
            normalizer.conv(width, width),
            normalizer.norm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def residual_net(
    blocks: int = 27, width: int = 32, in_channels: int = 1, classes: int = 10
) -> Callable[[Normalizer], nn.Module]:
    """A builder of residual nets: a convolution, ``blocks`` residual blocks, mean over space and a linear layer."""

    def build(normalizer: Normalizer) -> nn.Module:
        stem = nn.Sequential(normalizer.conv(in_channels, width), normalizer.norm(width), normalizer.activation(width))
        stack = nn.Sequential(*[ResidualBlock(normalizer, width) for _ in range(blocks)])
        return nn.Sequential(stem, stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    return build


@dataclass(frozen=True)
class NormalizerRow:
    """One normaliser, means over the seeds.

    Attributes:
        normalizer: its name.
        cos, cos_spread: mean cosine between samples at the last layer, and its standard deviation over the seeds.
        stable_rank: of the samples at the last layer.
        gradient_ratio: gradient norm of the first layer / of the last.
        explosion: variance of the last layer / of the first.
        variance: of the last layer.
        seeds: how many initialisations.
    """

    normalizer: str
    cos: float
    cos_spread: float
    stable_rank: float
    gradient_ratio: float
    explosion: float
    variance: float
    seeds: int


@dataclass(frozen=True)
class NormalizerTable:
    """The rows, and the flow of every (normaliser, seed)."""

    rows: tuple[NormalizerRow, ...]
    flows: dict[tuple[str, int], Flow]

    def __getitem__(self, normalizer: str) -> NormalizerRow:
        return next(row for row in self.rows if row.normalizer == normalizer)

    def __str__(self) -> str:
        head = ["normalizer", "cos last", "+-", "stable rank", "grad first/last", "var last/first", "var last"]
        body = [
            [r.normalizer, f"{r.cos:.3f}", f"{r.cos_spread:.3f}", f"{r.stable_rank:.2f}"]
            + [f"{value:.3g}" for value in (r.gradient_ratio, r.explosion, r.variance)]
            for r in self.rows
        ]
        return aligned([head, *body])

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON."""
        return {"rows": [asdict(row) for row in self.rows]}


def compare_normalizers(
    build_fn: Callable[[Normalizer], nn.Module],
    batch: Any,
    normalizers: Sequence[str] = DEFAULT,
    seeds: int = 3,
    loss: Callable[..., Tensor] = F.cross_entropy,
    **settings: Any,
) -> NormalizerTable:
    """Probes the same network at initialisation under several normalisers.

    Args:
        build_fn: makes a model from a :class:`Normalizer` (``plain_net(...)``, ``residual_net(...)``, or your own).
        batch: (inputs, targets).
        normalizers: names of ``NORMALIZERS``.
        seeds: how many initialisations.
        loss: ``loss(output, targets)``.
        **settings: passed on to ``probe``.

    Returns:
        A table with one row a normaliser; ``print`` shows it, ``flows`` holds every probe.

    Raises:
        ValueError: an unknown normaliser, no normaliser, or fewer than one seed.
    """
    if not normalizers or seeds < 1:
        raise ValueError(f"at least one normalizer and one seed are needed, not {len(normalizers)} and {seeds}")
    chosen = [Normalizer(name) for name in normalizers]
    flows: dict[tuple[str, int], Flow] = {}
    rows = []
    for normalizer in chosen:
        for seed in range(seeds):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = build_fn(normalizer)
                flows[normalizer.name, seed] = probe(model, batch, loss=loss, mode="train", **settings)
        mine = [flows[normalizer.name, seed] for seed in range(seeds)]
        ends = [(flow.of("stream") or flow.of("post"))[-1] for flow in mine]
        cos = [row.cos for row in ends]
        rows.append(
            NormalizerRow(
                normalizer.name,
                statistics.fmean(cos),
                statistics.stdev(cos) if seeds > 1 else 0.0,
                statistics.fmean(row.stable_rank for row in ends),
                statistics.fmean(flow.growth.gradient_ratio for flow in mine),
                statistics.fmean(flow.growth.explosion for flow in mine),
                statistics.fmean(row.var for row in ends),
                seeds,
            )
        )
    return NormalizerTable(tuple(rows), flows)
