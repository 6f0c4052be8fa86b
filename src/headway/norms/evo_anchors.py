"""Three small convolutional nets with a place for a layer after every convolution: what searched layers are judged on.

Each takes ``layer``, which makes the norm-and-activation of so many channels, and gives a net (B, in_channels, H, W) -> (B, classes).
They stand for the paper's three (ResNet-50, MobileNetV2, EfficientNet-B0; arXiv 2004.02967, section 4): a layer that works in one
net alone is what judging on several is there to reject. ``wide_anchor`` takes no part in a search by default.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Layer = Callable[[int], nn.Module]
Anchor = Callable[[Layer], nn.Module]


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _conv(inner: int, outer: int, size: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, size, padding=size // 2, groups=groups, bias=False)


def plain_anchor(layer: Layer, width: int = 16, depth: int = 7, in_channels: int = 1, classes: int = 10) -> nn.Module:
    """``depth`` times 3x3 convolution and layer, max pooling after the third."""
    parts: list[nn.Module] = []
    for i in range(depth):
        parts += [_conv(width if i else in_channels, width), layer(width)]
        if i == 2:
            parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, *_head(width, classes))


class PreActivationBlock(nn.Module):
    """x + conv(layer(conv(layer(x))))."""

    def __init__(self, layer: Layer, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(layer(width), _conv(width, width), layer(width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class InvertedBlock(nn.Module):
    """x + 1x1(layer(depthwise 3x3(layer(1x1(x))))), twice as wide inside."""

    def __init__(self, layer: Layer, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(width, 2 * width, 1),
            layer(2 * width),
            _conv(2 * width, 2 * width, groups=2 * width),
            layer(2 * width),
            _conv(2 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def residual_anchor(
    layer: Layer, width: int = 16, blocks: int = 3, in_channels: int = 1, classes: int = 10
) -> nn.Module:
    """A pre-activation residual net of 2 * ``blocks`` + 1 convolutions."""
    inner = [PreActivationBlock(layer, width) for _ in range(blocks)]
    body = [_conv(in_channels, width), inner[0], nn.MaxPool2d(2), *inner[1:], layer(width)]
    return nn.Sequential(*body, *_head(width, classes))


def depthwise_anchor(
    layer: Layer, width: int = 16, blocks: int = 2, in_channels: int = 1, classes: int = 10
) -> nn.Module:
    """Inverted residual blocks with depthwise convolutions, 3 * ``blocks`` + 1 of them."""
    inner = [InvertedBlock(layer, width) for _ in range(blocks)]
    body = [_conv(in_channels, width), layer(width), inner[0], nn.MaxPool2d(2), *inner[1:]]
    return nn.Sequential(*body, *_head(width, classes))


def wide_anchor(layer: Layer, in_channels: int = 1, classes: int = 10) -> nn.Module:
    """A plain net of another shape, four convolutions of width 32: for layers that were found on the others."""
    return plain_anchor(layer, 32, 4, in_channels, classes)


ANCHORS: dict[str, Anchor] = {
    "plain": plain_anchor,
    "residual": residual_anchor,
    "depthwise": depthwise_anchor,
}
