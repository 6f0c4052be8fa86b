"""Keeps in a model's state where its norms sit, because the same weights mean another function in another place.

Moving norms leaves the names of all parameters as they are, so weights trained elsewhere fit and load without a word. A stack whose
layers were moved therefore carries a small buffer, ``norm_placement``, and compares it with what is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from headway.surgery import Edit

KEY = "norm_placement"


class PlacementMismatchWarning(UserWarning):
    """Weights trained under one placement of the norms were loaded into a model that has another."""


class RecordPlacement(Edit):
    """Notes the placement of every layer in the state of the module that owns them, and checks loaded states against it."""

    def __init__(self, owner: nn.Module, placements: Sequence[str], name: str) -> None:
        self.owner, self.name = owner, f"{name}.{KEY}" if name else KEY
        self.before = owner._buffers.get(KEY)
        device = next((p.device for p in owner.parameters()), None)
        # letters as bytes, because formats such as safetensors keep only tensors
        self.after = torch.tensor(list(",".join(placements).encode()), dtype=torch.uint8, device=device)
        self.check: Any = None

    def do(self) -> None:
        self.owner.register_buffer(KEY, self.after)
        if self.before is None:
            self.check = self.owner.register_load_state_dict_pre_hook(check)

    def undo(self) -> None:
        if self.before is not None:
            self.owner._buffers[KEY] = self.before
            return
        delattr(self.owner, KEY)
        self.check.remove()

    def describe(self) -> tuple[str, str]:
        return "not recorded" if self.before is None else told(self.before), told(self.after)


def told(record: torch.Tensor) -> str:
    """The placements of a record in words: "post in 3 layers, pre in 9"."""
    names = bytes(record.tolist()).decode().split(",")
    counts = [f"{name} in {names.count(name)}" for name in dict.fromkeys(names)]
    return ", ".join([f"{counts[0]} layers", *counts[1:]])


def check(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before a state is loaded: warns where it was saved under another placement, or says nothing of it."""
    here, saved = module._buffers[KEY], state.get(prefix + KEY)
    if here is None or not any(key.startswith(prefix) for key in state):
        return
    if saved is not None and saved.shape == here.shape and torch.equal(saved.to(here.device), here):
        return
    trained = (
        "carry no record of where their norms sat, so they come from a model whose norms were not moved"
        if saved is None
        else f"were trained with the norms placed {told(saved)}"
    )
    warnings.warn(
        f"the weights {trained}; this {type(module).__name__} has its norms placed {told(here)}: the same numbers now mean "
        "another function and need training",
        PlacementMismatchWarning,
        stacklevel=2,
    )
    state[prefix + KEY] = here
