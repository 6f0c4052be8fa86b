"""Who does a run: a process names itself so that others can tell whether it still lives."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

STALE_AFTER = 120.0
"""Seconds without a heartbeat after which a claim that cannot be looked up counts as given up."""


@lru_cache(maxsize=1)
def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}/{boot.read_text().strip()[:8] if boot.exists() else ''}"


def _started(pid: int) -> str | None:
    """When a process began, so that a pid used again is not taken for the old one; None when there is no such process."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return f"{process.create_time():.1f}"
    except psutil.Error:
        return None


_ACTIVE: set[str] = set()


@contextlib.contextmanager
def claimant() -> Iterator[str]:
    """A name for this process and this one call: machine, pid, start time and a random part. Claims made under it count as
    given up once the block is left, however it is left."""
    name = "|".join((_machine(), str(os.getpid()), _started(os.getpid()) or "", uuid.uuid4().hex[:8]))
    _ACTIVE.add(name)
    try:
        yield name
    finally:
        _ACTIVE.discard(name)


def gone(claimed_by: str, heartbeat: float) -> bool:
    """Whether whoever made this claim has died (looked up on the same machine) or has been silent for too long."""
    machine, pid, started, _ = claimed_by.split("|")
    if machine == _machine():
        if _started(int(pid)) != started:
            return True
        if int(pid) == os.getpid() and claimed_by not in _ACTIVE:
            return True
    return time.time() - heartbeat > STALE_AFTER
