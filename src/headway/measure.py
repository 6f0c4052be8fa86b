"""Ratios that hold on a noisy machine: both sides in one run, taken in turn, medians quoted, the physical limit beside them."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Paired:
    """Times of two calls taken in turn.

    Attributes:
        ours, theirs: median seconds a call.
        ratio: median over the rounds of theirs / ours (how many times faster ours is).
        low, high: quartiles of that ratio.
        rounds: how many pairs were measured.
    """

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int


def _once(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


_SHORT, _SETTLING = 5e-3, 5


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], seconds: float = 2.0, min_rounds: int = 7
) -> Paired:
    """Times ``ours`` and ``theirs`` in turn (A B A B ...) for about ``seconds`` and compares them pair by pair.

    Each round repeats the call often enough to last about a millisecond, after a warm-up of both. Calls of a few milliseconds or
    less are first made a few times untimed: what the other one has left in the caches would otherwise be measured with them, and
    for tensors about as large as a cache that is up to twice the time.
    """
    for call in (ours, theirs):
        call()
        call()
    slowest = max(_once(ours, 1), _once(theirs, 1), 1e-9)
    repeats = max(1, round(1e-3 / slowest))
    settling = _SETTLING if slowest < _SHORT else 0
    a: list[float] = []
    b: list[float] = []
    enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(a) < min_rounds or (time.perf_counter() < end and len(a) < 2000):
            for call, times in ((ours, a), (theirs, b)):
                for _ in range(settling):
                    call()
                times.append(_once(call, repeats))
    finally:
        if enabled:
            gc.enable()
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    quarter = len(ratios) // 4
    return Paired(
        statistics.median(a),
        statistics.median(b),
        statistics.median(ratios),
        ratios[quarter],
        ratios[-1 - quarter],
        len(a),
    )


def seconds(call: Callable[[], object], budget: float = 1.0, min_rounds: int = 5) -> float:
    """Median seconds of one call, after a warm-up."""
    return paired(call, lambda: None, budget, min_rounds).ours


def copy_bandwidth(nbytes: int, budget: float = 0.5) -> float:
    """Bytes a second (read plus written) that ``dst.copy_(src)`` moves for tensors of ``nbytes``: the limit of any
    operation that reads and writes its data once."""
    source = torch.ones(max(1, nbytes // 4))
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), budget)


class PeakMemory:
    """Context manager: how far resident memory rose above its level at entry, in bytes (CPU), or by the allocator's own peak on
    a GPU. Linux keeps the peak itself; elsewhere it is sampled every ``interval`` seconds.

    >>> with PeakMemory() as peak:
    ...     step()
    >>> peak.bytes
    """

    _open: ClassVar[list[PeakMemory]] = []

    def __init__(self, device: str | torch.device = "cpu", interval: float = 1e-3) -> None:
        self.device = torch.device(device)
        self.interval = interval
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        import psutil

        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._stop: threading.Event | None = None
        for outer in self._open:
            outer._highest = max(outer._highest, _kernel_peak())
        self._kernel = _reset_kernel_peak()
        if self._kernel:
            self._open.append(self)
            return self
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._stop,), daemon=True)
        self._thread.start()
        return self

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(self.interval):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
            return
        if self._kernel:
            self._open.remove(self)
            self._highest = max(self._highest, _kernel_peak())
        elif self._stop is not None:
            self._stop.set()
            self._thread.join()
        self.bytes = max(self._highest, self._process.memory_info().rss) - self._start


def _reset_kernel_peak() -> bool:
    """Sets the kernel's record of this process's highest resident memory to the present; False where there is no such record."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _kernel_peak() > 0
    except OSError:
        return False


def _kernel_peak() -> int:
    """The highest resident memory since the last reset, in bytes; 0 where the system does not tell."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
