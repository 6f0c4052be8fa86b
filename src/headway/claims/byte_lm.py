"""The small language model on which placements of the norms are judged, and the training of many of them at once.

Bytes of Python's own documentation (``pydoc_data.topics``), 12 blocks of width 64, samples of 32 bytes, 8 a step; AdamW (0.9,
0.95) with decay 0.1 on matrices only, a linear warm-up to a constant rate, gradients clipped at 1. Two runs with the same seed
see the same bytes in the same order. ``python -m headway.claims.byte_lm`` is a worker: a run a line in, its result a line out.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.residual.depth_measures import angular_distance, layer_grad_norms, performance_drop
from headway.residual.transformer import TransformerDecoder
from headway.signals.probe import probe
from headway.tasks.text import ByteText, StdlibText

DEPTH = 12


class Topics(ByteText):
    """``pydoc_data.topics``, its last tenth held out."""

    name = "pydoc-topics"

    def files(self) -> Mapping[str, bytes]:
        from pydoc_data import topics

        return {"topics.py": Path(topics.__file__).read_bytes()}


@dataclass(frozen=True)
class Run:
    """One training: where the norms sit, the rate after ``warmup`` steps, and what is looked at in the end."""

    placement: str
    rate: float
    seed: int
    steps: int
    warmup: int = 20
    depth: int = DEPTH
    corpus: str = "pydoc-topics"
    layers: bool = False
    """Also measure what each layer does in the end: gradient norm, angular distance, performance drop."""


@cache
def text_of(corpus: str) -> ByteText:
    """The task "pydoc-topics" or "stdlib-text", with samples of 32 bytes."""
    return {"pydoc-topics": Topics, "stdlib-text": StdlibText}[corpus](dim=64, heads=4, length=32, held_out=256)


def train(run: Run) -> dict[str, Any]:
    """Trains one model and returns plain numbers.

    ``losses`` and ``gradients`` (norm before clipping) a step, ``largest`` (largest |value| that any block put out in any
    step), ``held_out`` (nats a byte), ``start`` and ``end`` (what the probe sees of the blocks, see :func:`signal`), and
    ``diverged``.
    """
    text = text_of(run.corpus)
    torch.manual_seed(run.seed)
    model = TransformerDecoder(256, 64, run.depth, 4, run.placement, max_length=32)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, run.rate, betas=(0.9, 0.95), fused=True)
    batches, losses, gradients, peaks = iter(text.train_batches(run.seed, 8)), [], [], []
    batch, start = held_out(text), signal(model, held_out(text))
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: peaks.append(out.detach().abs().amax()))
        for block in model.blocks
    ]
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * min(1.0, (step + 1) / run.warmup)
        loss = text.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        gradients.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    for hook in hooks:
        hook.remove()
    result = {**asdict(run), "diverged": not math.isfinite(losses[-1]), "losses": losses, "gradients": gradients}
    result["largest"] = float(torch.stack(peaks).amax())
    with torch.no_grad():
        result["held_out"] = text.evaluate(model.eval())["loss"]
    result |= {"start": start, "end": signal(model, batch)}
    return {**result, **(_layers(model, text, batch) if run.layers else {})}


def held_out(text: ByteText, samples: int = 64) -> Tensor:
    """Tokens (samples, length + 1) spread evenly through the held-out text."""
    bytes_ = text.texts()[1]
    starts = torch.linspace(0, len(bytes_) - text.length - 1, samples).long()
    return bytes_[starts[:, None] + torch.arange(text.length + 1)].long()


def signal(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """What the probe sees: the law of growth over the blocks, and of each its variance and the norm of its gradient."""

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    flow = probe(model, batch[:, :-1], loss=loss, targets=batch[:, 1:], kinds=("stream",), saved=False)
    blocks = flow.of("stream")
    return {
        **flow.growth.to_dict(),
        "variance": [row.var for row in blocks],
        "gradients": [row.grad_norm for row in blocks],
    }


def _layers(model: TransformerDecoder, text: ByteText, batch: Tensor) -> dict[str, Any]:
    """The three measures of what every layer does: the angle by which it turns a token (over pi), how much the held-out loss
    rises when it is left out, and the norm of the gradient of its matrices."""
    gradients = layer_grad_norms(model, lambda model: text.loss(model, batch))
    with torch.no_grad():
        angles = angular_distance(model, batch[:, :-1])
        drops = performance_drop(model, lambda model: float(text.loss(model, batch)))
    return {"angles": angles.tolist(), "drops": drops.tolist(), "layer_gradients": gradients.tolist()}


def train_all(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Trains the runs, as many at a time as there are cores, each in a process with one thread; results in their order.

    Raises:
        RuntimeError: a worker failed; what it said stands on standard error.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: SimpleQueue[int] = SimpleQueue()
    # long runs first, so that no core is left with one at the end
    for index in sorted(range(len(runs)), key=lambda i: -runs[i].steps * runs[i].depth):
        waiting.put(index)
    results: list[dict[str, Any]] = [{} for _ in runs]

    def work(_: int) -> None:
        command = [sys.executable, "-m", "headway.claims.byte_lm"]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as worker:
            assert worker.stdin is not None and worker.stdout is not None
            while True:
                try:
                    index = waiting.get_nowait()
                except Empty:
                    break
                worker.stdin.write(json.dumps(asdict(runs[index])) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise RuntimeError(f"the training of {runs[index]} ended without a result")
                results[index] = json.loads(line)

    workers = max(1, min(cores, len(runs)))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    return results


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(train(Run(**json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
