"""``hw.compare``: the same task, the same seeds, several arms, side by side, in a store that survives anything."""

from __future__ import annotations

import errno
import os
import shlex
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from headway.tasks.names import spell
from headway.tasks.task import Task, get
from headway.trials import engine_local, engine_ray
from headway.trials.arms import Arm
from headway.trials.arms import arms as read_arms
from headway.trials.budget import Budget
from headway.trials.comparison import Comparison
from headway.trials.interrupts import Interrupted
from headway.trials.progress import Display
from headway.trials.runner import Job, Precision, Stopped, accelerator_for
from headway.trials.store import Store


def compare(
    task: str | Task,
    arms: Any,
    seeds: int | Sequence[int] = 3,
    budget: int | str | None = None,
    *,
    store: str | os.PathLike[str] = "runs/compare.sqlite",
    engine: Literal["local", "ray"] = "local",
    precision: Precision = "fp32",
    report: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    evaluations: int = 8,
    checkpoint_every: float = 10.0,
    device: str | None = None,
    probe: bool = True,
    progress: bool | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    command: str | None = None,
) -> Comparison:
    """Trains a task's model once for each arm and seed, and holds the results side by side.

    Every run is written to ``store`` as it goes. Call again after a kill, a crash or Ctrl-C, and finished runs are kept and
    the interrupted one goes on from its last checkpoint, bit for bit. Several processes may work on one store at once; no two
    take the same run. Under ``torchrun`` or ``accelerate launch --multi_gpu``, without a GPU too, all processes share each run's
    batches.

    Args:
        task: a name ("stdlib-text(depth=12)"), a Python path ("pkg.module:make_task"), or a :class:`headway.tasks.Task`.
        arms: a list (or a mapping label -> arm) of "baseline", "peri-ln", "mix-ln(alpha=0.5)", "a+b",
            techniques, layer classes, or lists of these. The first one is what the others are held against.
        seeds: how many (0, 1, ...), or which.
        budget: of each run: steps (200, "200 steps") or training time ("60s", "2 min"); the task's own by default.
        store: the SQLite file; checkpoints lie in a folder beside it.
        engine: "local", or "ray" for a Ray cluster.
        precision: "fp32", or "bf16" for autocast.
        report: also write the HTML report there.
        batch_size: samples a step over all processes; the task's own by default.
        evaluations: how often a run is measured on held-out data, the last time at its end.
        checkpoint_every: seconds between checkpoints.
        device: "cpu" keeps off a GPU that is there.
        probe: probe the signal at the start and end of each run.
        progress: False shows nothing, None bars on a terminal and lines elsewhere.
        cpus, gpus: what one run takes of a Ray cluster.
        command: the command line that repeats this; worked out where it is not given.

    Returns:
        The comparison; print it, or ``.save("report.html")``.

    Raises:
        ValueError: an unknown task, arm, precision or engine, or a budget that cannot be read.
        NothingToChange: an arm finds nothing to change in the task's model; nothing has run then.
        Interrupted: stopped by Ctrl-C or a polite kill; a ``KeyboardInterrupt`` that says how to go on.
        OSError: the disk is full; everything stored so far is kept.
        RuntimeError: every run failed.
    """
    chosen, task_text = get(task), task if isinstance(task, str) else None
    lined_up = read_arms(arms)
    numbers = _seeds(seeds)
    length = Budget.of(budget if budget is not None else getattr(chosen, "budget", "200 steps"))
    size = _positive("batch_size", getattr(chosen, "batch_size", 32) if batch_size is None else batch_size)
    if precision not in ("fp32", "bf16"):
        raise ValueError(f'precision is "fp32" or "bf16", not {precision!r}')
    if engine not in ("local", "ray"):
        raise ValueError(f'engine is "local" or "ray", not {engine!r}')
    _positive("evaluations", evaluations)
    _try_arms(chosen, lined_up, numbers[0])
    request = {
        "task": {"name": chosen.name, "metric": chosen.metric, "lower_is_better": bool(chosen.lower_is_better)},
        "settings": _settings(chosen),
        "arms": [[arm.label, arm.identity()] for arm in lined_up],
        "seeds": numbers,
        "budget": str(length),
        "batch_size": size,
        "precision": precision,
        "evaluations": evaluations,
    }
    command = command or _command(
        task_text, chosen, arms, lined_up, numbers, length, store, engine, precision, batch_size
    )
    # All arms with one seed, then all with the next: an early look compares like with like.
    pairs = [(arm, seed) for seed in numbers for arm in lined_up]
    runs = [_run_row(request, arm, seed) for arm, seed in pairs]

    accelerator = accelerator_for(precision, device) if engine == "local" and not engine_local.one_process() else None
    main = accelerator is None or accelerator.is_main_process
    share = (lambda value: value) if accelerator is None else _share
    book = Store(store) if main else None
    try:
        registered = share(book.register(request, runs, command) if book else None)
        identifier, entered = registered  # type: ignore[misc]
        jobs = {
            run: Job(run, chosen, arm, seed, length, size, precision, evaluations, checkpoint_every, device, probe)
            for run, (arm, seed) in zip(entered, pairs, strict=True)
        }
        book = book or Store(store)
        labels = {run: f"{job.arm.label}, seed {job.seed}" for run, job in jobs.items()}
        done = {run: state[1] for run, state in book.states(jobs).items()}
        with Display(labels, done, chosen.name, progress if main else False) as display:
            if engine == "ray":
                engine_ray.run_all(jobs, book, display, cpus, gpus)
            else:
                engine_local.run_all(jobs, book, display, main, share)
        comparison = Comparison.load(store, identifier)
    except (Stopped, KeyboardInterrupt) as stopped:
        sentence = (
            f"Stopped; everything is kept in {store}: run the same command again to go on from there ({command})."
        )
        if main:
            print(sentence, file=sys.stderr, flush=True)
        raise Interrupted(sentence) from (stopped if isinstance(stopped, KeyboardInterrupt) else None)
    except (OSError, sqlite3.OperationalError) as error:
        if not _disk_full(error):
            raise
        sentence = (
            f"the disk of {store} is full; all that is stored is kept: free some space and run the same command again"
        )
        raise OSError(errno.ENOSPC, sentence) from None
    finally:
        if book is not None:
            book.close()
    if comparison.failures and len(comparison.failures) == len(jobs):
        raise RuntimeError(f"every run failed, the first with {comparison.failures[0]}")
    if report is not None and main:
        comparison.save(report)
    return comparison


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise ValueError(f"seeds is how many (3) or which ([0, 1, 2], each once, not negative), not {seeds!r}")
    return numbers


