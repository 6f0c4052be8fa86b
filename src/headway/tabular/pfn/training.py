"""Training on a prior: fresh data sets every step, one context size for each batch.

n is drawn from {0, ..., N - 1} with weight 1 / (N - n), so that every context size gets about the same number of queries; a uniform draw
would spend most of the training on tiny contexts. That is six queries a data set at N = 25. A short training learns several times as
much with more: ``queries`` of them (an extension of ours) beside a context size drawn evenly, which again gives every size the same
number. Adam, linear warm-up over a quarter, half a cosine to 0, gradients clipped at 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from headway.tabular.pfn.network import PFN
from headway.tasks.batches import generator_for

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_context_size(N: int, generator: torch.Generator | None = None) -> int:
    """n in {0, ..., N - 1} with weight 1 / (N - n)."""
    return int(torch.multinomial(1 / torch.arange(N, 0, -1, dtype=torch.float64), 1, generator=generator))


class Draws(Dataset[Batch]):
    """Batch k of a prior: (x_ctx, y_ctx, x_q, y_q). It follows from (seed, rank, k); n from (seed, k), the same on every rank."""

    def __init__(
        self,
        prior: Any,
        batch_size: int,
        seq_len: int,
        num_features: int,
        seed: int,
        rank: int = 0,
        queries: int | None = None,
    ) -> None:
        self.prior, self.batch_size, self.seq_len, self.num_features = prior, batch_size, seq_len, num_features
        self.seed, self.rank, self.queries = seed, rank, queries

    def __getitem__(self, step: int) -> Batch:
        same = generator_for(self.seed, step)
        if self.queries is None:
            n, rows = draw_context_size(self.seq_len, same), self.seq_len
        else:
            n = int(torch.randint(self.seq_len, (), generator=same))
            rows = n + self.queries
        # an odd multiplier keeps the ranks' seeds apart from each other and from that of n
        own = generator_for(self.seed + 0x51ED270B * (self.rank + 1), step)
        x, y = self.prior(self.batch_size, rows, self.num_features, own)
        return x[:, :n], y[:, :n], x[:, n:], y[:, n:]


def learning_rate_factor(progress: float, warmup: float = 0.25) -> float:
    """Linear to 1 over ``warmup`` of the run, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def center_encoders_(model: PFN, prior: Any, seed: int = 0) -> PFN:
    """Starts a fresh network as if features and outcomes came with mean 0 and deviation 1 under ``prior``; the functions it can
    learn are the same. Linear encoders of features on the unit cube begin with rows that hardly differ, which costs most of a
    short training. Networks that standardise by their context (``standardize=True``) need it for nothing and are left alone.

    Returns:
        ``model``.
    """
    if model.standardize:
        return model
    x, y = prior(256, 64, model.num_features, generator_for(seed, -1))
    features = x.shape[-1]
    x = F.pad(x * (model.num_features / features), (0, model.num_features - features)).flatten(0, 1)
    for encoder, rows in ((model.enc_x, x), (model.enc_y, y.reshape(-1, 1).float())):
        rows = rows[rows.isfinite().all(1)].double()
        scale = rows.std(0)
        scale = torch.where(scale > 1e-9, scale, 1.0)
        encoder.weight.div_(scale.to(encoder.weight))
        encoder.bias.sub_(encoder.weight @ rows.mean(0).to(encoder.weight))
    return model


def train_pfn(
    model: nn.Module,
    prior: Any,
    steps: int = 1000,
    batch_size: int = 32,
    seq_len: int = 50,
    lr: float = 3e-4,
    seed: int = 0,
    workers: int = 0,
    bf16: bool = False,
    queries: int | None = None,
) -> dict[str, list[float]]:
    """Trains a :class:`PFN` (or one wrapped by DistributedDataParallel or torch.compile) on data sets drawn from ``prior``.

    Args:
        prior: ``prior(batch, N, F, generator) -> x, y``; its name is noted in the model.
        steps, batch_size: updates, and data sets an update (on each process).
        seq_len: N, rows of a data set. The model's ``n_max`` rises to N - 1.
        lr: the highest rate; 1e-4 to 1e-3, the smaller the wider the network (a width of 64 bears 3e-3).
        workers: processes that draw batches ahead; 0 draws them here. The draws do not depend on it.
        bf16: the body of the network in bfloat16 (the head stays in float32).
        queries: so many of them beside a context of 0 to seq_len - 1 rows, all sizes alike; None splits seq_len rows into both.

    Returns:
        {"loss": one a step, "context": n of each step}.

    Raises:
        ValueError: sizes that make no sense. FloatingPointError: the loss is no longer finite.
    """
    if min(steps, batch_size, seq_len, 1 if queries is None else queries) < 1 or not lr > 0:
        given = (steps, batch_size, seq_len, lr) if queries is None else (steps, batch_size, seq_len, lr, queries)
        raise ValueError(f"steps, batch_size, seq_len, lr and queries are positive; got {given}")
    inner = getattr(model, "_orig_mod", model)
    inner = getattr(inner, "module", inner)
    inner = getattr(inner, "_orig_mod", inner)
    if not isinstance(inner, PFN):
        raise ValueError(f"train_pfn trains a PFN, not {type(inner).__name__}")
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if spread else 0
    device = inner.enc_x.weight.device
    inner.prior_name = getattr(prior, "__name__", type(prior).__name__)
    inner.n_max = max(inner.n_max or 0, seq_len - 1)
    draws = Draws(prior, batch_size, seq_len, inner.num_features, seed, rank, queries)
    loader: Iterable[Batch] = (
        DataLoader(draws, batch_size=None, sampler=range(steps), num_workers=workers)  # type: ignore[arg-type]
        if workers
        else (draws[step] for step in range(steps))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device.type in ("cpu", "cuda") or None)
    history: dict[str, list[float]] = {"loss": [], "context": []}
    training = model.training
    model.train()
    for step, batch in enumerate(loader):
        x_ctx, y_ctx, x_q, y_q = (part.to(device) for part in batch)
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_factor((step + 1) / (steps + 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(x_ctx, y_ctx, x_q)
        loss = inner.loss(out, y_ctx, y_q)
        if not math.isfinite(value := float(loss.detach())):
            raise FloatingPointError(f"the loss is {value} at step {step}; a smaller lr helps")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history["loss"].append(value)
        history["context"].append(x_ctx.shape[1])
    model.train(training)
    return history
