"""Times of the norm kernels beside PyTorch's own, in turn, in one process: a table on the terminal, JSON with ``--json PATH``.

    python benchmarks/norms.py [--threads 1 2] [--seconds 0.15] [--json norms.json]

Each ratio is PyTorch's time divided by headway's. "GB/s" is what the forward moves (input read, output written), "copy" what
``copy_`` moves between tensors of that size: the limit. Large results are also written to reused memory (``out=``), because
the pages of a fresh tensor beyond the allocator's threshold cost more than the norm itself. The smallest shape, 4 x 8 x 64,
shows what a call costs. PyTorch's RMS norm is put together of several operators, so the RMS norm is also held against
PyTorch's layer norm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from headway.kernels.library import status
from headway.kernels.norms import add_norm, channel_norm, crms_norm, layer_norm, norm_add_norm, rms_norm
from headway.measure import copy_bandwidth, paired

SHAPES = [(32, 64), (512, 256), (1024, 768), (4096, 512), (16384, 1024)]


@dataclass
class Line:
    """One measured pair: seconds a call, their ratio with its quartiles, and the bandwidth where bytes are what counts."""

    what: str
    shape: tuple[int, ...]
    dtype: str
    threads: int
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    gigabytes: float | None = None
    copy: float | None = None


def _backward(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    result = function(*inputs)
    return lambda: torch.autograd.grad(result, inputs, gradient, retain_graph=True)


def _measure(shape: tuple[int, int], dtype: torch.dtype, threads: int, seconds: float) -> list[Line]:
    n = shape[1]
    x, residual, gradient = (torch.randn(shape).to(dtype) for _ in range(3))
    w, b = torch.rand(n).to(dtype), torch.rand(n).to(dtype)
    out = torch.empty_like(x)
    nbytes = x.numel() * x.element_size()
    lines: list[Line] = []

    def line(what: str, ours: Callable[[], object], theirs: Callable[[], object], moved: int = 0) -> None:
        pair = paired(ours, theirs, seconds)
        limit = copy_bandwidth(nbytes, seconds / 3) / 1e9 if moved else None
        speed = moved / pair.ours / 1e9 if moved else None
        kind = str(dtype).removeprefix("torch.")
        ratios = (pair.ours, pair.theirs, pair.ratio, pair.low, pair.high)
        lines.append(Line(what, shape, kind, threads, *ratios, speed, limit))

    def torch_layer(a: Tensor) -> Tensor:
        return F.layer_norm(a, (n,), w, b)

    def torch_rms(a: Tensor) -> Tensor:
        return F.rms_norm(a, (n,), w, 1e-5)

    def seam(f: Tensor, x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
        offset = None if rms else b
        return norm_add_norm(f, x, w, w, output_bias=offset, input_bias=offset, rms=rms)

    def seam_apart(f: Tensor, x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
        kind = torch_rms if rms else torch_layer
        h = x + kind(f)
        return h, kind(h)

    with torch.no_grad():
        line("layer norm", lambda: layer_norm(x, n, w, b), lambda: torch_layer(x), 2 * nbytes)
        line("layer norm, out=", lambda: layer_norm(x, n, w, b, out=out), lambda: torch_layer(x), 2 * nbytes)
        line("rms norm", lambda: rms_norm(x, n, w), lambda: torch_rms(x), 2 * nbytes)
        line("rms norm, out=", lambda: rms_norm(x, n, w, out=out), lambda: torch_rms(x), 2 * nbytes)
        line("rms norm / torch layer norm", lambda: rms_norm(x, n, w), lambda: torch_layer(x), 2 * nbytes)
        line("crms norm / torch layer norm", lambda: crms_norm(x), lambda: torch_layer(x), 2 * nbytes)
        line("add + layer norm", lambda: add_norm(x, residual, w, b), lambda: torch_layer(x + residual))
        line("add + rms norm", lambda: add_norm(x, residual, w, rms=True), lambda: torch_rms(x + residual))
        line("norm, add, norm", lambda: seam(x, residual, False), lambda: seam_apart(x, residual, False))
        line("rms, add, rms", lambda: seam(x, residual, True), lambda: seam_apart(x, residual, True))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    line("layer norm, graph recorded", lambda: layer_norm(x, n, w, b), lambda: torch_layer(x))
    line("rms norm, graph recorded", lambda: rms_norm(x, n, w), lambda: torch_rms(x))
    ours, theirs = (lambda x, w, b: layer_norm(x, n, w, b)), (lambda x, w, b: F.layer_norm(x, (n,), w, b))
    line("layer norm backward", _backward(ours, leaves, gradient), _backward(theirs, leaves, gradient))
    ours, theirs = (lambda x, w: rms_norm(x, n, w)), (lambda x, w: F.rms_norm(x, (n,), w, 1e-5))
    line("rms norm backward", _backward(ours, leaves[:2], gradient), _backward(theirs, leaves[:2], gradient))
    four = [x, residual.requires_grad_(), w, b]
    both = [gradient, gradient]

    def add_apart() -> list[Tensor]:
        h = four[0] + four[1]
        return [torch_layer(h), h]

    pairs = {
        "add + layer norm": (lambda: add_norm(x, residual, w, b), add_apart),
        "norm, add, norm": (lambda: seam(x, residual, False), lambda: seam_apart(x, residual, False)),
    }
    for what, (fused, apart) in pairs.items():
        line(
            f"{what}, forward and backward",
            lambda call=fused: torch.autograd.grad(call(), four, both),
            lambda call=apart: torch.autograd.grad(call(), four, both),
        )
    return lines


def _channels(threads: int, seconds: float) -> list[Line]:
    lines = []
    for shape in ((8, 64, 14, 14), (8, 96, 28, 28), (8, 128, 56, 56)):
        x, w, b = torch.randn(shape), torch.rand(shape[1]), torch.rand(shape[1])

        def theirs(x: Tensor = x, w: Tensor = w, b: Tensor = b) -> Tensor:
            last = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), w, b)
            return last.permute(0, 3, 1, 2).contiguous()

        with torch.no_grad():
            pair = paired(lambda x=x, w=w, b=b: channel_norm(x, w, b), theirs, seconds)
        ratios = (pair.ours, pair.theirs, pair.ratio, pair.low, pair.high)
        lines.append(Line("layer norm over NCHW channels", shape, "float32", threads, *ratios))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of the norm kernels beside PyTorch's own.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.15, help="how long each pair is measured")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    lines: list[Line] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                lines += _measure(shape, dtype, threads, given.seconds)
        lines += _channels(threads, given.seconds)
    built = status().get("norms")
    table = Table(title=f"norm kernels, C++ {'loaded' if built else 'NOT loaded'}, PyTorch {torch.__version__}")
    for column in ("what", "shape", "type", "threads", "ours us", "torch us", "ratio", "quartiles", "GB/s", "copy"):
        table.add_column(column)
    for each in lines:
        moved = ["" if v is None else f"{v:.0f}" for v in (each.gigabytes, each.copy)]
        times = [f"{each.ours * 1e6:.1f}", f"{each.theirs * 1e6:.1f}", f"{each.ratio:.2f}"]
        spread = f"{each.low:.2f}-{each.high:.2f}"
        table.add_row(each.what, str(each.shape), each.dtype, str(each.threads), *times, spread, *moved)
    Console(width=150).print(table)
    if given.json:
        part = given.json.with_suffix(".part")
        part.write_text(json.dumps([asdict(each) for each in lines], indent=1))
        part.replace(given.json)


if __name__ == "__main__":
    main()
