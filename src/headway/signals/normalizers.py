"""The normalisers of the study, to be held against one another by :func:`headway.signals.comparison.compare_normalizers`.

All take (B, C, H, W) and, but for the convolutions, keep the shape. "Beyond BatchNorm: Towards a Unified Understanding of
Normalization in Deep Learning", 2021, arXiv 2106.05956; each class names its own paper.
EvoNorm, which belongs to them, is :mod:`headway.norms.evo`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# brings relu of a standard normal back to unit second moment around its mean
RELU_GAIN = math.sqrt(2 * math.pi / (math.pi - 1))


class _Affine(nn.Module):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def affine(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class FilterResponseNorm(_Affine):
    """y = g x / sqrt(mean_hw(x^2) + |eps|) + b. "Filter Response Normalization Layer", 2019, arXiv 1911.09737."""

    signal_kind = "norm"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.learned_eps = nn.Parameter(torch.tensor([eps]))

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + self.learned_eps.abs()))


class ThresholdedLinearUnit(nn.Module):
    """max(x, tau) with a learned threshold per channel, the activation that belongs to :class:`FilterResponseNorm`."""

    signal_kind = "post"

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.tau[:, None, None])


class VarianceNorm(_Affine):
    """Batch normalisation without the mean: y = g x / sqrt(var_bhw(x) + eps) + b, running variance in evaluation.

    "Batch Normalization Provably Avoids Rank Collapse for Randomly Initialised Deep Networks", 2020, arXiv 2003.01652.
    """

    signal_kind = "norm"
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps)
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(num_features))

    def variance(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.running_var[:, None, None]
        var = x.var((0, 2, 3), correction=0)
        self.running_var.lerp_(var.detach().to(self.running_var.dtype), self.momentum)
        return var[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x * torch.rsqrt(self.variance(x) + self.eps))


class WeightNormConv2d(nn.Conv2d):
    """A convolution with weight g W / (|W| + eps) per filter. "Weight Normalization", 2016, arXiv 1602.07868."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, eps: float = 1e-5, **settings) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **settings)
        self.gain, self.eps = nn.Parameter(torch.ones(out_channels, 1, 1, 1)), eps

    def forward(self, input: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(input, self.gain * self.weight / (norms + self.eps), self.bias)


class BiasCorrectedReLU(nn.Module):
    """sqrt(2 pi / (pi - 1)) (relu(x) - sqrt(1 / 2 pi)): mean 0 and variance 1 for a standard normal input.

    "Normalization Propagation", 2016, arXiv 1603.01431; it belongs to :class:`WeightNormConv2d`.
    """

    signal_kind = "post"

    def forward(self, x: Tensor) -> Tensor:
        return RELU_GAIN * (F.relu(x) - math.sqrt(1 / (2 * math.pi)))


class ScaledStdConv2d(nn.Conv2d):
    """A convolution with weight gain g (W - mean) / ((std + eps) sqrt(fan_in)) per filter.

    "Characterizing signal propagation to close the performance gap in unnormalized ResNets", 2021, arXiv 2101.08692.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, eps: float = 1e-5, **settings) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **settings)
        self.gain, self.eps = nn.Parameter(torch.ones(out_channels, 1, 1, 1)), eps

    def forward(self, input: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        scale = RELU_GAIN / math.sqrt(self.weight[0].numel())
        return self._conv_forward(input, self.gain * scale * (self.weight - mean) / (std + self.eps), self.bias)
