"""The residual networks of CIFAR with depth and width to choose: 2 + 2 * stages * blocks layers, three stages of doubling width.

Deep Residual Learning (2015, arXiv 1512.03385) with projected shortcuts: a 1x1 convolution and a batch norm of its own, as "Training
BatchNorm and Only BatchNorm" (2020, arXiv 2003.00152) has them. Parameter names are those of its released code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Gain = Literal["uniform", "ones", "signed"]


class ResBlock(nn.Module):
    """relu(x' + bn2(conv2(relu(bn1(conv1(x)))))); x' is x, or its projection where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        same = stride == 1 and before == after
        projection = () if same else (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class CIFARResNet(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes).

    Args:
        blocks: a stage; the network has 2 + 2 * stages * blocks layers (14, 32, 56, 110 ... for three stages).
        width: of the first stage.
        stages: each but the first halves the image and doubles the width.
        gain: how batch norms start: "uniform" (U(0, 1), the paper's), "ones" (torch's), "signed" (U(-1, 1)).

    Convolutions and the linear layer start with He's normal weights over their inputs.
    """

    def __init__(
        self,
        blocks: int = 2,
        width: int = 16,
        channels: int = 3,
        classes: int = 10,
        stages: int = 3,
        gain: Gain = "uniform",
    ) -> None:
        super().__init__()
        if min(blocks, width, channels, classes, stages) < 1 or gain not in ("uniform", "ones", "signed"):
            raise ValueError(
                "blocks, width, channels, classes and stages are at least 1 and gain is uniform, ones or signed; they are "
                f"{blocks}, {width}, {channels}, {classes}, {stages} and {gain!r}"
            )
        self.conv, self.bn, self.relu = (
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        parts, before = [], width
        for stage in range(stages):
            after = width << stage
            for block in range(blocks):
                parts.append(ResBlock(before, after, 2 if stage and not block else 1))
                before = after
        self.blocks = nn.Sequential(*parts)
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d) and gain != "ones":
                nn.init.uniform_(module.weight, -1.0 if gain == "signed" else 0.0, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.relu(self.bn(self.conv(images)))).mean((2, 3)))
