"""Times of EvoNorm's layers beside the batch norm and activation they replace, in turn, in one process.

    python benchmarks/evo.py [--threads 1] [--seconds 1] [--json evo.json]

Each share is headway's time divided by PyTorch's, a median over pairs. A training step is forward and backward with all gradients;
an evaluation is one forward without.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from headway import norms
from headway.kernels.library import status
from headway.measure import copy_bandwidth, paired

SHAPES = [(8, 64, 32, 32), (4, 256, 16, 16), (16, 32, 64, 64)]
KINDS = ("B0", "B1", "B2", "S0", "S1", "S2")


def measure(shape: tuple[int, ...], dtype: torch.dtype, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each layer and each activation that batch norm comes with."""
    x, gy, c = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype), shape[1]
    nbytes, rows = x.numel() * x.element_size(), []
    copy = 2 * nbytes / copy_bandwidth(nbytes, seconds / 3) * 1e6

    def step(module: nn.Module) -> object:
        return torch.autograd.grad(module(x), (x, *module.parameters()), gy)

    for kind in KINDS:
        for act in (nn.SiLU(), nn.ReLU()):
            ours = getattr(norms, f"EvoNorm2d{kind}")(c).to(dtype)
            theirs = nn.Sequential(nn.BatchNorm2d(c), act).to(dtype)
            train = paired(lambda m=ours: step(m), lambda m=theirs: step(m), seconds)
            ours.eval(), theirs.eval()
            with torch.no_grad():
                still = paired(lambda m=ours: m(x), lambda m=theirs: m(x), seconds / 2)
            rows.append(
                {
                    "layer": kind,
                    "against": f"BN + {type(act).__name__}",
                    "shape": "x".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": threads,
                    "train": 1 / train.ratio,
                    "train_low": 1 / train.high,
                    "train_high": 1 / train.low,
                    "eval": 1 / still.ratio,
                    "eval_us": still.ours * 1e6,
                    "copy_us": copy,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of EvoNorm beside batch norm and activation.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each pair is measured")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                rows += measure(shape, dtype, threads, given.seconds)
    table = Table(
        title=f"EvoNorm, C++ {'loaded' if status().get('evo') else 'NOT loaded'}, PyTorch {torch.__version__}"
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
