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
        losses: mean loss of each epoch, over all workers.
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
        return _joined([_Worker(model, loader, epochs, make, order, seed)()])
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


@dataclass(frozen=True)
class _Part:
    """What one worker did: for each epoch the sum and number of its blocks' losses, and of the head's; and its times."""

    sums: list[tuple[float, int, float, int]]
    seconds: float
    cpu_seconds: float


def _joined(parts: list[_Part]) -> Fit:
    losses = []
    for epochs in zip(*(part.sums for part in parts), strict=True):
        blocks, count, head, heads = (sum(values) for values in zip(*epochs, strict=True))
        losses.append(blocks / max(count, 1) + head / max(heads, 1))
    return Fit(losses, max(part.seconds for part in parts), max(part.cpu_seconds for part in parts))


@dataclass
class _Worker:
    """Trains the blocks whose number, counted from 0, leaves ``rank`` when divided by ``workers``.

    What blocks share is trained by all workers together where W is learned. With a fixed W no block asks for the head, and the last
    worker, which has the fewest blocks, trains it.
    """

    model: LabelDenoiser
    loader: Iterable[tuple[Tensor, Tensor]]
    epochs: int
    make: Make
    order: Order
    seed: int
    rank: int = 0
    workers: int = 1

    def __call__(self) -> _Part:
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
        self.together = self.workers > 1 and model.learned
        self.leads = self.together or self.rank == self.workers - 1
        self.shared = self._optimizer(model.shared_parameters()) if self.leads else None
        sums, start, cpu = [], time.perf_counter(), time.process_time()
        device = model.W.device
        model.train()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                for epoch in range(self.epochs):
                    own, head = [], []
                    for t, place, x, y in self._turns(epoch):
                        _seed(_mixed(self.seed, *place), device)
                        generator = torch.Generator(device).manual_seed(_mixed(self.seed, *place, 1))
                        of_block, of_head = self._step(t, x.to(device), y.to(device), generator)
                        own += [] if of_block is None else [of_block]
                        head += [] if of_head is None else [of_head]
                    sums.append((float(sum(own)), len(own), float(sum(head)), len(head)))
        finally:
            model.train(training)
            model.zero_grad(set_to_none=True)
        return _Part(sums, time.perf_counter() - start, time.process_time() - cpu)

    def _optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        trained = [p for p in params if p.requires_grad]
        return self.make(trained) if trained else None

    def _turns(self, epoch: int) -> Iterator[tuple[int | None, tuple[int, ...], Tensor, Tensor]]:
        """Whose turn it is on every batch that concerns this worker (0: the one network, None: the head alone), and its place in the
        plan."""
        own, T = sorted(self.optimizers), self.model.T if isinstance(self.model, NoPropDT) else 1
        passes = -(-T // self.workers) if self.together else T
        for number in range(passes):
            if self.order == "sequential" and not self.leads and number + 1 not in self.optimizers:
                continue
            _seed(_mixed(self.seed, epoch, number), self.model.W.device)
            i = -1
            for i, (x, y) in enumerate(self.loader):
                turn = number
                if self.order == "sampled":
                    draw = torch.Generator().manual_seed(_mixed(self.seed, epoch, i))
                    turn = int(torch.randperm(passes, generator=draw)[number])
                if own == [0]:
                    t: int | None = 0
                elif self.together:
                    t = own[turn] if turn < len(own) else None
                else:
                    t = turn + 1 if turn + 1 in self.optimizers else None
                if t is not None or self.leads:
                    yield t, (epoch, number, i), x, y
            if i < 0:
                raise ValueError("the loader gave no batch, or can be iterated only once; pass a list or a DataLoader")

    def _step(
        self, t: int | None, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor | None]:
        """Moves what is to be moved on a batch; the losses of the block (or network) and of the head."""
        model: Any = self.model
        block = head = None
        if t == 0:
            block = model.local_loss(x, y, generator=generator)
        else:
            # the head's noise is drawn first in every process, so that a block meets the same noise in all of them
            if self.leads:
                head = model.head_loss(y, generator)
            else:
                model.noise(len(y), generator)
            if t is not None:
                block = model.denoising_loss(x, y, t, generator)
        torch.stack([loss for loss in (head, block) if loss is not None]).sum().backward()
        if self.together:
            for p in model.shared_parameters():
                dist.all_reduce(p.grad)
                p.grad /= self.workers
        for one in (self.shared, self.optimizers[t] if t is not None else None):
            if one is not None:
                one.step()
                one.zero_grad(set_to_none=True)
        return None if block is None else block.detach(), None if head is None else head.detach()


def _seed(value: int, device: torch.device) -> None:
    """Seeds what draws without a generator. ``torch.manual_seed`` also tells every kind of device there is, which takes as long as a
    head's step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)


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
            for name, value in part["state"].items():
                tensors[name].copy_(value)
    return _joined([_Part(part["sums"], *part["seconds"]) for part in found])


def _process(rank: int, folder: str, barrier: Any, workers: int, plan: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    model = torch.load(Path(folder, "model.pt"), weights_only=False)
    if model.learned:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    barrier.wait()
    worker = _Worker(model, *plan, rank=rank, workers=workers)
    part = worker()
    own = tuple(f"blocks.{t - 1}." for t in range(1, model.T + 1) if (t - 1) % workers == rank)
    shared = ("head.", "W") if worker.leads else ()
    state = {name: value for name, value in model.state_dict().items() if name.startswith((*own, *shared))}
    torch.save(
        {"state": state, "sums": part.sums, "seconds": (part.seconds, part.cpu_seconds)}, Path(folder, f"{rank}.pt")
    )
    if model.learned:
        dist.destroy_process_group()
