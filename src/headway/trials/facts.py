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


def settle() -> int:
    """Gives free memory back to the system and answers the resident memory of this process in bytes.

    Without it, memory that an earlier run has freed, and the allocator has kept, would hide what the next run takes.
    """
    import psutil

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss
