"""One run: a task's model, changed by one arm, trained from one seed within a budget, everything written as it happens.

Training runs under Accelerate, so one process on a CPU, a GPU, or several processes (``torchrun``, ``accelerate launch``) differ
by configuration alone. Several processes share each global batch: every one takes its slice and weighs its loss by the slice's
share, so that the gradient is that of the whole batch.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor, nn

from headway.tasks.task import Task
from headway.trials.arms import Arm
from headway.trials.budget import Budget
from headway.trials.facts import TrainingMemory, machine, versions
from headway.trials.probing import probe_task
from headway.trials.state import (
    evaluating,
    pack,
    random_state,
    readable,
    seed_everything,
    set_random_state,
    undisturbed,
    unpack,
)

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Job:
    """Everything that says what one run is. ``checkpoint_every`` is in seconds."""

    run: int
    task: Task
    arm: Arm
    seed: int
    budget: Budget
    batch_size: int
    precision: Precision = "fp32"
    evaluations: int = 8
    checkpoint_every: float = 10.0
    device: str | None = None
    probe: bool = True


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is saved."""


def accelerator_for(precision: Precision, device: str | None) -> Accelerator:
    """An Accelerator for this precision; on the CPU where there is nothing better, or where asked for."""
    wanted = {"fp32": "no", "bf16": "bf16"}[precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        # Accelerate allows one precision a process unless its state is set back; the process group stays.
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=wanted, cpu=device == "cpu" or not torch.accelerator.is_available())