def _positive(name: str, value: int) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, not {value!r}")
    return int(value)


def _settings(task: Task) -> dict[str, Any]:
    return task.settings() if hasattr(task, "settings") else {}


def _try_arms(task: Task, arms: Sequence[Arm], seed: int) -> None:
    """Meets an arm that does not fit the task's model at the door, before anything has run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model(seed)
        for arm in arms:
            arm.plan(model)


def _run_row(request: Mapping[str, Any], arm: Arm, seed: int) -> dict[str, Any]:
    shared = {key: request[key] for key in ("task", "settings", "budget", "batch_size", "precision", "evaluations")}
    settings = {**shared, "arm": arm.identity(), "seed": seed}
    return {"task": request["task"]["name"], "arm": arm.label, "seed": seed, "settings": settings}


def _share(value: object) -> object:
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "full" in str(error) or "disk I/O error" in str(error)


def _command(
    text: str | None,
    task: Task,
    arms: Any,
    lined_up: Sequence[Arm],
    seeds: list[int],
    budget: Budget,
    store: object,
    engine: str,
    precision: str,
    batch_size: int | None,
) -> str:
    """The command line that repeats a comparison; how this program was started where its arms are objects of Python."""
    given = arms if isinstance(arms, Sequence) else ()
    if (
        text is None
        or isinstance(arms, Mapping)
        or not (isinstance(given, str) or all(isinstance(a, str) for a in given))
    ):
        return (
            shlex.join(["python", *sys.argv])
            if sys.argv and sys.argv[0] not in ("", "-c")
            else f"hw.compare({spell(task.name, {})!r}, ...)"
        )
    words = ["headway", "compare", text, "--arms", ",".join(arm.label for arm in lined_up)]
    words += ["--seeds", str(len(seeds)) if seeds == list(range(len(seeds))) else ",".join(map(str, seeds))]
    words += ["--budget", str(budget), "--store", str(store)]
    if batch_size is not None:
        words += ["--batch-size", str(batch_size)]
    if precision != "fp32":
        words += ["--precision", precision]
    if engine != "local":
        words += ["--engine", engine]
    return shlex.join(words)
