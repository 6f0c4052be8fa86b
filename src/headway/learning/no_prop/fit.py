"""Training NoProp in one call, in one process or with the blocks dealt out to several.

Every block has an optimiser of its own: one over all of them would let weight decay and momentum move the blocks that had no turn.
All that is random (the loader's order, dropout, the noise) is seeded by the place in the plan, so with a fixed W a block comes out
bitwise the same whoever else is trained, in whatever process.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from headway.learning.no_prop.discrete import NoPropDT
from headway.learning.no_prop.labels import LabelDenoiser

Order = Literal["sequential", "sampled"]
Make = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Fit:
    """How training went.

    Attributes:
        losses: mean loss of each epoch; with several workers, of all of them.
        seconds, cpu_seconds: from the first batch to the last, without the start of processes; of the slowest worker.
    """

    losses: list[float]
    seconds: float
    cpu_seconds: float


def fit_noprop(
    model: LabelDenoiser,
    loader: Iterable[tuple[Tensor, Tensor]],
    epochs: int,
    optimizer: Make | None = None,
    workers: int = 1,
    order: Order = "sampled",
    seed: int = 0,
) -> Fit:
    """Trains a NoProp model in place and leaves it in the mode it was in.

    Args:
        model: NoPropDT, NoPropCT or NoPropFM. With ``embed="prototype"`` place the prototypes first.
        loader: batches (x, y); iterated once for each pass.
        epochs: with NoPropDT an epoch is T passes over the data, so that every block sees every sample once; otherwise one pass.
        optimizer: parameters -> optimiser, called for each block and for what they share; AdamW (NoPropDT) or Adam, with a rate of
            1e-3 and a weight decay of 1e-3, unless given.
        workers: processes among which the blocks of NoPropDT are dealt out. With a fixed W they need no word from each other and
            the result is that of one process; with a learned W they average the gradients of W and the head, step by step. The
            model, loader and optimizer must be picklable, and a script needs ``if __name__ == "__main__":``.
        order: "sampled" draws a block for each batch, "sequential" gives each block one pass after the other, as the paper does.

    Raises:
        ValueError: a setting out of its range, several workers for a model of one network or with a shared encoder, an empty loader,
            or something that cannot be sent to another process.
    """
    if epochs < 1 or workers < 1 or order not in ("sequential", "sampled"):
        raise ValueError(
            f'epochs and workers are at least 1 and order "sequential" or "sampled"; they are {epochs}, {workers}, {order!r}'
        )
    make = optimizer or _Default(model.optimizer_class)
    if workers == 1:
        return _Worker(model, loader, epochs, make, order, seed)()
    if not isinstance(model, NoPropDT):
        raise ValueError(f"{type(model).__name__} is one network and cannot be dealt out to {workers} workers; use 1")
    if any(hasattr(module, "held") for module in model.modules()):
        raise ValueError("blocks that share an encoder need one process; use workers=1, or share_encoder=False")
    return _in_processes(model, min(workers, model.T), loader, epochs, make, order, seed)


@dataclass(frozen=True)
class _Default:
    kind: Any

    def __call__(self, params: Any) -> torch.optim.Optimizer:
        return self.kind(params, lr=1e-3, weight_decay=1e-3)


@dataclass
class _Worker:
    """Trains the blocks whose number, counted from 0, leaves ``rank`` when divided by ``workers``."""

    model: LabelDenoiser
    loader: Iterable[tuple[Tensor, Tensor]]
    epochs: int
    make: Make
    order: Order
    seed: int
    rank: int = 0
    workers: int = 1

    def __call__(self) -> Fit:
        model, training = self.model, self.model.training
        blocks = model.blocks if isinstance(model, NoPropDT) else None
        self.optimizers = {
            t: self._optimizer(list(block.parameters()))
            for t, block in enumerate(blocks or [], 1)
            if (t - 1) % self.workers == self.rank
        }
        shared = {id(p) for p in model.shared_parameters()}
        if blocks is None:
            idle = {id(p) for p in model.head.parameters()} - shared
            self.optimizers = {0: self._optimizer([p for p in model.parameters() if id(p) not in shared | idle])}
        self.shared = self._optimizer(model.shared_parameters())
        together = self.workers > 1 and model.learned
        losses, start, cpu = [], time.perf_counter(), time.process_time()
        device = model.W.device
        model.train()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                for epoch in range(self.epochs):
                    total, count = 0.0, 0
                    for t, place, x, y in self._turns(epoch, together):
                        torch.manual_seed(_mixed(self.seed, *place))
                        generator = torch.Generator(device).manual_seed(_mixed(self.seed, *place, 1))
                        loss = self._step(t, x.to(device), y.to(device), generator, together)
                        if t is not None:
                            total, count = total + loss, count + 1
                    losses.append(float(total) / max(count, 1))
        finally:
            model.train(training)
            model.zero_grad(set_to_none=True)
        return Fit(losses, time.perf_counter() - start, time.process_time() - cpu)

    def _optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        trained = [p for p in params if p.requires_grad]
        return self.make(trained) if trained else None

    def _turns(self, epoch: int, together: bool) -> Iterator[tuple[int | None, tuple[int, ...], Tensor, Tensor]]:
        """Whose turn it is on every batch (0: the one network, None: a block of another worker), and its place in the plan."""
        own, T = sorted(self.optimizers), self.model.T if isinstance(self.model, NoPropDT) else 1
        passes = -(-T // self.workers) if together else T
        for number in range(passes):
            torch.manual_seed(_mixed(self.seed, epoch, number))
            i = -1
            for i, (x, y) in enumerate(self.loader):
                turn = number
                if self.order == "sampled":
                    draw = torch.Generator().manual_seed(_mixed(self.seed, epoch, i))
                    turn = int(torch.randperm(passes, generator=draw)[number])
                if own == [0]:
                    t: int | None = 0
                elif together:
                    t = own[turn] if turn < len(own) else None
                else:
                    t = turn + 1 if turn + 1 in self.optimizers else None
                yield t, (epoch, number, i), x, y
            if i < 0:
                raise ValueError("the loader gave no batch, or can be iterated only once; pass a list or a DataLoader")

    def _step(self, t: int | None, x: Tensor, y: Tensor, generator: torch.Generator, together: bool) -> Tensor:
        model: Any = self.model
        if t is None:
            # every process trains the head alike, from what it knows of all batches: their labels
            loss = model.head_loss(y, generator)
        else:
            loss = model.local_loss(x, y, t, generator) if t else model.local_loss(x, y, generator=generator)
        loss.backward()
        if together:
            for p in model.shared_parameters():
                dist.all_reduce(p.grad)
                p.grad /= self.workers
        for one in (self.shared, self.optimizers[t] if t is not None else None):
            if one is not None:
                one.step()
                one.zero_grad(set_to_none=True)
        return loss.detach()


def _mixed(*numbers: int) -> int:
    """One seed of several small numbers."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = ((value ^ (number + 1)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value ^= value >> 29
    return value >> 1


