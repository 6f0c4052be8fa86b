"""What stands beside the numbers: the machine, the versions, and the memory a run takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from headway.measure import PeakMemory


@lru_cache(maxsize=1)
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The computer: processor, cores, threads in use, memory in bytes, system, and the accelerator if one is used."""
    import psutil

    kind = torch.device(device)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type,
    }


def versions() -> dict[str, str]:
    """Python and the packages that matter here."""
    found = {"python": sys.version.split()[0]}
    for package in ("headway", "torch", "numpy", "accelerate", "transformers", "scikit-learn", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def settle(device: torch.device) -> int:
    """Bytes in use: on a GPU what the allocator has given out, else the resident memory of this process, after giving free
    memory back to the system (memory that an earlier run freed and the allocator kept would hide what the next one takes)."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


class TrainingMemory:
    """Peak memory of training above the level before the model was built, sampled over a few early steps.

    Call :meth:`before_step` before each step. ``peak`` is None until the sampled steps are over.
    """

    STEPS = range(2, 8)
    """The steps (from 0) sampled, after a warm-up; sampling slows them a little, so their times are not quoted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None
        self._level = settle(device)
        self._held = 0
        self._count = 0
        self._sampler: PeakMemory | None = None

    def before_step(self) -> None:
        """Starts and ends the sampling at the right steps."""
        if self._count == self.STEPS.start:
            self._held = settle(self.device) - self._level
            self._sampler = PeakMemory(self.device)
            self._sampler.__enter__()
        elif self._count == self.STEPS.stop:
            self.end()
        self._count += 1

    def end(self) -> None:
        """Ends the sampling, if it goes on."""
        if self._sampler is not None:
            self._sampler.__exit__()
            self.peak = self._held + self._sampler.bytes
            self._sampler = None

    @property
    def method(self) -> str:
        """How it is measured."""
        what = "the GPU allocator's peak" if self.device.type == "cuda" else "resident memory of the process"
        return f"{what} above its level before the model was built, over training steps {self.STEPS.start + 1}-{self.STEPS.stop}"
