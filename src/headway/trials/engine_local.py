"""Runs jobs in this process (or this group of processes), one after another, until none is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from headway.trials.claims import claimant
from headway.trials.interrupts import Interrupts
from headway.trials.progress import Display
from headway.trials.runner import Job, Run, Stopped
from headway.trials.store import LostClaim, Store


def one_process() -> bool:
    """Whether this process trains alone; False under ``torchrun`` and ``accelerate launch --multi_gpu``."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def run_all(
    jobs: Mapping[int, Job], store: Store, display: Display, main: bool, share: Callable[[object], object]
) -> None:
    """Does every job that nobody else does, and waits for those that others do.

    Args:
        jobs: by run number, in the order of doing.
        store: where they are entered.
        display: shows how far they are.
        main: whether this is the process that claims and writes.
        share: gives every process the main one's value.

    Raises:
        Stopped: asked to stop by a signal; what was being done is saved and given back.
    """
    waiting = False
    with Interrupts() as interrupts, claimant() as owner:
        while True:
            run, busy = share(_next(jobs, store, owner) if main else None)  # type: ignore[misc]
            if run is None and not busy:
                return
            if run is None:
                if not waiting:
                    waiting = True
                    display.say(f"{busy} of the runs are being done by another process; waiting for them")
                if interrupts.asked:
                    raise Stopped
                for number, (_, progress) in store.states(jobs).items():
                    display.update(number, progress)
                time.sleep(0.5)
                continue
            _one(jobs[run], store, owner, display, interrupts)
            if interrupts.asked:
                raise Stopped


def _next(jobs: Mapping[int, Job], store: Store, owner: str) -> tuple[int | None, int]:
    run = store.claim(owner, jobs)
    busy = sum(status == "running" for status, _ in store.states(jobs).values()) if run is None else 0
    return run, busy


def _one(job: Job, store: Store, owner: str, display: Display, interrupts: Interrupts) -> None:
    run = Run(job, store, owner, lambda: interrupts.asked, display.update)
    try:
        run()
    except Stopped:
        if run.main:
            store.release(job.run, owner)
        raise
    except LostClaim as lost:
        display.say(f"{display.labels[job.run]}: {lost}")
    except Exception as error:
        if not reportable(error):
            raise
        if run.main:
            store.fail(job.run, owner, f"{type(error).__name__}: {error}")
        display.say(f"{display.labels[job.run]} failed: {type(error).__name__}: {error}")
        if run.accelerator.num_processes > 1:
            # The other processes of the group may be waiting inside the step that failed here.
            raise


def reportable(error: Exception) -> bool:
    """Whether an error belongs to the run alone; a full disk or a broken store concerns everything."""
    import sqlite3

    return not isinstance(error, OSError | sqlite3.Error)
