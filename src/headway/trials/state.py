"""All that a training run is made of, as bytes: what has to be there so that it goes on bit for bit as if never stopped."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch
from torch import nn


def random_state() -> dict[str, Any]:
    """The state of every random generator a training step may draw from."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), int(place), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts every generator back to a recorded state."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class undisturbed:
    """Context manager: whatever is drawn at random inside leaves no trace outside."""

    def __enter__(self) -> None:
        self._state = random_state()

    def __exit__(self, *_: object) -> None:
        set_random_state(self._state)


class evaluating:
    """Context manager: the model in evaluation mode, without gradients; every module's own mode is put back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._gradients = torch.no_grad()
        self._random = undisturbed()
        self._random.__enter__()
        self._gradients.__enter__()
        return self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
        self._gradients.__exit__(None, None, None)
        self._random.__exit__()


def seed_everything(seed: int) -> None:
    """Seeds every generator a task may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pack(content: dict[str, Any]) -> bytes:
    """A checkpoint's content as bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def unpack(data: bytes, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The inverse of :func:`pack`. Loads plain data and tensors only, never code."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


def readable(data: bytes) -> bool:
    """Whether a checkpoint survived whole: a disk may lose part of a file that was written well."""
    try:
        unpack(data)
    except Exception:
        return False
    return True
