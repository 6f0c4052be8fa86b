"""What a Pre-RMSNorm conversion has to know of a model: what writes to its residual stream, what reads it, through which norms.

All by qualified name, so that the answer is plain data. :mod:`headway.residual.described` reads it off a known family,
:mod:`headway.residual.foldable` off the traced graph of any other model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.norms.layer import LayerNorm


class NotPreNormError(ValueError):
    """The model is no Pre-LN transformer whose stream can be recentred; the message names the first part that is in the way."""


@dataclass(frozen=True)
class Place:
    """A tensor that writes to the stream.

    Attributes:
        owner: the module that holds it.
        attribute: the name of the parameter or buffer in that module.
        axis: the axis along which the channels of the stream lie.
        gate: the parameter of a per-channel gain between this writer and the stream (LayerScale): its owner and name, or None.
        after: the last module between the writer and the stream that takes the mean away from zero again, a dropout with a rate
            above zero or a gain; in training it is what leaves this module that has to be recentred.
    """

    owner: str
    attribute: str
    axis: int
    gate: tuple[str, str] | None = None
    after: str | None = None

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


@dataclass(frozen=True)
class Reader:
    """A linear map that reads a norm's output.

    Attributes:
        owner: the module that holds it.
        weight, bias: the names of its parameters in that module; no name for a bias that it lacks and cannot be given.
        axis: the axis of the weight along which its inputs lie; its outputs lie along the other.
        rows: the outputs that read this norm, (first, end), where the others read something else; None for all of them.
    """

    owner: str
    weight: str = "weight"
    bias: str = "bias"
    axis: int = 1
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class ReadingNorm:
    """A layer norm that reads the stream; ``readers`` is None where not every reader of its output is a linear map."""

    name: str
    readers: tuple[Reader, ...] | None = None


@dataclass(frozen=True)
class Stream:
    """The residual streams of a model.

    Attributes:
        norms: the layer norms that read a stream.
        writers: the tensors to be recentred.
        entries: modules into which a stream enters as their first argument, from where nothing could be recentred.
        outputs: modules whose output enters a stream and has to be recentred itself (the norm of an embedding).
        skipped: norms that stay, each with the reason.
    """

    norms: tuple[ReadingNorm, ...]
    writers: tuple[Place, ...]
    entries: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's linear layer, which keeps its weight as (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def linear_reader(model: nn.Module, name: str) -> Reader | None:
    """How a linear layer, or an ``nn.MultiheadAttention`` that attends to its own input, reads; None for any other module."""
    module: Any = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        bias = "" if module.in_proj_bias is None else "in_proj_bias"
        return Reader(name, "in_proj_weight", bias) if module.in_proj_weight is not None else None
    if isinstance(module, nn.Linear):
        return Reader(name)
    return Reader(name, axis=0) if is_conv1d(module) else None


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module computes the layer norm over its last axis.

    Subclasses of other libraries (timm has one) are recognised by what they compute on a small random input.
    """
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return False
    if type(module) is nn.LayerNorm or type(module) is LayerNorm:
        return getattr(module, "dims", None) is None
    random = torch.Generator().manual_seed(0)
    twin, shape = copy.copy(module), module.normalized_shape
    held = {key: torch.randn(shape, generator=random) for key, old in module._parameters.items() if old is not None}
    twin.__dict__["_parameters"] = {key: held.get(key) for key in module._parameters}
    x = 3 + torch.randn(2, 5, *shape, generator=random)
    try:
        with torch.no_grad():
            theirs = twin.forward(x)
    except Exception:
        return False
    same = F.layer_norm(x, shape, held.get("weight"), held.get("bias"), module.eps)
    return isinstance(theirs, Tensor) and theirs.shape == x.shape and torch.allclose(theirs, same, rtol=1e-4, atol=1e-5)
