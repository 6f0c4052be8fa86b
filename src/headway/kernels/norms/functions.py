"""What people call: shapes checked, the shortest way taken.

Small layer norms go to PyTorch's own operator, whose call costs less than ours gains on them; from ``SMALL`` numbers on (with a
graph to record: ``SMALL_GRAPH``, because a backward of our own costs a Python call more) the kernel is faster. Under
``torch.compile`` the plain version is used, because the compiler fuses it with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels.library import below_autograd
from headway.kernels.norms import operators as ops
from headway.kernels.norms import reference
from headway.kernels.norms.reference import COMPRESSED, LAYER, RMS

SMALL, SMALL_GRAPH = 6144, 24576
_rows = ops.norm._op  # what calling the operator calls; it has no backward that autograd would have to be kept from


def _records(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _count(x: Tensor, shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None) -> int:
    """The numbers in one row; ValueError where ``x`` does not end in ``shape`` or a parameter has another shape."""
    wanted = (shape,) if isinstance(shape, int) else tuple(shape)
    # the usual call, checked with as few Python steps as there are: on small tensors they cost more than the norm
    if (
        len(wanted) == 1
        and x.dim()
        and x.size(-1) == wanted[0]
        and (weight is None or weight.shape == wanted)
        and (bias is None or bias.shape == wanted)
    ):
        return wanted[0]
    if not wanted or tuple(x.shape[-len(wanted) :]) != wanted:
        raise ValueError(f"the input must end in the normalised shape {wanted}; its shape is {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != wanted:
            raise ValueError(f"{name} must have the normalised shape {wanted}; its shape is {tuple(parameter.shape)}")
    n = 1
    for size in wanted:
        n *= size
    return n


def _flat(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.dim() == 1 else parameter.reshape(-1)


def _norm(x, weight, bias, n, eps, kind, offset, out):
    weight, bias = _flat(weight), _flat(bias)
    if torch.compiler.is_compiling():
        y = reference.rows(x, weight, bias, n, eps, kind, offset)[0]
        return y if out is None else out.copy_(y)
    if out is not None:
        if _records(x, weight, bias):
            raise ValueError("out= takes no gradients; call inside torch.no_grad() or leave it out")
        if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous, {tuple(x.shape)} and {x.dtype}; it is {tuple(out.shape)} and {out.dtype}"
            )
        with below_autograd():
            if kind == LAYER:
                ops.layer_norm_out(x.contiguous(), weight, bias, n, eps, out)
            else:
                ops.rms_norm_out(x.contiguous(), weight, bias, n, eps, offset, out)
        return out
    if _records(x, weight, bias):
        return ops.Norm.apply(x, weight, bias, n, eps, kind, offset)
    return _rows(x, weight, bias, n, eps, kind, offset)


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``weight * (a - mean(a)) / sqrt(var(a) + eps) + bias`` over the last axes, as ``torch.nn.functional.layer_norm``.

    Args:
        x: (..., *normalized_shape), float32, float64, bfloat16 or float16; weight and bias may be of a wider type.
        out: memory to write to (no gradients), which saves the allocation of a large result.

    Raises:
        ValueError: a shape does not fit, or ``out`` is given while gradients are wanted.
    """
    if (
        not torch.compiler.is_compiling()
        and (size := x.numel()) < SMALL_GRAPH
        and out is None
        and (size < SMALL or _records(x, weight, bias))
    ):
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        try:
            return torch.layer_norm(x, shape, weight, bias, eps)
        except RuntimeError:
            pass  # a mixture of types that is ours alone, or a mistake that is named below
    return _norm(x, weight, bias, _count(x, normalized_shape, weight, bias), eps, LAYER, 0.0, out)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``(weight + offset) * a / sqrt(mean(a^2) + eps) + bias`` over the last axes.

    ``offset=1.0`` is the gain of the Gemma family, whose weight starts at zero. Arguments and errors as :func:`layer_norm`.
    """
    n = _count(x, normalized_shape, weight, bias)
    if out is None and not torch.compiler.is_compiling() and not _records(x, weight, bias):
        # the shortest way: at one token, every Python step is a part of what the norm costs
        return _rows(x, weight, bias, n, eps, RMS, offset)
    return _norm(x, weight, bias, n, eps, RMS, offset, out)


def crms_norm(z: Tensor, eps: float = 1e-5) -> Tensor:
    """``z / sqrt((sum(z^2) + sum(z)^2) / (k + 1) + eps)`` over the last axis of k numbers.

    It equals the first k entries of ``rms_norm([z, -sum(z)])``: the RMS norm of a vector with zero mean whose last entry is
    left out (Jiang et al., 2023, arXiv 2305.14858). Backward, with r the factor and s the sum:
    ``gz = r g - r^3 / (k + 1) (g . z) (z + s)``.
    """
    if torch.compiler.is_compiling():
        return reference.rows(z, None, None, z.shape[-1], eps, COMPRESSED)[0]
    if _records(z):
        return ops.CRMSNorm.apply(z, eps)  # type: ignore[return-value]
    return _rows(z, None, None, z.shape[-1], eps, COMPRESSED, 0.0)


def _same(x: Tensor, other: Tensor, names: str) -> None:
    if x.shape != other.shape or x.dtype != other.dtype:
        raise ValueError(
            f"{names} must agree in shape and type; they are {tuple(x.shape)} {x.dtype} and "
            f"{tuple(other.shape)} {other.dtype}"
        )


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``h = x + residual``, ``y = norm(h)`` over the last axis in one pass over memory; returns ``(y, h)``.

    Raises:
        ValueError: the two shapes or types differ, or a parameter does not fit the last axis.
    """
    _same(x, residual, "x and residual")
    compiling = torch.compiler.is_compiling()
    records = not compiling and _records(x, residual, weight, bias)
    if not compiling and not rms and x.numel() < (SMALL_GRAPH if records else SMALL):
        h = x + residual
        return layer_norm(h, x.shape[-1:], weight, bias, eps), h
    n = _count(x, x.shape[-1], weight, bias)
    if compiling:
        h = x + residual
        return reference.rows(h, weight, bias, n, eps, RMS if rms else LAYER, offset)[0], h
    if records:
        return ops.AddNorm.apply(x, residual, weight, bias, n, eps, rms, offset)  # type: ignore[return-value]
    with below_autograd():
        return ops.add_norm(x, residual, weight, bias, n, eps, rms, offset, False)[:2]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`add_norm` with the RMS norm: returns ``(rms_norm(x + residual), x + residual)``."""
    return add_norm(x, residual, weight, bias, eps, rms=True)


def norm_add_norm(
    f: Tensor,
    x: Tensor,
    output_weight: Tensor | None = None,
    input_weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    output_bias: Tensor | None = None,
    input_bias: Tensor | None = None,
    rms: bool = True,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``x_new = x + N_out(f)``, ``u = N_in(x_new)``: the seam between two sub-layers of a Peri-LN block (arXiv 2502.02732).

    Returns ``(x_new, u)``. Both norms and the addition are one kernel with two row reductions; the normalised branch is added
    before it is rounded to the type of ``x``.

    Raises:
        ValueError: the two shapes or types differ, or a parameter does not fit the last axis.
    """
    _same(f, x, "f and x")
    n = _count(f, f.shape[-1], output_weight, output_bias)
    _count(f, n, input_weight, input_bias)
    parameters = output_weight, output_bias, input_weight, input_bias
    if torch.compiler.is_compiling():
        return reference.norm_add_norm(f, x, *parameters, n, eps, rms, offset)[:2]
    if _records(f, x, *parameters):
        if not rms and f.numel() < SMALL_GRAPH and f.dtype in (torch.float32, torch.float64):
            x_new = x + layer_norm(f, f.shape[-1:], output_weight, output_bias, eps)
            return x_new, layer_norm(x_new, f.shape[-1:], input_weight, input_bias, eps)
        return ops.NormAddNorm.apply(f, x, *parameters, n, eps, rms, offset)  # type: ignore[return-value]
    with below_autograd():
        return ops.norm_add_norm(f, x, *parameters, n, eps, rms, offset, False)[:2]


def channel_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, rms: bool = False
) -> Tensor:
    """The norm over the channels of (samples, channels, ...), planes read as they lie: no permuted copies.

    Raises:
        ValueError: there is no channel axis, or a parameter does not have one number a channel.
    """
    if x.dim() < 2:
        raise ValueError(f"channel_norm takes (samples, channels, ...); the input has the shape {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != (x.shape[1],):
            raise ValueError(
                f"{name} must have one number a channel, ({x.shape[1]},); its shape is {tuple(parameter.shape)}"
            )
    flat = x.reshape(x.shape[0], x.shape[1], -1) if x.numel() else x.reshape(x.shape[0], x.shape[1], 0)
    if torch.compiler.is_compiling():
        y = reference.channels(flat, weight, bias, eps, rms)[0]
    elif _records(x, weight, bias):
        y = ops.ChannelNorm.apply(flat, weight, bias, eps, rms)
    else:
        with below_autograd():
            y = ops.channel_norm(flat, weight, bias, eps, rms, False)[0]
    return y.reshape(x.shape)  # type: ignore[union-attr]
