"""Two small denoising networks with long skips: a vision transformer (U-ViT) and a convolutional UNet.

Both take noisy images (B, C, H, W) and times (B,), and give the predicted noise (B, C, H, W).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_features(t: Tensor, dim: int) -> Tensor:
    """Cosines and sines of the times at ``dim // 2`` frequencies from 1 down to 1/10,000, in float32: (B,) -> (B, dim)."""
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    )
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, dim % 2))


class Attention(nn.Module):
    """Multi-head self-attention of (B, T, D), queries, keys and values without bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A Pre-LN transformer block; one with ``skip`` first maps [x, skip] to its width."""

    def __init__(self, dim: int, heads: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """A transformer over patches and one token for the time, with a long skip from block i to block i from the end.

    "All are Worth Words: A ViT Backbone for Diffusion Models", 2022, arXiv 2209.12152, without labels; its names of weights.

    Args:
        size, channels, patch: of the square images.
        dim, heads: of the transformer.
        skips: N, the number of long skips; the network has 2 N + 1 blocks.
        conv: end in a 3x3 convolution of the image. With one channel that is nine numbers through which all must pass: leave it out.
    """

    def __init__(
        self, size: int, channels: int, patch: int, dim: int, heads: int, skips: int, conv: bool = True
    ) -> None:
        super().__init__()
        if skips < 1 or size % patch or dim % heads:
            raise ValueError(
                f"skips is at least 1, patch divides size and heads divides dim; skips={skips}, patch={patch}, size={size}, "
                f"heads={heads}, dim={dim} were given"
            )
        self.dim, self.patch, self.side = dim, patch, size // patch
        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        self.in_blocks = nn.ModuleList(Block(dim, heads) for _ in range(skips))
        self.mid_block = Block(dim, heads)
        self.out_blocks = nn.ModuleList(Block(dim, heads, skip=True) for _ in range(skips))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        time = time_features(t, self.dim)[:, None].to(x.dtype)
        x = torch.cat([time, x], dim=1) + self.pos_embed
        kept = []
        for block in self.in_blocks:
            x = block(x)
            kept.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, kept.pop())
        x = self.decoder_pred(self.norm(x))[:, 1:]
        # patches are written row by row, a pixel's channels together
        x = x.unflatten(1, (self.side, self.side)).unflatten(3, (self.patch, self.patch, -1))
        return self.final_layer(x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))


class ConvBlock(nn.Module):
    """Two normalised 3x3 convolutions with the time added between, and the input (projected where widths differ) added at the end."""

    def __init__(self, inside: int, width: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(1, inside), nn.Conv2d(inside, width, 3, padding=1)
        self.time = nn.Linear(time, width)
        self.norm2, self.conv2 = nn.GroupNorm(1, width), nn.Conv2d(width, width, 3, padding=1)
        self.project = nn.Conv2d(inside, width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.project(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """A convolutional UNet: every block of the way down is concatenated to one of the way up, ``blocks`` a resolution.

    Args:
        channels: of the images, whose sides are divisible by 2 ** (len(widths) - 1).
        widths: channels at each resolution; blocks: of each.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (24, 32, 48), blocks: int = 2) -> None:
        super().__init__()
        time = 4 * widths[0]
        self.time_features = widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = blocks
        sizes = [width for width in widths for _ in range(blocks)]
        self.down = nn.ModuleList(ConvBlock(a, b, time) for a, b in zip([widths[0], *sizes], sizes, strict=False))
        self.middle = ConvBlock(sizes[-1], sizes[-1], time)
        before = [sizes[-1], *reversed(sizes)]
        self.up = nn.ModuleList(ConvBlock(a + b, b, time) for a, b in zip(before, reversed(sizes), strict=False))
        self.norm, self.head = nn.GroupNorm(1, widths[0]), nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(time_features(t, self.time_features).to(x.dtype))
        x, kept = self.stem(x), []
        for k, block in enumerate(self.down):
            if k and k % self.blocks == 0:
                x = F.avg_pool2d(x, 2)
            x = block(x, time)
            kept.append(x)
        x = self.middle(x, time)
        for k, block in enumerate(self.up):
            if k and k % self.blocks == 0:
                x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], dim=1), time)
        return self.head(F.silu(self.norm(x)))
