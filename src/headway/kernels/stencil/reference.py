"""Plain torch bodies of the stencil operators: the truth that ``csrc/stencil.cpp`` is tested against.

x is (samples, channels, height, width), the weight (1, channels, k, k) and the bias (1,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that is computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def stencil(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with zeros around the image, the size kept."""
    kind = wide(x.dtype)
    offset = None if bias is None else bias.to(kind)
    return F.conv2d(x.to(kind), weight.to(kind), offset, padding=weight.shape[3] // 2).to(x.dtype)


def stencil_backward(gy: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (flat) and bias (empty where there is none)."""
    kind, around = wide(x.dtype), weight.shape[3] // 2
    g, a, w = gy.to(kind), x.to(kind), weight.to(kind)
    if gy.numel() == 0:
        return torch.zeros_like(x), a.new_zeros(weight.numel()), a.new_zeros(int(has_bias))
    gx = conv2d_input(a.shape, w, g, padding=around)
    gw = conv2d_weight(a, w.shape, g, padding=around)
    return gx.to(x.dtype), gw.flatten(), g.sum().reshape(1) if has_bias else a.new_zeros(0)
