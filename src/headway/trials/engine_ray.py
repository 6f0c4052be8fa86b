"""Spreads runs over a Ray cluster.

The store stays with the driver: an actor beside it does all reading and writing, and workers, on whatever machine, speak to
it. So no file system has to be shared, and a cluster that goes down leaves a store that any engine goes on from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from headway.trials.claims import claimant
from headway.trials.interrupts import Interrupts
from headway.trials.progress import Display
from headway.trials.runner import Job, Run, Stopped
from headway.trials.store import LostClaim, Store

_TRIES = 3


class RemoteStore:
    """The driver's store, spoken to from a worker: every method call goes to the keeper and comes back."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def twin(self) -> RemoteStore:
        """Calls to an actor may come from any thread."""
        return self

    def close(self) -> None:
        """Nothing to close on this side."""

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        from ray import get
        from ray.exceptions import RayTaskError

        def call(*arguments: Any) -> Any:
            try:
                return get(self._keeper.call.remote(method, arguments))
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None

        return call


class _Keeper:
    """Holds the store on the driver's machine."""

    def __init__(self, path: str) -> None:
        self.store = Store(path)

    def call(self, method: str, arguments: tuple) -> Any:
        return getattr(self.store, method)(*arguments)


def _work(job: Job, keeper: Any) -> str | None:
    """Does one job in a worker; answers why it failed, or None."""
    store = RemoteStore(keeper)
    with claimant() as owner:
        if store.claim(owner, [job.run]) is None:
            return None
        try:
            Run(job, store, owner)()
        except LostClaim:
            return None
        except Exception as error:
            store.fail(job.run, owner, f"{type(error).__name__}: {error}")
            return f"{type(error).__name__}: {error}"
    return None


def run_all(jobs: Mapping[int, Job], store: Store, display: Display, cpus: float | None, gpus: float | None) -> None:
    """Does every job on the cluster that is there (``RAY_ADDRESS``, or one already started in this process), or else on one
    started on this machine.

    Args:
        jobs: by run number.
        store: where they are entered.
        display: shows how far they are.
        cpus, gpus: what one run takes of the cluster; by default one CPU, and a GPU where the cluster has some.

    Raises:
        ImportError: Ray is not installed.
        Stopped: asked to stop by a signal.
    """
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise ImportError('engine="ray" needs Ray; install headway[ray], or use engine="local"') from None
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(log_to_driver=False, include_dashboard=False, address=os.environ.get("RAY_ADDRESS"))
    try:
        with Interrupts() as interrupts:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            keeper: Any = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=here).remote(str(store.path))
            resources = {
                "num_cpus": 1 if cpus is None else cpus,
                "num_gpus": float(ray.cluster_resources().get("GPU", 0) > 0) if gpus is None else gpus,
            }
            work = ray.remote(_work).options(max_retries=0, **resources)
            left = [run for run, (status, _) in store.states(jobs).items() if status != "finished"]
            tries = dict.fromkeys(left, 1)
            pending = {work.remote(jobs[run], keeper): run for run in left}
            try:
                while pending:
                    done, _ = ray.wait(list(pending), timeout=0.5)
                    for reference in done:
                        run = pending.pop(reference)
                        if _settled(ray, reference, run, store, display):
                            continue
                        if tries[run] >= _TRIES:
                            display.say(
                                f"{display.labels[run]}: its worker died {_TRIES} times; run the comparison again"
                            )
                            continue
                        tries[run] += 1
                        pending[work.remote(jobs[run], keeper)] = run
                    for number, (_, progress) in store.states(jobs).items():
                        display.update(number, progress)
                    if interrupts.asked:
                        raise Stopped
            finally:
                for reference in pending:
                    ray.cancel(reference, force=True)
                ray.kill(keeper)
    finally:
        if own:
            ray.shutdown()


def _settled(ray: Any, reference: Any, run: int, store: Store, display: Display) -> bool:
    """Whether a job is over; False when its worker died, or another process still does it, and it should be tried again."""
    try:
        failed = ray.get(reference)
    except ray.exceptions.RayError:
        return False
    if failed:
        display.say(f"{display.labels[run]} failed: {failed}")
        return True
    status = store.states([run])[run][0]
    if status in ("finished", "failed"):
        return True
    time.sleep(1.0)
    return False