def _in_processes(model: NoPropDT, workers: int, *plan: Any) -> Fit:
    barrier = multiprocessing.get_context("spawn").Barrier(workers)
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.save(model, Path(folder, "model.pt"))
            multiprocessing.spawn(_process, (folder, barrier, workers, plan), nprocs=workers)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the model, loader and optimizer must be picklable to be sent to {workers} processes ({error}); name functions at "
                "the top of a module instead of lambdas, or use workers=1"
            ) from error
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(workers)]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for part in found:
            # W and the head are the same in all of them
            for name, value in part["state"].items():
                tensors[name].copy_(value)
    each = [part["losses"] for part in found]
    wall, cpu = (max(part["seconds"][i] for part in found) for i in range(2))
    return Fit([sum(epoch) / workers for epoch in zip(*each, strict=True)], wall, cpu)


def _process(rank: int, folder: str, barrier: Any, workers: int, plan: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    model = torch.load(Path(folder, "model.pt"), weights_only=False)
    if model.learned:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    barrier.wait()
    fit = _Worker(model, *plan, rank=rank, workers=workers)()
    own = tuple(f"blocks.{t - 1}." for t in range(1, model.T + 1) if (t - 1) % workers == rank)
    state = {name: value for name, value in model.state_dict().items() if name.startswith((*own, "head.", "W"))}
    torch.save(
        {"state": state, "losses": fit.losses, "seconds": (fit.seconds, fit.cpu_seconds)}, Path(folder, f"{rank}.pt")
    )
    if model.learned:
        dist.destroy_process_group()
