"""The networks of exemplar-guided translation: encoders of content and style, the decoder with many style blocks, the discriminator.

From "Image-to-Image Translation via Group-wise Deep Whitening-and-Coloring Transformation" (Cho et al., 2019, arXiv 1812.09912), after
its released code: reflected borders, instance norms with running statistics in the content encoder, group norms in the style encoder,
layer norms in the decoder. Losses and training: :mod:`headway.vision.translation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from headway.norms.adain import AdaIN, Terms, record_terms
from headway.norms.whitening import GDWCT

StyleLayer = Literal["gdwct", "adain"]


class ConvBlock(nn.Module):
    """A convolution with reflected borders, a norm ("instance", "group", "layer" or none) and an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 1,
        norm: str = "",
        activation: nn.Module | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, padding_mode="reflect")
        self.norm: nn.Module = nn.Identity()
        if norm == "instance":
            self.norm = nn.InstanceNorm2d(outputs, affine=True, track_running_stats=True)
        elif norm:
            self.norm = nn.GroupNorm(1 if norm == "layer" else groups, outputs)
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """x plus two 3x3 convolutions, of which the second has no activation."""

    def __init__(self, channels: int, norm: str = "") -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels, 3, norm=norm, activation=nn.ReLU())
        self.second = ConvBlock(channels, channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class ContentEncoder(nn.Module):
    """(B, image_channels, H, W) to (B, base_dim 2^downs, H / 2^downs, W / 2^downs), with instance norms that keep running statistics."""

    def __init__(self, image_channels: int = 3, base_dim: int = 64, downs: int = 2, blocks: int = 4) -> None:
        super().__init__()
        dim, layers = base_dim, [_conv(image_channels, base_dim, 7, 1, 3, "instance")]
        for _ in range(downs):
            layers.append(_conv(dim, 2 * dim, 4, 2, 1, "instance"))
            dim *= 2
        self.layers = nn.Sequential(*layers, *(ResidualBlock(dim, "instance") for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class StyleEncoder(nn.Module):
    """(B, image_channels, H, W) to the style code (B, base_dim 2^downs), by strided convolutions with group norms and an average."""

    def __init__(self, image_channels: int = 3, base_dim: int = 64, downs: int = 2, groups: int = 8) -> None:
        super().__init__()
        dim, layers = base_dim, [_conv(image_channels, base_dim, 7, 1, 3)]
        for factor in (*[2] * downs, 1, 1):
            layers.append(_conv(dim, factor * dim, 4, 2, 1, "group", groups))
            dim *= factor
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int, padding: int, norm: str = "", groups: int = 1
) -> nn.Module:
    return ConvBlock(inputs, outputs, kernel, stride, padding, norm, nn.ReLU(), groups)


class MultiHopDecoder(nn.Module):
    """Content features and a style code to an image: ``blocks`` residual blocks, a style block before the first and after each.

    Args:
        blocks: N; there are N + 1 style blocks.
        channels: of the content features. style_dim: of the style code; as many if None.
        ups: doublings of height and width.
        layer: "gdwct", or the baseline "adain", which :class:`headway.norms.ReplaceAdaIN` can replace.
        **settings: of :class:`headway.norms.GDWCT`.

    Shapes:
        content (B, channels, H, W), style (B, style_dim); image (B, image_channels, H 2^ups, W 2^ups) between -1 and 1, and the terms
        of all style blocks.
    """

    def __init__(
        self,
        blocks: int = 4,
        channels: int = 256,
        style_dim: int | None = None,
        image_channels: int = 3,
        ups: int = 2,
        layer: StyleLayer = "gdwct",
        **settings: Any,
    ) -> None:
        super().__init__()
        if layer not in ("gdwct", "adain") or blocks < 0 or ups < 0 or channels % 2**ups:
            raise ValueError(
                f'layer is "gdwct" or "adain", blocks and ups at least 0, and 2^ups divides channels; they are {layer!r}, {blocks}, '
                f"{ups} and {channels}"
            )
        style_dim = channels if style_dim is None else style_dim
        kind = GDWCT if layer == "gdwct" else AdaIN
        self.styles = nn.ModuleList(kind(channels, style_dim, **settings) for _ in range(blocks + 1))
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        layers: list[nn.Module] = []
        for _ in range(ups):
            layers += [nn.Upsample(scale_factor=2), _conv(channels, channels // 2, 5, 1, 2, "layer")]
            channels //= 2
        self.layers = nn.Sequential(*layers, ConvBlock(channels, image_channels, 7, 1, 3, activation=nn.Tanh()))

    def forward(self, content: Tensor, style: Tensor) -> tuple[Tensor, Terms]:
        x = content
        with record_terms(self) as terms:  # of blocks that took the place of AdaIN and give back the features alone
            for i, layer in enumerate(self.styles):
                x = x if i == 0 else self.blocks[i - 1](x)
                x = layer(x, style)
                if isinstance(x, tuple):
                    x, found = x
                    terms.append(found)
            return self.layers(x), terms


class Generator(nn.Module):
    """Everything of one domain that makes images: its content encoder, its style encoder and its decoder."""

    def __init__(self, content: nn.Module, style: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.content, self.style, self.decoder = content, style, decoder
        for module in self.modules():
            _start(module, lambda weight: nn.init.kaiming_normal_(weight))

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """Loads the parameters and statistics of a generator that was saved by the authors' code (``G_A_*.pth`` or ``G_B_*.pth``).

        Raises:
            RuntimeError: names or shapes that this network does not have.
        """
        self.load_state_dict({_renamed(name): value for name, value in state.items()})


def _renamed(name: str) -> str:
    part, _, rest = name.partition(".")
    words = rest.split(".")
    if part == "decoder" and words[0] == "gdwct_modules":
        net = {"mlp_CT": "coloring_net", "mlp_mu": "mean_net"}.get(words[2], words[2])
        # the authors count a linear layer with its activation as one
        inner = [str(2 * int(words[4])), words[-1]] if net != words[2] else []
        return ".".join(["decoder.styles", words[1], net, *inner])
    home = {"c_encoder": "content.layers", "s_encoder": "style.layers"}.get(part, "decoder.layers")
    home = "decoder.blocks" if words[0] == "resblocks" else home
    inner = [{"0": "first", "1": "second"}[words[3]], *words[4:]] if words[2] == "main" else words[2:]
    return ".".join([home, words[1], *inner])


def _start(module: nn.Module, draw: Any) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        draw(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Discriminator(nn.Module):
    """Judges an image patch by patch at several scales: a list of maps, whose wanted value is 1 for real images and 0 for others."""

    def __init__(self, image_channels: int = 3, base_dim: int = 64, layers: int = 4, scales: int = 3) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for _ in range(scales):
            dim, net = base_dim, [_judge(image_channels, base_dim)]
            for _ in range(layers - 1):
                net.append(_judge(dim, 2 * dim))
                dim *= 2
            self.scales.append(nn.Sequential(*net, nn.Conv2d(dim, 1, 1)))
        for module in self.modules():
            _start(module, lambda weight: nn.init.normal_(weight, 0, 0.02))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, net in enumerate(self.scales):
            if i:
                x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
            maps.append(net(x))
        return maps


def _judge(inputs: int, outputs: int) -> nn.Module:
    return ConvBlock(inputs, outputs, 4, 2, 1, activation=nn.LeakyReLU(0.01))
