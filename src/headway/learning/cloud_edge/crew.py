"""Several processes that do the cloud's steps together: each takes its part of the batch, and all end with the same parameters.

Server and processes talk over pipes in this protocol's own messages, the processes among each other through torch's gloo group. They
keep nothing between two steps: what a step starts from is sent with its samples and what it leads to is sent back, a few kilobytes.
So a process that dies, or does not answer, costs nothing but the time of its step, which new processes do again.
"""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headway.learning.cloud_edge.affine import Samples, rows
from headway.learning.cloud_edge.crew_member import Kit, Lost, Member
from headway.learning.cloud_edge.messages import pack, unpack
from headway.learning.cloud_edge.settings import Settings
from headway.learning.cloud_edge.shared import check_shareable
from headway.learning.cloud_edge.steps import NotFinite

log = logging.getLogger(__name__)
_STARTUP = 600.0  # seconds a process may take until it has imported everything; one that dies is noticed at once
_GRACE = 2.0  # seconds in which the others notice that one is gone


class Crew:
    """The processes of a server.

    Args:
        models: from :func:`~headway.learning.cloud_edge.settings.prepare`; every process holds a copy.
        settings: how they learn; a transform must be a function that another process can import.
        processes: how many there are; a step's batch holds at least one sample for each.
        patience: seconds a step may take.

    Attributes:
        losses: how often a process was lost.

    They are started by the first step, or by :meth:`start`, and anew where one was lost.

    Raises:
        ValueError: more processes than samples a step, a batch norm that cannot be shared, or something that no other process can be
            given.
    """

    def __init__(
        self, models: tuple[nn.Module, nn.Module], settings: Settings, processes: int, patience: float = 300.0
    ) -> None:
        if not 2 <= processes <= settings.batch_size:
            raise ValueError(
                f"processes share the {settings.batch_size} samples of a batch, so there are 1 to {settings.batch_size}; processes is "
                f"{processes}"
            )
        check_shareable(*models)
        self.processes, self.patience, self.losses = processes, patience, 0
        self._kit = Kit(models, settings, processes, patience)
        kinds = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
        self._turn = threading.Lock()
        self._members: list[Member] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def step(
        self, tensors: dict[str, Tensor], unseen: bool, e_max0: float, fresh: Samples | None, union: Samples
    ) -> dict[str, Tensor]:
        """What :meth:`Steps.step` makes of :meth:`Steps.tensors`, done together.

        Raises:
            RuntimeError: processes were lost twice, or the step itself failed. NotFinite: as the step does.
        """
        state, parts = {f"state/{name}": t for name, t in tensors.items()}, []
        for rank in range(self.processes):
            mine = slice(rank, None, self.processes)
            batches = {"union": rows(union, mine), **({} if fresh is None else {"fresh": rows(fresh, mine)})}
            named = {f"{name}/{key}": t for name, samples in batches.items() for key, t in samples.items()}
            parts.append(pack({**state, **named}, {"unseen": unseen, "e_max0": e_max0}))
        with self._turn:
            try:
                return self._once(parts)
            except Lost as lost:
                log.error("%s; the step is done again by new processes", lost)
                return self._once(parts)

    def _once(self, parts: Sequence[bytes]) -> dict[str, Tensor]:
        try:
            self._start()
            tensors, words = unpack(self._exchange(parts, self.patience + 2 * _GRACE)[0])
        except BaseException as error:
            self.losses += isinstance(error, Lost)
            self._stop()
            raise
        if "error" in words:  # all of them say it, and are ready for the next step
            raise NotFinite(words["error"])
        return tensors

    def _exchange(self, parts: Sequence[bytes], seconds: float) -> list[bytes]:
        """Sends each process its part, and returns their answers in the same order."""
        for member, part in zip(self._members, parts, strict=True):
            member.send(part)
        found: dict[int, bytes] = {}
        own, of_group, end = "", "", time.monotonic() + seconds
        while missing := [member for member in self._members if member.rank not in found]:
            wait([member.pipe for member in missing], max(0.0, end - time.monotonic()))
            for member in missing:
                if member.pipe.poll():
                    found[member.rank] = member.receive()
                    words = unpack(found[member.rank])[1]
                    if "fatal" in words:
                        # the others are in the middle of the step, and see that this one is gone
                        end = min(end, time.monotonic() + _GRACE)
                        own, of_group = own or words["fatal"], of_group or words["of_group"]
            if time.monotonic() >= end:
                break
        if own:
            raise RuntimeError(own)
        if missing:
            names = " and ".join(member.name for member in missing)
            raise Lost(f"{names} did not answer" + ("" if of_group else f" within {seconds:g} s"))
        if of_group:
            raise Lost(f"the processes lost each other: {of_group}")
        return [found[member.rank] for member in self._members]

    # --- their life

    def start(self) -> None:
        """Starts the processes, if they are not there, and waits until all of them are ready.

        Raises:
            RuntimeError: they do not start.
        """
        with self._turn:
            try:
                self._start()
            except BaseException:
                self._stop()
                raise

    def _start(self) -> None:
        dead = [member for member in self._members if member.obituary]
        if self._members and not dead:
            return
        if dead:
            self.losses += 1
            log.error("%s between two steps; new processes are started", dead[0].obituary)
        self._stop()
        self._folder = tempfile.TemporaryDirectory()
        meet = str(Path(self._folder.name, "meet"))
        self._members = [Member(self._context, self._kit, rank, meet) for rank in range(self.processes)]
        self._exchange([self._kit.values()] * self.processes, _STARTUP)

    def _stop(self) -> None:
        for member in self._members:
            member.end()
        self._members = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def alive(self) -> int:
        """How many of them there are now."""
        return sum(not member.obituary for member in self._members)

    def close(self) -> None:
        """Ends them."""
        with self._turn:
            self._stop()
