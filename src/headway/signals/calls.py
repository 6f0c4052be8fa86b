"""One call of one module: what is measured of its output, kept as a few numbers on the tensor's own device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.moments import moments
from headway.signals import statistics
from headway.signals.layout import Layouts
from headway.signals.points import Point


@dataclass(frozen=True)
class Settings:
    """What is measured and how; the arguments of ``probe`` of the same names."""

    max_samples: int = 64
    max_features: int | None = 65536
    centered: bool = False
    backward: bool = True
    batch_dim: int | Callable[[str, nn.Module, Tensor], int] = 0
    channel_dim: int | None = None
    select: Callable[[str, Any], Any] | None = None
    grad_scale: Any = None
    saved: bool = True
    sync: bool = False
    seed: int = 0


@dataclass(eq=False)
class Call:
    """One call of one module: its numbers, still on the device.

    ``scalars`` and ``channels`` are those of :func:`headway.kernels.moments.moments`, or ``channels`` their summary
    [var, std]; ``gram`` holds the inner products of the samples, ``tokens`` the likeness of tokens.
    """

    point: Point
    shape: tuple[int, ...]
    dtype: torch.dtype
    scalars: Tensor
    channels: Tensor
    gram: Tensor | None
    tokens: Tensor | None
    batch: int
    note: str
    keeps_shape: bool = False
    grad_norm: Tensor | None = None
    grad_size: int = 1
    saved: int = 0

    def on_gradient(self, grad: Tensor) -> None:
        """Takes the norm of the gradient with respect to this call's output."""
        with torch.no_grad():
            self.grad_norm, self.grad_size = norm(grad, wide=self.dtype is torch.float64), grad.numel()


def norm(x: Tensor, wide: bool = False) -> Tensor:
    """|x|, summed in float32 at least, in float64 where asked for or where ``x`` is."""
    kind = torch.float64 if wide or x.dtype is torch.float64 else torch.float32
    return torch.linalg.vector_norm(x.detach(), dtype=kind)


def measure(point: Point, tensor: Tensor, settings: Settings, layouts: Layouts, same: Call | None = None) -> Call:
    """The statistics of an output, taken now; ``same`` is the call that put out this very tensor before, if one did."""
    batch_axis = layouts.batch(point.name, point.module, tensor)
    channel = layouts.channel(point.module, tensor) if tensor.dim() else 0
    shape = tuple(tensor.shape)
    if same is not None:
        # a container that hands on what its last module made
        numbers = same.scalars, same.channels, same.gram, same.tokens, same.batch, same.note
        return Call(point, shape, tensor.dtype, *numbers)
    x, notes, gram, tokens = tensor.detach(), [], None, None
    scalars, channels = moments(x if x.dim() else x[None], channel)
    batch = x.shape[batch_axis] if x.dim() > 1 else 0
    if batch >= 2:
        # on other devices reading the largest value now would wait for the device, once a layer
        largest = float(scalars[5]) if x.device.type == "cpu" else 1.0
        gram = statistics.gram(
            x, batch_axis, settings.max_samples, settings.max_features, settings.centered, settings.seed, largest
        )
        if settings.max_features is not None and x.numel() // batch > settings.max_features:
            notes.append(f"cos from {settings.max_features} of {x.numel() // batch} features")
        if batch > settings.max_samples:
            notes.append(f"cos from {settings.max_samples} of {batch} samples")
    else:
        notes.append("no batch axis of two or more samples: cos and stable rank are not defined")
    if x.dim() == 3 and channel == 2:
        tokens = statistics.between_tokens(x.movedim(batch_axis, 0), settings.max_samples)
    if not settings.sync:
        channels = channel_summary(channels)
    return Call(point, shape, tensor.dtype, scalars, channels, gram, tokens, batch, "; ".join(notes))


def channel_summary(channels: Tensor) -> Tensor:
    """[var, std] averaged over channels, unbiased, from (count, mean, spread) of every channel."""
    counts, _, spread = channels.unbind()
    # a channel with fewer than two entries has no spread, and is not counted
    var = spread / (counts - 1).clamp_(min=1)
    return torch.stack([var, var.sqrt()]).sum(1) / (counts > 1).sum()
