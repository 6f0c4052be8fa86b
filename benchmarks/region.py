"""Times of region normalisation beside the batch and instance norms it stands in for, in turn, in one process.

    python benchmarks/region.py [--threads 1] [--seconds 1] [--json region.json]

Each share is headway's time divided by PyTorch's, a median over pairs. A training step is forward and backward with all gradients; a
forward is one call in training mode without them. Holes take 30 % of the image. The copy is what moving the input once costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from headway.kernels.library import status
from headway.measure import copy_bandwidth, paired
from headway.norms.region import RegionNormB2d, RegionNormL2d

SHAPES = [(4, 64, 48, 48), (4, 256, 16, 16), (2, 64, 128, 128)]


class _With(nn.Module):
    """RN-B with the mask it is called with, and perhaps an activation behind it."""

    def __init__(self, norm: nn.Module, mask: Tensor, act: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.mask, self.act = norm, mask, act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x, self.mask))


def measure(shape: tuple[int, ...], dtype: torch.dtype, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each layer and each norm it is held against."""
    x, gy, c = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype), shape[1]
    mask, nbytes, rows = torch.rand(shape[0], *shape[2:]) < 0.3, x.numel() * x.element_size(), []
    copy = 2 * nbytes / copy_bandwidth(nbytes, seconds / 3) * 1e6

    def step(module: nn.Module) -> object:
        return torch.autograd.grad(module(x), (x, *module.parameters()), gy)

    batch, instance = nn.BatchNorm2d, lambda n: nn.InstanceNorm2d(n, affine=True)
    pairs = {
        "RN-B": (_With(RegionNormB2d(c), mask), batch(c), "BN"),
        "RN-B, batch": (_With(RegionNormB2d(c, "batch"), mask), batch(c), "BN"),
        "RN-B, IN": (_With(RegionNormB2d(c), mask), instance(c), "IN"),
        "RN-B + ReLU": (_With(RegionNormB2d(c), mask, nn.ReLU()), nn.Sequential(batch(c), nn.ReLU()), "BN + ReLU"),
        "RN-L": (RegionNormL2d(c), batch(c), "BN"),
        "RN-L, batch": (RegionNormL2d(c, stats="batch"), batch(c), "BN"),
    }
    for name, (ours, theirs, against) in pairs.items():
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        train = paired(lambda m=ours: step(m), lambda m=theirs: step(m), seconds)
        with torch.no_grad():
            still = paired(lambda m=ours: m(x), lambda m=theirs: m(x), seconds / 2)
        rows.append(
            {
                "layer": name,
                "against": against,
                "shape": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "train": 1 / train.ratio,
                "train_low": 1 / train.high,
                "train_high": 1 / train.low,
                "forward": 1 / still.ratio,
                "train_us": train.ours * 1e6,
                "copy_us": copy,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of region normalisation beside batch and instance norm.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each pair is measured")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    # glibc keeps freed memory up to twice the largest block it has seen; otherwise either side may map its pages anew in every step
    torch.empty(30 << 20, dtype=torch.uint8)
    rows: list[dict[str, Any]] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                rows += measure(shape, dtype, threads, given.seconds)
    table = Table(
        title=f"Region norms, C++ {'loaded' if status().get('region') else 'NOT loaded'}, PyTorch {torch.__version__}"
    )
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)
    if given.json:
        part = given.json.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1))
        part.replace(given.json)


if __name__ == "__main__":
    main()
