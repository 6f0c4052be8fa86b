"""The cloud's state on disk: one safetensors file for each adapted copy, and the epoch as JSON. A file is whole or not there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from headway._files import write_bytes
from headway.learning.cloud_edge.messages import BadMessage, pack, unpack

log = logging.getLogger(__name__)


class StateFolder:
    """Where a server keeps what it must not forget.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"state_dir {self.path} cannot be made ({error.strerror}); give another path") from None

    def next_epoch(self) -> int:
        """A number above that of every earlier start, also where the folder was lost in between."""
        file = self.path / "epoch.json"
        before = 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = int(json.loads(file.read_text())["epoch"])
        epoch = max(before + 1, new_epoch())
        write_whole(file, json.dumps({"epoch": epoch}).encode())
        return epoch

    def save(self, name: str, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """Replaces what was kept under this name."""
        write_whole(self.path / f"{name}.safetensors", pack(tensors, words))

    def load(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
        """All that is kept; a damaged file is put aside and told of."""
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                yield file.stem, *unpack(file.read_bytes())
            except BadMessage as error:
                aside = file.with_suffix(".damaged")
                os.replace(file, aside)
                log.error("%s is damaged and was put aside as %s: %s", file, aside.name, error)


def new_epoch() -> int:
    """An epoch for a server without a folder: seconds of the clock, so that a later start has a larger one."""
    return int(time.time())


def write_whole(file: Path, content: bytes) -> None:
    """Writes a new file, flushes it to the disk, and puts it in the place of the old one."""
    write_bytes(file, content)
    with contextlib.suppress(OSError):  # systems that cannot open a folder do without
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
