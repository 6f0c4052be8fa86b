"""All one-pass statistics of a tensor: count, mean, central moments to the fourth, largest |x|, zeros, nonfinite entries.

    scalars  = [n, mean, sum (x-mean)^2, sum (x-mean)^3, sum (x-mean)^4, max |x|, zeros, nonfinite]
    channels = [n_c, mean_c, sum (x-mean_c)^2] for every channel c

The C++ body reads the tensor once, in its own number format, with sums shifted by a sample of every channel and scaled by a
power of two, so that neither a large mean nor a huge or tiny scale costs digits; no copy of the tensor is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.library import below_autograd, define
from headway.kernels.moments.reference import PIECE, combine
from headway.kernels.moments.reference import moments as reference

__all__ = ["combine", "moments", "reference"]


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(8, dtype=torch.float64), x.new_empty((3, x.shape[1]), dtype=torch.float64)


_moments = define("moments(Tensor x) -> (Tensor, Tensor)", reference, fake=_fake, native="moments")


def moments(x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """One-pass statistics of a floating tensor over all entries and over every channel.

    Args:
        x: any shape with at least one axis, any floating dtype, any strides.
        channel_dim: the axis whose entries are channels.

    Returns:
        ``scalars`` (8,) and ``channels`` (3, C), float64 on the device of ``x``, over the finite entries; no gradient.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        IndexError: there is no axis ``channel_dim``.
    """
    if not x.is_floating_point():
        raise TypeError(f"moments takes a floating tensor, not {x.dtype}; convert it first")
    x = x.detach()
    channel = channel_dim % x.dim() if -x.dim() <= channel_dim < x.dim() else None
    if channel is None:
        raise IndexError(f"a tensor of shape {tuple(x.shape)} has no axis {channel_dim}")
    with below_autograd():
        return _over(x, channel)


def _over(x: Tensor, channel: int) -> tuple[Tensor, Tensor]:
    shape = x.shape
    if x.is_contiguous():
        inner = 1
        for size in shape[channel + 1 :]:
            inner *= size
        return _moments(x.view(-1, shape[channel], inner) if x.numel() else x.new_empty((0, shape[channel], 1)))
    last = x.movedim(channel, -1)
    if last.is_contiguous():
        return _moments(last.view(-1, shape[channel], 1))
    # strides that no view describes: copied piece by piece, never as a whole
    if x.numel() <= PIECE or max(shape) == 1:
        return _over(x.contiguous(), channel)
    axis = max((i for i in range(x.dim()) if i != channel or x.dim() == 1), key=lambda i: shape[i])
    if shape[axis] == 1 or axis == channel:
        return _over(x.contiguous(), channel)
    half = shape[axis] // 2
    parts = x.narrow(axis, 0, half), x.narrow(axis, half, shape[axis] - half)
    return combine(_over(parts[0], channel), _over(parts[1], channel))
