"""The two small image networks of the tasks: residual convolutions and a vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelsLast(nn.Module):
    """Applies a layer that works on the last axis to the channels of (B, C, H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class ConvBlock(nn.Module):
    """x + mix(norm(depthwise(x))): a depthwise 3x3 convolution, normalisation, and two linear layers over the channels.

    The shape of "A ConvNet for the 2020s" (2022, arXiv 2201.03545).
    """

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = ChannelsLast(nn.LayerNorm(width)) if norm == "layer" else nn.BatchNorm2d(width)
        self.mix = ChannelsLast(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(self.spatial(x)))


class ResidualNet(nn.Module):
    """Images (B, C, H, W) -> logits (B, classes). ``stride`` is that of the first convolution."""

    def __init__(self, channels: int, classes: int, depth: int, width: int, norm: str, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride=stride, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(width, norm) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean((2, 3))))


class VisionTransformer(nn.Module):
    """Images (B, C, H, W) -> logits (B, classes): square patches, a Pre-LN ``nn.TransformerEncoder``, the mean of the tokens.

    "An Image is Worth 16x16 Words" (2020, arXiv 2010.11929), without the class token.
    """

    def __init__(
        self, channels: int, size: int, patch: int, classes: int, depth: int, dim: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)
        # TransformerEncoder copies one layer, so that all layers begin alike; give each its own start.
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                nn.init.xavier_uniform_(module.in_proj_weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(x).mean(1))
