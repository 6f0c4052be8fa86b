"""Times of group-wise whitening and colouring beside the released dense form and beside eigendecompositions, in turn, in one process.

    python benchmarks/whitening.py [--threads 1] [--seconds 1] [--json whitening.json]

Each number is the other side's time divided by headway's (how many times faster headway is), a median over pairs. A step is everything
between the style networks' output and the block's output with its terms: centring, Sigma, colouring factors, product, blend. "Dense"
builds the (B, C, C) matrices and multiplies by them, as the released code does; "exact" is whitening and colouring of every image by
eigendecomposition; "whiten" is the step with the content whitened by an eigendecomposition of Sigma, and nothing else added.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from headway.claims.gdwct import Step
from headway.measure import Paired, copy_bandwidth, paired

SHAPES = [(2, 256, 54, 54), (4, 256, 32, 32), (1, 256, 64, 64), (2, 128, 54, 54), (2, 512, 27, 27)]
GROUPS = (1, 4, 8, 16, 32)


def measure(shape: tuple[int, ...], groups: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for forward and one for forward and backward."""
    step, rows = Step(shape, groups), []
    nbytes = 4 * torch.Size(shape).numel()
    copy = 2 * nbytes / copy_bandwidth(nbytes, seconds / 4) * 1e6
    for backward in (False, True):
        sides: dict[str, Paired] = {
            name: paired(step.run("grouped", backward), step.run(name, backward), seconds)
            for name in ("dense", "exact", "whiten")
        }
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                "groups": groups,
                "threads": threads,
                "pass": "forward and backward" if backward else "forward",
                **{f"over {name}": side.ratio for name, side in sides.items()},
                "low": sides["dense"].low,
                "high": sides["dense"].high,
                "ours_us": sides["dense"].ours * 1e6,
                "copy_us": copy,
                "error": step.error(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times of group-wise whitening and colouring beside dense and exact forms."
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each pair is measured")
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUPS))
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for groups in given.groups:
                rows += measure(shape, groups, threads, given.seconds)
    table = Table(title=f"group-wise whitening and colouring, float32, PyTorch {torch.__version__}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(
            *(f"{v:.1e}" if k == "error" else f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items())
        )
    Console(width=170).print(table)
    if given.json:
        part = given.json.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1))
        part.replace(given.json)


if __name__ == "__main__":
    main()
