"""Runs the residual branches of one layer with their norms in any place; the seam between two branches is one pass over memory.

    pre, peri, layernorm_scaling     x <- x + y,  u <- N(x)      fused: the addition, and the norm that reads its sum
    post, deepnorm, output           as they are: nobody reads the sum of a post-norm again, and a fused one would have the
                                     backward pass add a gradient of zeros

What each place means stands in :mod:`headway.residual.placements`; here it is done faster for large streams on the CPU. Nothing
is fused away that somebody listens to by a hook, under autocast (whose types the plain modules settle), or for a norm of an unknown class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels.library import load
from headway.kernels.norms import add_norm, layer_norm, norm_add_norm, rms_norm
from headway.norms.layer import LayerNorm
from headway.norms.rms import RMSNorm
from headway.residual.placements import residual

_NATIVE = load("norms")
# numbers in a stream from which the fused seam is faster: below, everything lies in the nearest caches and calls are what costs
SMALL = 1 << 17
_READS_NORMED = ("pre", "peri", "layernorm_scaling")
# transformers' copies of one class: in half precision they round before the gain, which the kernels do not
_LLAMA_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")


class Branch(NamedTuple):
    """One residual branch: its norm, what it computes, the norm of its output (peri) and the dropout after that."""

    norm: nn.Module
    function: Callable[[Tensor], Tensor]
    output_norm: nn.Module | None = None
    drop: Callable[[Tensor], Tensor] | None = None

    def dropped(self, y: Tensor) -> Tensor:
        return y if self.drop is None else self.drop(y)

    def added(self, u: Tensor) -> Tensor:
        """The term that is added to the stream; dropout comes last, for an output norm would rescale the dropped vector."""
        y = self.function(u)
        return self.dropped(y if self.output_norm is None else self.output_norm(y))

    def placed(self, x: Tensor, placement: str, index: int, num_layers: int) -> Tensor:
        """The stream after this branch alone, by the plain equations."""
        if (outer := self.output_norm) is None:
            return residual(x, self.added, self.norm, placement, None, index, num_layers)
        return residual(x, self.function, self.norm, placement, lambda y: self.dropped(outer(y)), index, num_layers)


class Kernel(NamedTuple):
    """A norm over the last axis, as the fused kernels take it."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


def kernel_of(norm: Any, x: Tensor, factor: float = 1.0) -> Kernel | None:
    """How a kernel computes ``factor * norm(x)``; None for any other class or axes, and for a norm that has hooks."""
    heard = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    if heard or "forward" in norm.__dict__:
        return None
    kind, full = type(norm), x.dtype in (torch.float32, torch.float64)
    if kind is LayerNorm or kind is nn.LayerNorm:
        fits = len(norm.normalized_shape) == 1 and getattr(norm, "dims", None) is None
        found = Kernel(norm.weight, norm.bias, norm.eps, False)
    elif kind is RMSNorm and norm.eps is not None:
        fits = len(norm.normalized_shape) == 1 and not norm.gain_offset and (full or not norm.cast_before_gain)
        found = Kernel(norm.weight, norm.bias, norm.eps, True)
    elif kind.__name__ in _LLAMA_NORMS:
        fits, found = full, Kernel(norm.weight, None, norm.variance_epsilon, True)
    else:
        return None
    if not fits or factor == 1:
        return found if fits else None
    if found.weight is None:
        return None
    # the factor goes into the gain, which saves a pass over the stream
    return found._replace(weight=found.weight * factor, bias=None if found.bias is None else found.bias * factor)


def run(x: Tensor, branches: Sequence[Branch], placement: str, index: int, num_layers: int) -> Tensor:
    """The stream after all branches of a layer: (..., d) -> (..., d).

    ``index`` and ``num_layers`` are the layer's global place, for "layernorm_scaling" and "deepnorm".
    """
    fuses = placement in _READS_NORMED and _NATIVE and x.is_cpu and x.numel() >= SMALL
    if not fuses or torch.is_autocast_enabled("cpu"):
        for branch in branches:
            x = branch.placed(x, placement, index, num_layers)
        return x
    factor = (index + 1) ** -0.5 if placement == "layernorm_scaling" else 1.0
    u: Tensor | None = None
    for branch, following in zip(branches, [*branches[1:], None], strict=True):
        if u is None:
            u = _read(branch.norm, x, factor)
        seam = None if following is None else kernel_of(following.norm, x, factor)
        x, u = _across(branch, x, u, seam)
    return x


def _read(norm: nn.Module, x: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return norm(x)
    found = kernel_of(norm, x, factor)
    if found is None:
        return norm(x) * factor
    w, b, eps, rms = found
    return rms_norm(x, x.shape[-1], w, b, eps) if rms else layer_norm(x, x.shape[-1], w, b, eps)


def _across(branch: Branch, x: Tensor, u: Tensor, seam: Kernel | None) -> tuple[Tensor, Tensor | None]:
    """The stream after a branch, and what the next norm makes of it (None where that norm is left to itself)."""
    if seam is None:
        return x + branch.added(u), None
    outer, undropped = branch.output_norm, branch.drop is None or isinstance(branch.drop, nn.Identity)
    out = kernel_of(outer, x) if outer is not None and undropped else None
    if out is not None and out[2:] == seam[2:]:
        y = branch.function(u)
        if y.shape == x.shape and y.dtype == x.dtype:
            w, b, eps, rms = seam
            return norm_add_norm(y, x, out.weight, w, eps, output_bias=out.bias, input_bias=b, rms=rms)
        return x + outer(y), None  # type: ignore[misc]
    y = branch.added(u)
    if y.shape != x.shape or y.dtype != x.dtype:
        return x + y, None
    u, x = add_norm(y, x, seam.weight, seam.bias, seam.eps, rms=seam.rms)
    return x, u
