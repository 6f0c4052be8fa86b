"""Times of batch-channel and task-balanced norms beside the batch norm they replace, each with its ReLU, in turn, in one process.

    python benchmarks/channel_norms.py [--threads 1] [--seconds 1] [--json channel_norms.json]

Each share is headway's time divided by PyTorch's, a median over pairs. A training step is forward and backward with all gradients;
an evaluation is one forward without. Standardised convolutions are held against plain ones, forward and backward with one image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from headway.kernels.library import status
from headway.measure import Paired, copy_bandwidth, paired
from headway.norms.balanced import AdaB2N2d
from headway.norms.balancing import balance_penalty, start_task, task_batch
from headway.norms.batch_channel import BatchChannelNorm2d, EstBatchNorm2d
from headway.weights.standardised import WSConv2d

SHAPES = [(1, 64, 16, 16), (2, 64, 32, 32), (20, 32, 8, 8), (30, 64, 16, 16), (8, 128, 28, 28), (1, 256, 56, 56)]
CONVOLUTIONS = [(64, 32), (256, 14), (512, 7)]
TASKS = 5
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "EstBN": EstBatchNorm2d,
    "BCN": lambda c: BatchChannelNorm2d(c, min(c, 32)),
    "BCN, estimated": lambda c: BatchChannelNorm2d(c, min(c, 32), estimate=True),
    "AdaB2N": lambda c: AdaB2N2d(c, TASKS),
    "AdaB2N with penalty": lambda c: AdaB2N2d(c, TASKS),
}


def _row(
    layer: str, shape: Any, dtype: torch.dtype, threads: int, train: Paired, still: Paired, copy: float
) -> dict[str, Any]:
    named = {
        "layer": layer,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }
    share = {
        "train": 1 / train.ratio,
        "train_low": 1 / train.high,
        "train_high": 1 / train.low,
        "train_us": train.ours * 1e6,
    }
    return {**named, **share, "eval": 1 / still.ratio, "eval_us": still.ours * 1e6, "copy_us": copy}


def norms(shape: tuple[int, ...], dtype: torch.dtype, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each layer."""
    x, gy, c = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype), shape[1]
    nbytes, rows = x.numel() * x.element_size(), []
    copy = 2 * nbytes / copy_bandwidth(nbytes, seconds / 3) * 1e6
    theirs = nn.BatchNorm2d(c).to(dtype)

    def step(norm: nn.Module, penalised: bool = False) -> object:
        outputs, gradients = [norm(x).relu()], [gy]
        if penalised:
            outputs, gradients = [*outputs, balance_penalty(norm)], [gy, None]  # type: ignore[list-item]
        return torch.autograd.grad(outputs, (x, *norm.parameters()), gradients)

    for name, make in LAYERS.items():
        ours, penalised = make(c).to(dtype), name.endswith("penalty")
        start_task(ours, TASKS - 1)
        balanced = isinstance(ours, AdaB2N2d)
        with task_batch(ours, torch.arange(shape[0]) % TASKS) if balanced else nullcontext():
            train = paired(lambda m=ours, p=penalised: step(m, p), lambda: step(theirs.train()), seconds)
        ours.eval(), theirs.eval()
        with torch.no_grad():
            still = paired(lambda m=ours: m(x).relu(), lambda: theirs(x).relu(), seconds / 2)
        rows.append(_row(name, shape, dtype, threads, train, still, copy))
        theirs.train()
    return rows


def convolutions(channels: int, size: int, threads: int, seconds: float) -> dict[str, Any]:
    """A 3x3 convolution of one image with standardised weights."""
    x = torch.randn(1, channels, size, size)
    gy, nbytes = torch.randn_like(x), 9 * channels * channels * x.element_size()
    copy = 2 * nbytes / copy_bandwidth(nbytes, seconds / 3) * 1e6
    ours, theirs = (kind(channels, channels, 3, padding=1, bias=False) for kind in (WSConv2d, nn.Conv2d))

    def step(conv: nn.Module) -> object:
        return torch.autograd.grad(conv(x), tuple(conv.parameters()), gy)

    train = paired(lambda: step(ours), lambda: step(theirs), seconds)
    ours.eval()
    with torch.no_grad():
        still = paired(lambda: ours(x), lambda: theirs(x), seconds / 2)
    return _row("WSConv2d", x.shape, torch.float32, threads, train, still, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of channel norms beside batch norm.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each pair is measured")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for dtype in given.dtypes:
            for shape in SHAPES:
                rows += norms(shape, getattr(torch, dtype), threads, given.seconds)
        rows += [convolutions(channels, size, threads, given.seconds) for channels, size in CONVOLUTIONS]
    built = "loaded" if status().get("planes") else "NOT loaded"
    table = Table(title=f"channel norms, C++ {built}, PyTorch {torch.__version__}")
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
