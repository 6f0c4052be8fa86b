"""One of the processes that do the cloud's steps together: seen from the server, and what it does itself."""

from __future__ import annotations

import copy
import os
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.learning.cloud_edge.messages import pack, unpack
from headway.learning.cloud_edge.settings import Settings
from headway.learning.cloud_edge.shared import share_statistics
from headway.learning.cloud_edge.steps import NotFinite, Steps, under


class Lost(RuntimeError):
    """A process died, or did not answer in time; the step may be tried again with new ones."""


class Kit:
    """What every process is given when it starts.

    Raises:
        ValueError: it cannot be given to another process.
    """

    def __init__(
        self, models: tuple[nn.Module, nn.Module], settings: Settings, processes: int, patience: float
    ) -> None:
        self._models = models
        # without their numbers: multiprocessing needs an open file for each tensor, and there may be hundreds
        self.skeletons, self.settings = tuple(_emptied(model) for model in models), settings
        self.processes, self.patience = processes, patience
        self.threads = max(1, torch.get_num_threads() // processes)
        try:
            ForkingPickler.dumps((self.skeletons, settings))
        except Exception as error:  # whatever a module makes of being asked
            raise ValueError(
                f"models and transforms must be picklable to be given to {processes} processes ({error}); name functions at the top of "
                "a module instead of lambdas, or use processes=1"
            ) from error

    def values(self) -> bytes:
        """The numbers of the skeletons."""
        parts = {f"{i}/{k}": t.detach().clone() for i, model in enumerate(self._models) for k, t in _numbered(model)}
        return pack(parts, {"devices": [str(next(model.parameters()).device) for model in self._models]})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_models"}


def _numbered(model: nn.Module) -> list[tuple[int, Tensor]]:
    return list(enumerate([*model.parameters(), *model.buffers()]))


def _emptied(model: nn.Module) -> nn.Module:
    """A copy whose tensors hold nothing."""
    empty: dict[int, Any] = {}
    for _, t in _numbered(model):
        nothing = torch.empty(0, dtype=t.dtype)
        empty[id(t)] = nn.Parameter(nothing, False) if isinstance(t, nn.Parameter) else nothing
    return copy.deepcopy(model, empty)


def _filled(skeletons: tuple[nn.Module, ...], body: bytes) -> list[nn.Module]:
    tensors, words = unpack(body)
    for i, (model, device) in enumerate(zip(skeletons, words["devices"], strict=True)):
        for k, t in _numbered(model):
            t.data = tensors[f"{i}/{k}"].to(device)
    return list(skeletons)


class Member:
    """A process, seen from the server."""

    def __init__(self, context: Any, kit: Kit, rank: int, meet: str) -> None:
        self.rank, self.name = rank, f"process {rank + 1} of {kit.processes}"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(kit, rank, theirs, meet), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def obituary(self) -> str:
        """How it ended; empty while it lives."""
        code = self.process.exitcode
        if code is None:
            return ""
        return f"{self.name} " + (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}")

    def send(self, body: bytes) -> None:
        """Gives it a message."""
        try:
            self.pipe.send_bytes(body)
        except OSError:
            raise self._gone() from None

    def receive(self) -> bytes:
        """Its answer; Lost where it has ended."""
        try:
            return self.pipe.recv_bytes()
        except (EOFError, OSError):
            raise self._gone() from None

    def _gone(self) -> Lost:
        self.process.join(2.0)
        return Lost(self.obituary or f"{self.name} has closed its pipe")

    def end(self) -> None:
        """Ends it, whatever it is doing."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


# in the process itself


def _run(kit: Kit, rank: int, pipe: Connection, meet: str) -> None:
    """Answers messages until the server's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business
    torch.set_num_threads(kit.threads)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # what is said between them stays on this machine
    steps: Steps | None = None
    while True:
        try:
            body = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            if steps is None:
                steps = _joined(kit, rank, body, meet)
                answer = pack({}, {})
            else:
                answer = _stepped(steps, rank, body)
        except NotFinite as error:
            answer = pack({}, {"error": str(error)})
        except Exception as error:
            told, group = f"{type(error).__name__}: {error}", "gloo" in str(error)
            pipe.send_bytes(pack({}, {"fatal": "" if group else told, "of_group": told if group else ""}))
            return  # which the others notice, wherever they are in the step
        pipe.send_bytes(answer)


def _joined(kit: Kit, rank: int, body: bytes, meet: str) -> Steps:
    models = [share_statistics(model) for model in _filled(kit.skeletons, body)]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meet}",
        rank=rank,
        world_size=kit.processes,
        timeout=timedelta(seconds=kit.patience),
    )
    return Steps(models[0], models[1], 1.0, kit.settings, together=True)


def _stepped(steps: Steps, rank: int, body: bytes) -> bytes:
    tensors, words = unpack(body)
    steps.e_max0 = steps.loss.e_max = float(words["e_max0"])
    steps.restore(under(tensors, "state"), bool(words["unseen"]))
    steps.step(under(tensors, "fresh") or None, under(tensors, "union"))
    return pack(steps.tensors() if rank == 0 else {}, {})