@dataclass
class Run:
    """A run in progress. ``store`` is where it is written (by the main process alone), ``owner`` the claim it is held under."""

    job: Job
    store: Any
    owner: str
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[int, float], None] = lambda run, share: None
    accelerator: Accelerator = field(init=False)

    def __post_init__(self) -> None:
        self.accelerator = accelerator_for(self.job.precision, self.job.device)
        self.main = self.accelerator.is_main_process
        self._points: list[tuple] = []
        self._flushed = self._saved = time.monotonic()

    def __call__(self) -> None:
        """Trains to the end of the budget.

        Raises:
            Stopped: ``stop`` answered yes; a checkpoint is saved and the claim still held.
            LostClaim: another process has taken the run over.
        """
        heart = _Heart(self.store, self.job.run, self.owner) if self.main else nullcontext()
        try:
            with heart:
                self._train()
        finally:
            self.accelerator.free_memory()

    # --- the training itself

    def _train(self) -> None:
        job, task, accelerator = self.job, self.job.task, self.accelerator
        begun = self._on_main(self._begin)
        _warm(job, accelerator)
        memory = TrainingMemory(accelerator.device)
        seed_everything(job.seed)
        model = task.model(job.seed)
        plan = job.arm.plan(model)
        model = job.arm.build(model).to(accelerator.device).train()
        self._write_facts(model, plan, begun["facts"])
        if job.probe and "start" not in begun["probes"]:
            self._probe(model, "start")
        optimizer = job.arm.optimize(model, task.optimizer(model.parameters()))
        rates = [group["lr"] for group in optimizer.param_groups]
        bare, (model, optimizer) = model, accelerator.prepare(model, optimizer)
        batches = task.train_batches(job.seed, job.batch_size)
        seed_everything(job.seed + 7919 * accelerator.process_index)
        step, seconds = begun["step"], 0.0
        if begun["content"] is not None:
            seconds = self._restore(begun["content"], bare, optimizer, batches, step)
        measured = "peak_memory" in begun["facts"]
        budget, loss = job.budget, math.nan
        while (used := budget.progress(step, seconds)) < 1.0:
            if not measured:
                memory.before_step()
                measured = self._keep_memory(memory)
            started = time.perf_counter()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _rate(task, used)
            loss = self._step(model, optimizer, next(batches))
            took = time.perf_counter() - started
            step += 1
            loss, took, stop, save = self._agree(loss, took)
            seconds += took
            now = budget.progress(step, seconds)
            diverged = not math.isfinite(loss)
            due = int(now * job.evaluations + 1e-9) > int(used * job.evaluations + 1e-9)
            metrics = self._evaluate(model) if due and not diverged else None
            self._points.append((step, seconds, loss, metrics))
            if diverged:
                break
            if now < 1.0 and (save or stop):
                self._save(bare, optimizer, step, seconds, now)
            elif self.main and time.monotonic() - self._flushed > 1.0:
                self._flush(now)
            self.progress(job.run, now)
            if stop and now < 1.0:
                raise Stopped
        memory.end()
        self._keep_memory(memory)
        facts: dict[str, Any] = {"steps": step}
        if not math.isfinite(loss) and self._points:
            facts["diverged"] = step
        elif job.probe:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False).__dict__.pop("forward", None)
            self._probe(bare, "end")
        if self.main:
            self.store.finish(job.run, self.owner, self._points, facts)
        accelerator.wait_for_everyone()
        self.progress(job.run, 1.0)

    def _step(self, model: nn.Module, optimizer: Any, batch: Any) -> float:
        """One optimiser step on this process's share of a batch; answers its part of the batch's mean loss."""
        accelerator = self.accelerator
        share = 1.0
        if accelerator.num_processes > 1:
            batch, share = shard(batch, accelerator.process_index, accelerator.num_processes)
        batch = send_to_device(batch, accelerator.device)
        optimizer.zero_grad(set_to_none=True)
        loss = self.job.task.loss(model, batch)
        # Processes' gradients are averaged, so a share s of the batch counts with weight s * processes.
        accelerator.backward(loss * (share * accelerator.num_processes) if accelerator.num_processes > 1 else loss)
        optimizer.step()
        return float(loss.detach()) * share

    def _agree(self, loss: float, took: float) -> tuple[float, float, bool, bool]:
        """Loss of the whole batch, and the main process's clock and wishes, the same on every process."""
        save = self.main and time.monotonic() - self._saved >= self.job.checkpoint_every
        stop = bool(self.stop())
        if self.accelerator.num_processes == 1:
            return loss, took, stop, save
        mine = [loss, took if self.main else 0.0, float(stop), float(save)]
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        shared = torch.tensor(mine, device=self.accelerator.device, dtype=dtype)
        loss, took, stop_votes, save_votes = self.accelerator.reduce(shared, "sum").tolist()  # type: ignore[union-attr]
        return loss, took, stop_votes > 0, save_votes > 0

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        def measured() -> dict[str, float]:
            with evaluating(self.accelerator.unwrap_model(model)) as bare:
                return {name: float(value) for name, value in self.job.task.evaluate(bare).items()}

        return self._on_main(measured)

    def _probe(self, model: nn.Module, moment: str) -> None:
        if self.main:
            with undisturbed():
                data = probe_task(model, self.job.task, self.accelerator.device)
            self.store.add_probe(self.job.run, self.owner, moment, data)
        self.accelerator.wait_for_everyone()

    # --- what is written

    def _begin(self) -> dict[str, Any]:
        begun = self.store.begin(self.job.run, self.owner)
        if begun["content"] is not None and not readable(begun["content"]):
            return self.store.begin(self.job.run, self.owner, True)
        return begun

    def _write_facts(self, model: nn.Module, plan: Any, known: list[str]) -> None:
        if not self.main or "parameters" in known:
            return
        facts = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "plan": plan.to_dict() if plan is not None else None,
            "machine": {**machine(self.accelerator.device), "processes": self.accelerator.num_processes},
            "versions": versions(),
        }
        self.store.add_facts(self.job.run, self.owner, facts)

    def _keep_memory(self, memory: TrainingMemory) -> bool:
        if memory.peak is not None and self.main:
            facts = {"peak_memory": memory.peak, "peak_memory_method": memory.method}
            self.store.add_facts(self.job.run, self.owner, facts)
        return memory.peak is not None

    def _flush(self, progress: float) -> None:
        self.store.add_points(self.job.run, self.owner, self._points, progress)
        self._points.clear()
        self._flushed = time.monotonic()

    def _save(self, model: nn.Module, optimizer: Any, step: int, seconds: float, progress: float) -> None:
        """Model, optimiser, place in the data (the step), and every process's random generators."""
        generators = gather_object([random_state()])
        if self.main:
            content = pack(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                    "random": generators,
                    "modes": [module.training for module in model.modules()],
                }
            )
            self.store.save_checkpoint(self.job.run, self.owner, step, content, self._points, progress)
        self._points.clear()
        self._flushed = self._saved = time.monotonic()

    def _restore(self, content: bytes, model: nn.Module, optimizer: Any, batches: Iterator[Any], step: int) -> float:
        found = unpack(content)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        for module, mode in zip(model.modules(), found["modes"], strict=True):
            module.training = mode
        if hasattr(batches, "skip"):
            batches.skip(step)  # type: ignore[attr-defined]
        else:
            for _ in range(step):
                next(batches)
        mine = self.accelerator.process_index
        if mine < len(found["random"]):
            set_random_state(found["random"][mine])
        return found["seconds"]

    def _on_main(self, call: Callable[[], Any]) -> Any:
        """Calls on the main process and gives every process its answer."""
        answer = [call() if self.main else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        return answer[0]


_WARM: set[str] = set()


def _warm(job: Job, accelerator: Accelerator) -> None:
    """Takes one step of an unchanged model that is thrown away, once in a process for each task and precision: what libraries
    load and keep on first use would otherwise count as memory of the first run."""
    key = f"{job.task.name} {job.precision} {job.batch_size}"
    if key in _WARM:
        return
    _WARM.add(key)
    with undisturbed():
        seed_everything(job.seed)
        model = job.task.model(job.seed).to(accelerator.device).train()
        optimizer = job.task.optimizer(model.parameters())
        batch = send_to_device(next(job.task.train_batches(job.seed, job.batch_size)), accelerator.device)
        for _ in range(2):
            with accelerator.autocast():
                job.task.loss(model, batch).backward()
            optimizer.step()


def shard(batch: Any, rank: int, processes: int) -> tuple[Any, float]:
    """This process's slice of a batch along its first axis, and the slice's share of the whole.

    Raises:
        ValueError: the batch holds no tensor with a first axis, or fewer samples than there are processes.
    """
    sizes = {len(tensor) for tensor in _tensors(batch)}
    if len(sizes) != 1:
        raise ValueError(
            f"a batch whose tensors have {sorted(sizes) or 'no'} samples cannot be shared among {processes} processes; "
            "give batches (tensor, tuple, list or dict) with one common first axis, or use one process"
        )
    count = sizes.pop()
    if count < processes:
        raise ValueError(f"a batch of {count} cannot be shared among {processes} processes; choose a larger batch_size")
    first, last = count * rank // processes, count * (rank + 1) // processes
    return _sliced(batch, slice(first, last)), (last - first) / count


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)


def _sliced(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim else batch
    if isinstance(batch, dict):
        return type(batch)({key: _sliced(value, part) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_sliced(value, part) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_sliced(value, part) for value in batch)
    return batch


def _rate(task: Any, progress: float) -> float:
    return task.rate(progress) if hasattr(task, "rate") else 1.0


class _Heart:
    """Context manager: a thread that says every few seconds that the run's owner lives, also during a long evaluation."""

    def __init__(self, store: Any, run: int, owner: str, every: float = 10.0) -> None:
        self.store, self.run, self.owner, self.every = store, run, owner, every
        self._end = threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        if self._end.wait(self.every):
            return
        store = self.store.twin()
        # A beat that fails is no matter here: the next write of the run itself meets the same error and reports it.
        while not self._end.is_set():
            with suppress(Exception):
                store.beat(self.run, self.owner)
            self._end.wait(self.every)
        store.close()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
