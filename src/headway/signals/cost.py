"""What the probe costs: time and peak memory of a probed pass over those of a plain forward and backward pass.

Memory is measured in fresh processes (``python -m headway.signals.cost plain|probed WIDTH BATCH KIND``), because an allocator
that already holds freed memory shows no new peak.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.measure import Paired, PeakMemory, paired
from headway.residual.transformer import TransformerDecoder
from headway.signals.probe import probe
from headway.signals.watch import watch


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def residual_net_20(width: int = 16) -> nn.Module:
    """A residual net of 20 layers for 32 x 32 images: three stages of three blocks, width doubling at each stage."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    before = width
    for stage in range(3):
        after = width << stage
        blocks = [_Block(before if i == 0 else after, after, 2 if stage and i == 0 else 1) for i in range(3)]
        layers.append(nn.Sequential(*blocks))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def passes(width: int, batch: int, kind: str = "conv") -> tuple[Callable[[], object], Callable[[], object]]:
    """(a probed pass, a plain pass) over the same network and batch, gradients cleared after each.

    ``kind`` is "conv" (:func:`residual_net_20`) or "transformer" (a decoder of 6 layers on 64 tokens a sample).
    """
    torch.manual_seed(0)
    if kind == "transformer":
        model: nn.Module = TransformerDecoder(256, width, 6, 4)
        x = y = torch.randint(0, 256, (batch, 64))
    else:
        model, x, y = residual_net_20(width), torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def plain() -> None:
        loss(model(x), y).backward()
        model.zero_grad(set_to_none=True)

    return lambda: probe(model, x, loss=loss, targets=y), plain


def time_ratio(width: int, batch: int, seconds: float = 4.0, kind: str = "conv") -> Paired:
    """``ratio`` of the result is plain / probed; its inverse is how many times longer a probed pass takes."""
    probed, plain = passes(width, batch, kind)
    return paired(probed, plain, seconds, min_rounds=3)


def memory(which: str, width: int, batch: int, kind: str = "conv", processes: int = 1) -> int:
    """Bytes by which passes ("plain" or "probed") raise resident memory, in processes of their own; the median over these."""
    command = [sys.executable, "-m", "headway.signals.cost", which, str(width), str(batch), kind]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(processes)]
    return int(statistics.median(int(text.split()[-1]) for text in found))


def watch_ratio(every: int = 50, rounds: int = 5, batch: int = 64, width: int = 64) -> Paired:
    """Stretches of ``every`` training steps of a small net with ``watch(every=every)`` (ours) and without, taken in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[m for _ in range(6) for m in (nn.Linear(width * 4, width * 4), nn.ReLU())], nn.Linear(width * 4, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(batch * 4, width * 4), torch.randint(0, 10, (batch * 4,))

    def stretch() -> None:
        for _ in range(every):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def watched() -> None:
        with watch(model, every=every):
            stretch()

    return paired(watched, stretch, 0.0, rounds)


def main() -> None:
    which, width, batch, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    for call in passes(width, 2, kind):
        call()
    probed, plain = passes(width, batch, kind)
    with PeakMemory() as peak:
        # one pass alone rises by chance: where the allocator finds room differs
        for _ in range(3):
            (probed if which == "probed" else plain)()
    print(peak.bytes)


if __name__ == "__main__":
    main()
