"""The network inside a block: an encoder of the input, a path for the noised label, one for time, and what joins them.

    f = norm(linear(encoder(x)));  h = relu(norm(linear(z)));  h = h + norm(linear(relu(norm(linear(h)))))
    logits = linear(relu(norm(linear(relu(norm(linear([f, h, time])))))))

Figure 6 of arXiv 2503.24322 (2025); the channel widths of its convolutions are not given there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway._features import features_of
from headway.learning.no_prop.discrete import NoPropDT

Norm = Literal["batch", "layer", "none"]


def normalizer(norm: Norm, width: int) -> nn.Module:
    if norm not in ("batch", "layer", "none"):
        raise ValueError(f'norm is "batch", "layer" or "none", not {norm!r}')
    return {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[norm](width)


class ConditionalBlock(nn.Module):
    """A block of NoProp: what label, given a noised one and the input?

    Args:
        encoder: x -> features (B, feat_dim), (B, tokens, feat_dim), (B, c, h, w), or a Hugging Face output that holds them.
        feat_dim: how many features. embed_dim: width of a label's vector z. num_classes: of the logits; ``embed_dim`` unless given.
        hidden: width of the paths (the last layer but one has half of it).
        norm: "batch", "layer" (batches of one, small batches), or "none" (continuous time).
        timed: take a time too, for NoPropCT and NoPropFM: 64 sines and cosines, a linear layer, a ReLU.
        z_encoder: applied to z first, where z is an image (``embed="prototype"``): (B, embed_dim) -> (B, z_dim).
        z_dim: what ``z_encoder`` gives.

    Shapes:
        z: (B, embed_dim), x: what the encoder takes, t: (B,) if timed -> (B, num_classes).
    """

    def __init__(
        self,
        encoder: nn.Module,
        feat_dim: int,
        embed_dim: int,
        hidden: int = 256,
        norm: Norm = "batch",
        num_classes: int | None = None,
        timed: bool = False,
        z_encoder: nn.Module | None = None,
        z_dim: int | None = None,
    ) -> None:
        super().__init__()
        if min(feat_dim, embed_dim, hidden) < 1:
            raise ValueError(
                f"feat_dim, embed_dim and hidden are at least 1; they are {feat_dim}, {embed_dim}, {hidden}"
            )
        if z_encoder is not None and z_dim is None:
            raise ValueError("z_encoder needs z_dim, the number of features it gives")
        self.encoder, self.z_encoder = encoder, z_encoder
        self.features = nn.Sequential(nn.Linear(feat_dim, hidden), normalizer(norm, hidden))
        self.label = nn.Sequential(nn.Linear(z_dim or embed_dim, hidden), normalizer(norm, hidden), nn.ReLU())
        self.deepen = nn.Sequential(
            nn.Linear(hidden, hidden), normalizer(norm, hidden), nn.ReLU(), nn.Linear(hidden, hidden), normalizer(norm, hidden)
        )  # fmt: skip
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.ReLU()) if timed else None
        half = max(1, hidden // 2)
        self.join = nn.Sequential(
            nn.Linear((3 if timed else 2) * hidden, hidden), normalizer(norm, hidden), nn.ReLU(),
            nn.Linear(hidden, half), normalizer(norm, half), nn.ReLU(), nn.Linear(half, num_classes or embed_dim),
        )  # fmt: skip

    def forward(self, z: Tensor, x: Any, t: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x), z, t)

    def encode(self, x: Any) -> Tensor:
        """What the input says, (B, hidden): the same for every z and t."""
        return self.features(features_of(self.encoder(x)))

    def decode(self, features: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits of z (B, embed_dim) on encoded inputs."""
        z = z if self.z_encoder is None else self.z_encoder(z)
        h = self.label(z.to(self.label[0].weight.dtype))  # type: ignore[arg-type]
        parts = [features, h + self.deepen(h)]
        if (t is None) != (self.time is None):
            raise ValueError("a block with timed=True takes (z, x, t), one without takes (z, x)")
        if self.time is not None and t is not None:
            parts.append(self.time(waves(t).to(features.dtype)))
        return self.join(torch.cat(parts, 1))


