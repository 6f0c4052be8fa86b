"""Counts what autograd keeps for backward: each storage once, parameters and buffers not, and under which module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Open:
    """A module that is running: what it has saved so far."""

    module: nn.Module
    saved: int = 0


class SavedBytes:
    """Between :meth:`start` and :meth:`stop`, ``total`` grows by every storage saved for backward.

    :meth:`enter` and :meth:`leave` bracket the call of a module; ``leave`` answers what was saved inside.
    """

    def __init__(self) -> None:
        self.total = 0
        self._storages: set[int] = set()
        self._open: list[_Open] = []
        self._hooks: Any = None

    def start(self, model: nn.Module) -> None:
        """Counts from here on; what the model itself holds counts as kept already."""
        for tensor in [*model.parameters(), *model.buffers()]:
            if not isinstance(tensor, nn.UninitializedParameter):
                self._storages.add(_storage_key(tensor))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()

    def stop(self) -> None:
        """Counts no longer; calling it again does nothing."""
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(None, None, None)

    def enter(self, module: nn.Module) -> None:
        """A call of this module begins."""
        self._open.append(_Open(module))

    def leave(self, module: nn.Module) -> int:
        """What was saved inside the module, its own modules included; those left by an exception are closed with it."""
        saved = 0
        while self._open:
            top = self._open.pop()
            saved += top.saved
            if top.module is module:
                break
        if self._open:
            self._open[-1].saved += saved
        return saved

    def forget_open(self) -> None:
        """No module is running any more."""
        self._open = []

    def _pack(self, tensor: Tensor) -> Any:
        key = _storage_key(tensor)
        if key not in self._storages:
            self._storages.add(key)
            size = tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0
            self.total += size
            if self._open:
                self._open[-1].saved += size
        return tensor.detach(), tensor._version


def _unpack(packed: Any) -> Tensor:
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
