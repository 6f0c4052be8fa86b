"""What scaling costs: a network with scaled long skips beside the same one with plain skips, in turn, in one process.

    python benchmarks/long_skips.py [--seconds 4]

A training step is forward and backward with all gradients; inference is one forward without. Constants are also folded into the
layers that read the skips, where nothing of them is left. T counts the tokens of a U-ViT of width D with six skips; the UNet has six
skips too, and gates for channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from headway.measure import paired
from headway.residual.scale_long import FoldLongSkips, ScaleLong
from headway.surgery import apply
from headway.tasks.unets import UNet, UViT

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "U-ViT, T = 17, D = 64": (lambda: UViT(8, 3, 2, 64, 4, 6), (32, 3, 8)),
    "U-ViT, T = 65, D = 128": (lambda: UViT(16, 3, 2, 128, 4, 6), (8, 3, 16)),
    "U-ViT, T = 257, D = 128": (lambda: UViT(32, 3, 2, 128, 4, 6), (2, 3, 32)),
    "UNet, 16 to 48 channels, 32 x 32": (lambda: UNet(3, (16, 32, 48), 2), (4, 3, 32)),
}


def step(net: nn.Module, x: Tensor, t: Tensor) -> None:
    net.zero_grad()
    net(x, t).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of networks with scaled long skips beside plain ones.")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each pair is measured")
    seconds = parser.parse_args().seconds
    for words, (build, (batch, channels, size)) in NETWORKS.items():
        x, t = torch.randn(batch, channels, size, size), torch.rand(batch)
        plain = build()
        arms = {
            "CS": apply(build(), ScaleLong("cs", 0.7)),
            "LS": apply(build(), ScaleLong("ls", example_inputs=(x, t))),
        }
        print(f"{words}, {batch} images: scaled / plain skips")
        for name, net in arms.items():
            pair = paired(lambda n=net, x=x, t=t: step(n, x, t), lambda p=plain, x=x, t=t: step(p, x, t), seconds)
            print(
                f"  {name:10} training step  {1 / pair.ratio:.3f} ({1 / pair.high:.3f}-{1 / pair.low:.3f}), plain "
                f"{1e3 * pair.theirs:.1f} ms",
                flush=True,
            )
        if isinstance(plain, UViT):  # in the UNet a norm and a residual projection read what is concatenated
            arms["CS, folded"] = apply(apply(build(), ScaleLong("cs", 0.7)), FoldLongSkips((x, t)))
        plain.eval()
        for name, net in arms.items():
            net.eval()
            with torch.no_grad():
                pair = paired(lambda n=net, x=x, t=t: n(x, t), lambda p=plain, x=x, t=t: p(x, t), seconds / 2)
            print(
                f"  {name:10} inference      {1 / pair.ratio:.3f} ({1 / pair.high:.3f}-{1 / pair.low:.3f}), plain "
                f"{1e3 * pair.theirs:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
