"""Times of UnifiedNorm and PowerNorm beside native LayerNorm, in turn, in one process, and of models with the norms folded away.

    python benchmarks/channel_statistics.py [--threads 1] [--seconds 0.3] [--json channel_statistics.json]

Each share is headway's time divided by PyTorch's. A training step is forward and backward of the layer with all gradients; an
evaluation is one forward without. A folded model is held against the same model with nn.LayerNorm and against one without norms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from headway.claims.unified_norm import models, tokens
from headway.kernels.library import status
from headway.measure import Paired, copy_bandwidth, paired
from headway.norms.power import PowerNorm
from headway.norms.unified import UnifiedNorm

SHAPES = [(64, 64), (1024, 256), (2048, 512), (4096, 768)]
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "UnifiedNorm": lambda c: UnifiedNorm(c, warmup_iters=2),
    "UnifiedNorm, filter": lambda c: UnifiedNorm(c, warmup_iters=2, outlier_filtration=True),
    "PowerNorm, no groups": lambda c: PowerNorm(c, warmup_iters=2, group_num=None),
    "PowerNorm, 4 groups": lambda c: PowerNorm(c, warmup_iters=2, group_num=4),
    "PowerNorm V": lambda c: PowerNorm(c, variant="v", group_num=None),
}


def _line(
    what: str, case: str, dtype: torch.dtype, threads: int, pair: Paired, copy: float | None = None
) -> dict[str, Any]:
    kind = str(dtype).removeprefix("torch.")
    share = {"share": 1 / pair.ratio, "low": 1 / pair.high, "high": 1 / pair.low}
    times = {"ours_us": pair.ours * 1e6, "theirs_us": pair.theirs * 1e6}
    return {"what": what, "case": case, "dtype": kind, "threads": threads, **share, **times, "copy_us": copy}


def _layers(shape: tuple[int, int], dtype: torch.dtype, threads: int, seconds: float) -> list[dict[str, Any]]:
    x, gy = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    native, lines = nn.LayerNorm(shape[1]).to(dtype), []
    nbytes = x.numel() * x.element_size()
    copy = 2 * nbytes / copy_bandwidth(nbytes, seconds) * 1e6

    def step(layer: nn.Module) -> object:
        return torch.autograd.grad(layer(x), (x, *layer.parameters()), gy)

    for name, make in LAYERS.items():
        layer = make(shape[1]).to(dtype)
        for _ in range(8):
            step(layer)
        pair = paired(lambda a=layer: step(a), lambda: step(native), seconds)
        lines.append(_line(f"{name}: training step", str(shape), dtype, threads, pair))
        layer.eval()
        with torch.no_grad():
            pair = paired(lambda a=layer: a(x), lambda: native(x), seconds)
        lines.append(_line(f"{name}: evaluation", str(shape), dtype, threads, pair, copy))
    return lines


@torch.no_grad()
def _folded(dim: int, dtype: torch.dtype, threads: int, seconds: float) -> list[dict[str, Any]]:
    native, folded, bare = models(dim, dtype)
    x, case = tokens(4), f"4 blocks, width {dim}"
    sides = {"folded over LayerNorm": native, "folded over no norm": bare}
    return [
        _line(name, case, dtype, threads, paired(lambda: folded(x), lambda m=model: m(x), 4 * seconds))
        for name, model in sides.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of norms with channel statistics beside native LayerNorm.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each pair is measured")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                lines += _layers(shape, dtype, threads, given.seconds)
            for dim in (64, 192):
                lines += _folded(dim, dtype, threads, given.seconds)
    built = status().get("channels")
    table = Table(title=f"channel statistics, C++ {'loaded' if built else 'NOT loaded'}, PyTorch {torch.__version__}")
    for column in (
        "what",
        "case",
        "type",
        "threads",
        "share of theirs",
        "quartiles",
        "ours us",
        "theirs us",
        "copy us",
    ):
        table.add_column(column)
    for each in lines:
        copy = "" if each["copy_us"] is None else f"{each['copy_us']:.0f}"
        numbers = [
            f"{each['share']:.2f}",
            f"{each['low']:.2f}-{each['high']:.2f}",
            f"{each['ours_us']:.1f}",
            f"{each['theirs_us']:.1f}",
        ]
        table.add_row(each["what"], each["case"], each["dtype"], str(each["threads"]), *numbers, copy)
    Console(width=150).print(table)
    if given.json:
        part = given.json.with_suffix(".part")
        part.write_text(json.dumps(lines, indent=1))
        part.replace(given.json)


if __name__ == "__main__":
    main()
