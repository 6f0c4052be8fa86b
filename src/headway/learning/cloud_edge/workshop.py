"""Where the cloud's adapted copies are kept and worked on, one message after the other, by one worker (and its crew of processes)."""

from __future__ import annotations

import logging
import os
import threading

import torch
from torch import nn

from headway.learning.cloud_edge.crew import Crew
from headway.learning.cloud_edge.deployment import Deployment
from headway.learning.cloud_edge.saved import StateFolder, new_epoch
from headway.learning.cloud_edge.settings import Settings

log = logging.getLogger(__name__)


class Workshop:
    """The copies of a server and its worker.

    ``news`` guards ``copies``, ``of_edge`` and every inbox, and is notified of whatever happens.

    Args:
        models: from :func:`~headway.learning.cloud_edge.settings.prepare`.
        architecture: the edge network's hash; a folder with the state of another one is refused.
        state_dir: where state is kept, or None.
        checkpoint_every: steps between two writes.
        processes: that do the steps together; with 1 the worker does them itself.
    """

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        settings: Settings,
        architecture: str,
        state_dir: str | os.PathLike[str] | None,
        checkpoint_every: int,
        processes: int = 1,
    ) -> None:
        self._models, self._settings, self._architecture = models, settings, architecture
        self.checkpoint_every = max(1, checkpoint_every)
        self.crew = None if processes == 1 else Crew(models, settings, processes)
        self.copies: dict[str, Deployment] = {}
        self.of_edge: dict[str, Deployment] = {}
        self.news = threading.Condition()
        self.closed = False
        self._worker: threading.Thread | None = None
        self._folder = None if state_dir is None else StateFolder(state_dir)
        # the first optimiser of a process imports half of torch, which is better done before an edge waits for it
        torch.optim.SGD([torch.zeros(1)], 1.0)
        self.epoch = new_epoch() if self._folder is None else self._folder.next_epoch()
        for name, tensors, words in self._folder.load() if self._folder is not None else ():
            if words.get("architecture") != architecture:
                raise ValueError(f"state_dir {state_dir} holds the state of another edge model; give another path")
            copy = self.new_copy(name, float(words["e_max0"]))
            copy.load(tensors, words)
            self.of_edge |= dict.fromkeys(copy.sequences, copy)

    def new_copy(self, name: str, e_max0: float) -> Deployment:
        """A copy that starts from the source parameters."""
        self.copies[name] = Deployment(name, self._models, e_max0, self._settings, self.epoch, self.crew)
        return self.copies[name]

    def process(self) -> None:
        """Works on all that waits, in the calling thread."""
        while (copy := self._next()) is not None:
            self._work(copy)

    def _next(self) -> Deployment | None:
        with self.news:
            copies = [copy for copy in self.copies.values() if copy.inbox]
            # whoever has done fewest steps comes first, so that a busy deployment starves nobody
            copy = min(copies, key=lambda copy: copy.adapter.steps, default=None)
            if copy is not None:
                copy.busy = True
            return copy

    def _work(self, copy: Deployment) -> None:
        try:
            with copy.at_work:
                with self.news:
                    samples = copy.inbox.popleft()
                copy.work(samples)
                if self._folder is not None and copy.unsaved >= self.checkpoint_every:
                    self._save(copy, self._folder)
        except Exception:
            log.exception("the work on a message of deployment %s failed", copy.name)
        finally:
            with self.news:
                copy.busy = False
                self.news.notify_all()

    def _save(self, copy: Deployment, folder: StateFolder) -> None:
        try:
            copy.save(folder, self._architecture)
        except OSError as error:  # a full disk must not stop the adaptation; the last whole state is still there
            log.error("the state of deployment %s could not be saved: %s", copy.name, error)

    @property
    def working(self) -> bool:
        """Whether the worker is there."""
        return self._worker is not None

    def start(self) -> None:
        """Starts the worker, if there is none."""
        with self.news:
            if self._worker is None:
                self.closed = False
                self._worker = threading.Thread(target=self._run, name="cloud-edge worker", daemon=True)
                self._worker.start()

    def _run(self) -> None:
        if self.crew is not None:
            try:
                self.crew.start()
            except RuntimeError as error:
                log.error("%s; the next step tries again", error)
        while not self.closed:
            copy = self._next()
            if copy is not None:
                self._work(copy)
                continue
            with self.news:
                self.news.wait_for(lambda: self.closed or any(copy.inbox for copy in self.copies.values()), 60.0)

    def settle(self, timeout: float) -> bool:
        """Waits until nothing waits to be worked on; whether that came to be in time."""
        if not self.working:
            self.process()
        with self.news:
            return self.news.wait_for(lambda: all(copy.settled for copy in self.copies.values()), timeout)

    def close(self) -> None:
        """Stops the worker after the step it is at, wakes whoever waits, and saves every copy."""
        with self.news:
            self.closed = True
            self.news.notify_all()
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        if self.crew is not None:
            self.crew.close()
        if self._folder is not None:
            for copy in list(self.copies.values()):
                with copy.at_work:
                    self._save(copy, self._folder)
