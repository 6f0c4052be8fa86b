"""Byte-level language models on real text: the source of Python's standard library, or your own files.

A sample is ``length`` bytes and the ``length`` that follow one further on; the measure is the held-out loss in nats a byte.
"""

from __future__ import annotations

import math
import os
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.batches import Batches
from headway.tasks.files import DataError
from headway.tasks.task import Task
from headway.tasks.text_files import read_text

_TRAIN_CAP, _HELD_OUT_CAP = 4_000_000, 400_000

# Tests, vendored or generated tables, and what distributions leave out or rewrite: text that differs between machines.
_LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip", "venv",
    "distutils", "pydoc_data", "encodings", "lib-dynload", "__pycache__", "__phello__",
}  # fmt: skip


@lru_cache(maxsize=1)
def stdlib_files(root: str | None = None) -> dict[str, bytes]:
    """The standard library's own source files by relative name, sorted; independent of where Python is installed.

    Raises:
        DataError: this Python keeps its library in no folder (a frozen or zipped one).
    """
    folder = Path(root or sysconfig.get_path("stdlib"))
    found: dict[str, bytes] = {}
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith("config-"))
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize")):
                path = Path(where) / name
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    found = {name: found[name] for name in sorted(found) if found[name]}
    if len(found) < 20:
        raise DataError(
            f"{folder} holds {len(found)} Python files; the standard library as a folder of sources was expected"
        )
    return found


def split_files(files: Mapping[str, bytes], every: int = 10) -> tuple[bytes, bytes]:
    """Training text and held-out text. Whole files are held out, about one in ``every``, chosen by a checksum of their names,
    so that a file missing on one machine moves no other; a single file gives its last tenth."""
    if len(files) == 1:
        text = next(iter(files.values()))
        cut = len(text) - len(text) // every
        return text[:cut], text[cut:]
    order = sorted(files, key=lambda name: (zlib.crc32(name.encode()), name))
    held_out = [name for name in order if zlib.crc32(name.encode()[::-1]) % every == 0] or order[:1]
    train = [name for name in order if name not in set(held_out)]
    return (
        b"".join(files[name] for name in train)[:_TRAIN_CAP],
        b"".join(files[name] for name in held_out)[:_HELD_OUT_CAP],
    )


class ByteText(Task):
    """A decoder-only transformer over bytes.

    Args:
        depth, dim, heads: of the transformer.
        length: bytes a sample.
        placement, norm: of the baseline transformer ("pre" with "layernorm").
        dropout: inside the blocks.
        learning_rate: of AdamW at its highest.
        held_out: how many samples the measure is taken over.
    """

    name = "text"
    metric = "loss"
    batch_size = 16
    budget = "150 steps"

    def __init__(
        self,
        depth: int = 6,
        dim: int = 96,
        heads: int = 4,
        length: int = 64,
        placement: str = "pre",
        norm: str = "layernorm",
        dropout: float = 0.0,
        learning_rate: float = 3e-3,
        held_out: int = 128,
    ) -> None:
        if dim % heads:
            raise ValueError(f"dim={dim} cannot be split into heads={heads}; choose a multiple")
        if min(depth, dim, heads, length, held_out) < 1:
            raise ValueError(f"{self.name} needs depth, dim, heads, length and held_out of at least 1")
        self.depth, self.dim, self.heads, self.length = depth, dim, heads, length
        self.placement, self.norm, self.dropout = placement, norm, dropout
        self.learning_rate, self.held_out = learning_rate, held_out
        self._texts: tuple[Tensor, Tensor] | None = None

    def files(self) -> Mapping[str, bytes]:
        """The text, by file."""
        raise NotImplementedError

    def texts(self) -> tuple[Tensor, Tensor]:
        """Training and held-out bytes, uint8.

        Raises:
            DataError: less text than one sample needs.
        """
        if self._texts is None:
            parts = split_files(self.files())
            for part, what in zip(parts, ("training", "held-out"), strict=True):
                if len(part) <= self.length:
                    raise DataError(
                        f"{self.name} has {len(part)} bytes of {what} text; length={self.length} needs more: give longer text"
                    )
            self._texts = tuple(torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in parts)  # type: ignore
        return self._texts  # type: ignore[return-value]

    def model(self, seed: int) -> nn.Module:
        from headway.residual.transformer import TransformerDecoder

        return TransformerDecoder(
            256,
            self.dim,
            self.depth,
            self.heads,
            placement=self.placement,  # type: ignore[arg-type]
            norm=self.norm,  # type: ignore[arg-type]
            max_length=self.length,
            dropout=self.dropout,
        )

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Tokens (batch_size, length + 1), int64."""
        text = self.texts()[0]
        offsets = torch.arange(self.length + 1)
        return Batches(
            len(text) - self.length,
            batch_size,
            seed,
            lambda starts: text[starts[:, None] + offsets].long(),
            epochs=False,
        )

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``loss`` in nats a byte and ``bits_per_byte``, over samples spread evenly through the held-out text."""
        text = self.texts()[1]
        starts = torch.linspace(0, len(text) - self.length - 1, self.held_out).long()
        samples = text[starts[:, None] + torch.arange(self.length + 1)].long()
        device = next(model.parameters()).device
        total = sum(float(self.loss(model, part.to(device))) * len(part) for part in samples.split(64))
        nats = total / len(samples)
        return {"loss": nats, "bits_per_byte": nats / math.log(2)}

    def optimizer(self, params) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)


class StdlibText(ByteText):
    """The source text of the installed Python's standard library: 4 MB to train on, whole files held out."""

    name = "stdlib-text"

    def files(self) -> Mapping[str, bytes]:
        return stdlib_files()


class TextFiles(ByteText):
    """Your own text: a file, or a folder of them (see :func:`headway.tasks.read_text`)."""

    name = "text"

    def __init__(self, path: str, **settings) -> None:
        super().__init__(**settings)
        self.path = str(path)

    def files(self) -> Mapping[str, bytes]:
        return read_text(self.path)
