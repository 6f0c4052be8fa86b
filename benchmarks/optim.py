"""Times one step of AdamP and SGDP beside PyTorch's own optimisers: ``python benchmarks/optim.py [--threads 1] [--seconds 2]``.

"ratio" is our time divided by theirs. A step of fused AdamW reads p, g, m, v and writes p, m, v (7 streams of memory); deciding
whether to project before p may be written makes it 10, so that 1.43 is the floor on tensors that no cache holds. The loop is
AdamP's own, one tensor after another in plain PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels import radial
from headway.measure import Paired, paired
from headway.optim import SGDP, AdamP

SIZES = {"50 tensors, 0.1 M": (50, 16), "50 tensors, 1.6 M": (50, 64), "50 tensors, 14 M": (50, 192)}
RESNET_18 = [
    (64, 3, 7, 7),
    *[(64, 64, 3, 3)] * 4,
    (128, 64, 3, 3), *[(128, 128, 3, 3)] * 3, (128, 64, 1, 1),
    (256, 128, 3, 3), *[(256, 256, 3, 3)] * 3, (256, 128, 1, 1),
    (512, 256, 3, 3), *[(512, 512, 3, 3)] * 3, (512, 256, 1, 1),
    (1000, 512), (1000,),
    *[(64,)] * 10, *[(128,)] * 10, *[(256,)] * 10, *[(512,)] * 10,
]  # fmt: skip


def model_shapes(count: int, width: int) -> list[tuple[int, ...]]:
    """``count`` tensors as a convolutional net has them: half of them convolutions or matrices, half gains and offsets."""
    kinds: list[tuple[int, ...]] = [
        (width, width, 3, 3),
        (width,),
        (2 * width, width),
        (width,),
        (width, 2 * width),
        (width,),
    ]
    return [kinds[i % len(kinds)] for i in range(count)]


def small_shapes() -> list[tuple[int, ...]]:
    """600 tensors, 0.64 M numbers."""
    return [(32, 7, 3, 3) if i % 2 else (100,) for i in range(600)]


def parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    """Parameters with gradients; every other one has a gradient without a radial part, as in front of a normalisation."""
    draw, made = torch.Generator().manual_seed(seed), []
    for i, shape in enumerate(shapes):
        p, g = nn.Parameter(torch.randn(shape, generator=draw)), torch.randn(shape, generator=draw)
        if p.dim() > 1 and i % 2:
            rows, flat = p.detach().flatten(1), g.flatten(1)
            g = (flat - rows * (flat * rows).sum(1, True) / rows.square().sum(1, True)).view(shape)
        p.grad = g
        made.append(p)
    return made


PEERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "AdamP / Adam(foreach)": (lambda p: AdamP(p, 1e-9), lambda p: torch.optim.Adam(p, 1e-9, foreach=True)),
    "AdamP / AdamW(fused)": (lambda p: AdamP(p, 1e-9), lambda p: torch.optim.AdamW(p, 1e-9, fused=True)),
    "AdamP / its loop": (lambda p: AdamP(p, 1e-9), lambda p: AdamP(p, 1e-9, foreach=False)),
    "AdamP(foreach) / Adam(foreach)": (
        lambda p: AdamP(p, 1e-9, foreach=True),
        lambda p: torch.optim.Adam(p, 1e-9, foreach=True),
    ),
    "SGDP / SGD(foreach)": (
        lambda p: SGDP(p, 1e-9, momentum=0.9),
        lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, foreach=True),
    ),
    "SGDP / SGD(fused)": (
        lambda p: SGDP(p, 1e-9, momentum=0.9),
        lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, fused=True),
    ),
    "SGDP / its loop": (lambda p: SGDP(p, 1e-9, momentum=0.9), lambda p: SGDP(p, 1e-9, momentum=0.9, foreach=False)),
    "SGDP(foreach) / SGD(foreach)": (
        lambda p: SGDP(p, 1e-9, momentum=0.9, foreach=True),
        lambda p: torch.optim.SGD(p, 1e-9, momentum=0.9, foreach=True),
    ),
}


def step_times(peer: str, shapes: list[tuple[int, ...]], seconds: float) -> Paired:
    """Our step and the peer's, in turn, on parameters of these shapes."""
    ours, theirs = (make(parameters(shapes)) for make in PEERS[peer])
    return paired(ours.step, theirs.step, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"C++ {'loaded' if radial.built else 'NOT loaded'}, {given.threads} thread(s)")
    print(f"{'model':24} {'what':32} ours ms  their ms  ratio  quartiles")
    models = {name: model_shapes(*size) for name, size in SIZES.items()}
    models |= {"600 tensors, 0.64 M": small_shapes(), "ResNet-18, 11.7 M": RESNET_18}
    for name, shapes in models.items():
        for peer in PEERS:
            r = step_times(peer, shapes, given.seconds)
            print(f"{name:24} {peer:32} {r.ours * 1e3:7.3f}  {r.theirs * 1e3:8.3f}  {1 / r.ratio:5.2f}  "
                  f"{1 / r.high:.2f}-{1 / r.low:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
