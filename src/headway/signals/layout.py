"""Which tensor of a module's output is the signal, and which of its axes count samples and channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_PREFERRED = ("last_hidden_state", "logits", "hidden_states", "x", "loss")


def first_tensor(output: Any) -> Tensor | None:
    """The first floating tensor in an output: a tensor, a tuple, a mapping, a dataclass or an object that holds ``x``."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and not output.is_sparse else None
    if isinstance(output, Mapping):
        keys = [key for key in _PREFERRED if key in output] or list(output)
        return next((found for key in keys if (found := first_tensor(output[key])) is not None), None)
    if isinstance(output, list | tuple):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        values = [getattr(output, f.name) for f in dataclasses.fields(output)]
        return first_tensor(values)
    inner = getattr(output, "x", None)
    return first_tensor(inner) if isinstance(inner, Tensor) else None


class Layouts:
    """Remembers which axis holds the channels for every shape seen, so that an activation follows the layer before it."""

    def __init__(self, batch_dim: Any = 0, channel_dim: int | None = None) -> None:
        self.batch_dim: Any = batch_dim
        self.channel_dim = channel_dim
        self._seen: dict[tuple[int, ...], int] = {}

    def channel(self, module: nn.Module, x: Tensor) -> int:
        """The channel axis of the output ``x`` of ``module``: 1 after a convolution, the last one after a linear layer."""
        if self.channel_dim is not None and -x.dim() <= self.channel_dim < x.dim():
            return self.channel_dim % x.dim()
        if x.dim() <= 2:
            return x.dim() - 1
        key = tuple(x.shape)
        if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm):
            axis = 1
        elif isinstance(module, nn.Linear | nn.LayerNorm | nn.RNNBase | nn.MultiheadAttention):
            axis = x.dim() - 1
        else:
            return self._seen.get(key, 1 if x.dim() > 3 else x.dim() - 1)
        self._seen[key] = axis
        return axis

    def batch(self, name: str, module: nn.Module, x: Tensor) -> int:
        """The axis that counts samples: ``batch_dim``, or 1 for sequence-first recurrent and attention layers."""
        if callable(self.batch_dim):
            chosen: Any = self.batch_dim(name, module, x)
            return int(chosen) % max(1, x.dim())
        if self.batch_dim == 0 and getattr(module, "batch_first", True) is False and x.dim() == 3:
            return 1
        return self.batch_dim if self.batch_dim < x.dim() else 0