def waves(t: Tensor, width: int = 64) -> Tensor:
    """Sines and cosines (B, width) of times (B,) in [0, 1] at frequencies from 1 to 1000."""
    rates = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=t.device, dtype=t.dtype))
    return torch.cat([torch.sin(t[:, None] * rates), torch.cos(t[:, None] * rates)], 1)


def dense_encoder(
    features: int, hidden: int = 256, norm: Norm = "batch", dropout: float = 0.2
) -> tuple[nn.Module, int]:
    """An encoder of tables (B, features), and how many features it gives: ``ConditionalBlock(*dense_encoder(64), embed_dim=10)``."""
    layers = [nn.Flatten(), nn.Linear(features, hidden), normalizer(norm, hidden), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers), hidden


def conv_encoder(
    channels: int, size: int | tuple[int, int], widths: Sequence[int] = (32, 64, 128), dropout: float = 0.2
) -> tuple[nn.Module, int]:
    """An encoder of images (B, channels, *size), 4 pixels or more a side, and how many features it gives."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 4 or len(widths) != 3:
        raise ValueError(
            f"images of 4x4 pixels or more and three widths were expected, not {height}x{width} and {widths}"
        )
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip((channels, *widths[:2]), widths, strict=True)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if i == 1 else [nn.MaxPool2d(2), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Flatten()), widths[2] * (height // 4) * (width // 4)


class BorrowedEncoder(nn.Module):
    """Another block's encoder, used and never trained: its parameters belong to the other block alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.held = (encoder,)  # in a tuple it is no child, so its parameters are not ours

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        encoder = self.held[0]
        modes = [(module, module.training) for module in encoder.modules()]
        encoder.eval()
        try:
            return features_of(encoder(x))
        finally:
            for module, training in modes:
                module.training = training


def noprop_from(
    encoder: nn.Module,
    num_classes: int,
    T: int = 10,
    share_encoder: bool = False,
    feat_dim: int | None = None,
    example: Any = None,
    hidden: int = 256,
    norm: Norm = "batch",
    **settings: Any,
) -> NoPropDT:
    """NoProp-DT around an encoder you have (torch, timm or a Hugging Face vision model), copied into each of the T blocks.

    Args:
        encoder: x -> features; see :class:`ConditionalBlock`. Its weights are where every block begins; it is not changed itself.
        share_encoder: one copy for all blocks, trained by block 1 and frozen for the others. A cheap variant that is not in the
            paper; the blocks are then no longer independent.
        feat_dim: how many features it gives; read from ``config.hidden_size`` or ``num_features`` or by running ``example`` (an
            input x) otherwise.
        hidden, norm: of the blocks. **settings: of :class:`NoPropDT`.

    Raises:
        ValueError: the number of features is not known.
    """
    wide = feat_dim or _feat_dim(encoder, example)
    embed_dim = settings.get("dim") or num_classes
    first: list[nn.Module] = []

    def block(t: int) -> nn.Module:
        if share_encoder and first:
            own: nn.Module = BorrowedEncoder(first[0])
        else:
            own = copy.deepcopy(encoder)
            first.append(own)
        return ConditionalBlock(own, wide, embed_dim, hidden, norm, num_classes)

    return NoPropDT(block, num_classes, T, **settings)


def _feat_dim(encoder: nn.Module, example: Any) -> int:
    if example is not None:
        with torch.no_grad():
            return features_of(copy.deepcopy(encoder).eval()(example)).shape[1]
    config: Any = getattr(encoder, "config", None)
    sizes = [getattr(config, "hidden_size", None), *list(getattr(config, "hidden_sizes", None) or [])[-1:]]
    known = [size for size in [*sizes, getattr(encoder, "num_features", None)] if isinstance(size, int)]
    if not known:
        raise ValueError(
            f"how many features {type(encoder).__name__} gives is not known; pass feat_dim=, or example= with an input to try"
        )
    return known[0]
