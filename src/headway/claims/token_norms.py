"""What the claims of UnifiedNorm and PowerNorm share: one small language model, trained with each norm, and times of the layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headway.claims.evidence import Evidence, verdict
from headway.measure import copy_bandwidth, paired
from headway.norms.power import PowerNorm
from headway.norms.unified import UnifiedNorm
from headway.tasks.task import Task
from headway.tasks.text import StdlibText

Make = Callable[[int], nn.Module]


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of every channel over all tokens that are no padding: (..., C) -> (..., C)."""

    def forward(self, input: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if pad_mask is None:
            return super().forward(input.flatten(0, -2)).view(input.shape)
        return input.masked_scatter(~pad_mask[..., None], super().forward(input[~pad_mask]))


def makers(steps: int) -> dict[str, Make]:
    """The norms that are compared, warmed up for a fifth of the steps where they warm up."""
    warmup = steps // 5
    return {
        "LN": nn.LayerNorm,
        "BN": TokenBatchNorm,
        "PN": lambda dim: PowerNorm(dim, warmup_iters=warmup, group_num=4),
        "UN": lambda dim: UnifiedNorm(dim, warmup_iters=warmup),
        "none": lambda dim: nn.Identity(),
    }


@dataclass
class Run:
    """One model trained with one norm: loss on held-out text in nats a byte, and on as much training text the same way."""

    norm: str
    seed: int
    loss: float
    train_loss: float
    model: nn.Module


def train(
    name: str,
    make: Make,
    seed: int,
    steps: int,
    depth: int = 3,
    dim: int = 96,
    rate: float = 2e-3,
    batch_size: int = 16,
) -> Run:
    """Trains a pre-norm decoder on the standard library's text with Adam at a fixed rate; the seed fixes weights and batches."""
    task: Any = StdlibText(depth=depth, dim=dim, norm=make)  # type: ignore[arg-type]
    return train_on(task, name, seed, steps, rate, batch_size)


def train_on(task: Task, name: str, seed: int, steps: int, rate: float, batch_size: int) -> Run:
    """Trains a task's model with Adam at a fixed rate; ``name`` is that of its norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model(seed).train()
        optimizer = torch.optim.Adam(model.parameters(), rate)
        batches = iter(task.train_batches(seed, batch_size))
        last: list[float] = []
        for step in range(steps):
            loss = task.loss(model, next(batches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step >= steps - max(1, steps // 10):
                last.append(float(loss.detach()))
    with torch.no_grad():
        held_out = task.evaluate(model.eval())["loss"]
    return Run(name, seed, held_out, statistics.fmean(last), model)


def table(runs: list[Run]) -> str:
    """ "LN 2.076, BN 2.134, ..." with the mean over the seeds."""
    names = list(dict.fromkeys(run.norm for run in runs))
    return ", ".join(f"{name} {mean(runs, name):.3f}" for name in names)


def mean(runs: list[Run], name: str) -> float:
    """Mean held-out loss of one norm over its seeds."""
    return statistics.fmean(run.loss for run in runs if run.norm == name)


def gaps(runs: list[Run], a: str, b: str) -> list[float]:
    """Held-out loss of ``a`` minus that of ``b``, seed by seed."""
    of = {(run.norm, run.seed): run.loss for run in runs}
    return [of[a, seed] - of[b, seed] for name, seed in of if name == a and (b, seed) in of]


def spread(values: list[float]) -> str:
    """Mean and standard deviation, signed."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):+.3f}" + (f" +- {deviation:.3f}" if len(values) > 1 else "")


def layer_cost(key: str, layers: dict[str, Make], train_most: float, eval_most: float, quick: bool) -> list[Evidence]:
    """Time of one training step (forward and backward) and of an evaluation of the layer alone, over those of nn.LayerNorm."""
    budget, rows = (0.25 if quick else 2.0), []
    for name, make in layers.items():
        for tokens, channels in ((256, 128), (1024, 256), (2048, 512)):
            x, gy = torch.randn(tokens, channels, requires_grad=True), torch.randn(tokens, channels)
            ours, theirs = make(channels).train(), nn.LayerNorm(channels)

            def step(layer: nn.Module, x: Tensor = x, gy: Tensor = gy) -> object:
                return torch.autograd.grad(layer(x), (x, *layer.parameters()), gy)

            for _ in range(6):  # past warm-up, so that the smoothed statistics are what is timed
                step(ours)
            training = paired(lambda a=ours: step(a), lambda b=theirs: step(b), budget)
            ours.eval()
            with torch.no_grad():
                inference = paired(lambda a=ours, x=x: a(x), lambda b=theirs, x=x: b(x), budget)
            rows.append(
                {"layer": name, "tokens": tokens, "channels": channels, "training": 1 / training.ratio,
                 "evaluation": 1 / inference.ratio, "training us": training.ours * 1e6, "evaluation us": inference.ours * 1e6}
            )  # fmt: skip
    limit = f"copy bandwidth {copy_bandwidth(1 << 20, budget) / 1e9:.0f} GB/s at the size of the middle case"
    found = []
    for what, most in (("training", train_most), ("evaluation", eval_most)):
        good = [row[what] <= most for row in rows]
        what_is = (
            "a training step of the layer is affordable" if what == "training" else "the layer in evaluation is cheap"
        )
        found.append(
            Evidence(
                key,
                what_is,
                "not claimed; the released code takes 11 to 37 times nn.LayerNorm in training and 3.5 to 13 times in evaluation",
                ", ".join(f"x{r[what]:.2f} {r['layer']} at {r['tokens']} x {r['channels']}" for r in rows),
                f"nn.LayerNorm, eager, float32, {torch.get_num_threads()} thread(s); wanted: at most {most} of its time",
                verdict(good),
                f"{sum(good)} of {len(good)} sizes stay within it: two readings of the input each way and one loop over the channels"
                if what == "training"
                else f"{sum(good)} of {len(good)} sizes stay within it: one multiply-add an entry, and a mean a token with groups",
                limit,
                rows,
            )
        )
    return found
