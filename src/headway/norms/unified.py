"""Unified Normalization: channel statistics smoothed over recent batches while training, a fixed scale and shift afterwards.

    training     y = weight * x / sqrt(psi + eps) + bias,  psi = geometric mean over the last M batches of mean(x^2)
    gradient     dx = (g - nu * z) / sqrt(psi + eps),  g = gy * weight * r,  z = x / sqrt(psi + eps)
    evaluation   y = weight * x / sqrt(running_var + eps) + bias

No mean is subtracted. ``nu`` follows the mean of g * z over recent batches, and ``r = sqrt(psi + eps) / sqrt(running_var + eps)``,
held within [0.2, 5], makes the gradient that of a layer scaled by the running statistic: on purpose, it is not the derivative of
the forward pass. Paper: "Unified Normalization for Accelerating and Stabilizing Transformers" (Yang et al.), ACM Multimedia 2022,
arXiv 2208.01313. For transformers with norms in front of their sublayers that are trained with it. Not for exchanging the norm of
a trained model without training on, and not for strictly causal training: the training statistic mixes positions. Once trained,
:class:`headway.norms.fold.FoldNorms` folds it into the linear layers that read it, and it costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.channels import channel_scale, unified_norm
from headway.norms.layer import LayerNorm
from headway.norms.statistics import RunningStatistics
from headway.surgery import Site


class ChannelStatistics(RunningStatistics):
    """What norms with running channel statistics share: float32 statistics, freezing, checks, and standing in for a LayerNorm."""

    looks_for = "nn.LayerNorm over the last axis"
    weight: Tensor | None
    bias: Tensor | None
    iters: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        sync: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1; it is {num_features}")
        self.num_features, self.eps, self.sync = num_features, eps, sync
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("iters", torch.zeros((), dtype=torch.int64, device=device))

    def _add_statistic(self, name: str, value: float, *rows: int) -> None:
        assert self.weight is not None
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = (*rows, self.num_features)
        self.register_buffer(name, torch.full(shape, value, dtype=dtype, device=self.weight.device))

    def _scale_shift(self, square: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(square + self.eps)
        if self.weight is not None:
            scale = self.weight * scale
        return scale, torch.zeros_like(square) if self.bias is None else self.bias

    def _fixed(self, x: Tensor, statistic: str, groups: int = 0) -> Tensor:
        """The layer in evaluation. What it holds is looked up where it lies: as attributes of a module, it costs a quarter of the
        norm of few tokens."""
        held = self._parameters
        weight = held["weight"] if "weight" in held else self.weight  # noqa: SIM401
        bias = held["bias"] if "bias" in held else self.bias  # noqa: SIM401
        return channel_scale(x, self._buffers[statistic], weight, bias, self.eps, groups)  # type: ignore[arg-type]

    def _check(self, x: Tensor, pad_mask: Tensor | None) -> None:
        if x.dim() < 2 or x.shape[-1] != self.num_features:
            raise ValueError(f"the input must have the shape (..., {self.num_features}); it has {tuple(x.shape)}")
        if pad_mask is not None and (pad_mask.dtype != torch.bool or pad_mask.shape != x.shape[:-1]):
            raise ValueError(
                f"pad_mask must be a bool tensor of shape {tuple(x.shape[:-1])}, True on padding; "
                f"it is {pad_mask.dtype} of shape {tuple(pad_mask.shape)}"
            )

    @classmethod
    def _from_layer_norm(cls, module: nn.Module, **settings: Any) -> Any:
        if type(module) not in (nn.LayerNorm, LayerNorm) or getattr(module, "dims", None) not in (None, (-1,)):
            return None
        assert isinstance(module, nn.LayerNorm)
        if len(module.normalized_shape) != 1:
            return None
        weight: Tensor | None = module.weight
        new = cls(module.normalized_shape[0], **settings)
        if weight is not None:
            new.to(weight.device, weight.dtype)
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)


def unified_norm_eval(
    x: Tensor, running_var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``weight * x / sqrt(running_var + eps) + bias``, UnifiedNorm in evaluation.

    Args:
        x: (..., C) of any floating type; half precision is computed in float32.
        running_var, weight, bias: (C,).

    Raises:
        ValueError: a vector does not fit the last axis of ``x``.
    """
    for name, vector in (("running_var", running_var), ("weight", weight), ("bias", bias)):
        if vector is not None and (x.dim() == 0 or vector.shape != x.shape[-1:]):
            raise ValueError(
                f"{name} must have one number a channel of the input {tuple(x.shape)}; its shape is {tuple(vector.shape)}"
            )
    return channel_scale(x, running_var, weight, bias, eps)


class UnifiedNorm(ChannelStatistics):
    """Normalises each channel by a quadratic mean smoothed over recent batches; at inference a fixed scale and shift.

    Args:
        num_features: channels, the size of the last axis.
        window_size: batches that the forward statistic and the gradient's statistic are smoothed over; a pair sets them apart.
        warmup_iters: batches before the smoothing (and the filter) sets in.
        outlier_filtration: leave batches out of the statistics whose channels stand out against the window. ``skip_counter``
            counts them. Where all channels have one scale the filter fires often.
        eps: added to the mean square, inside the root.
        momentum: the share of the running statistics that is KEPT at each batch (unlike ``nn.BatchNorm1d``).
        compensation_warmup: ``r`` is 1 up to this batch or to ``warmup_iters``, whichever is later.
        count_padding: let the gradient's mean run over padding too, as the released code does.
        sync: take the statistics over the batches of all processes of the default group, so that they stay equal and skip the
            same batches. Every process must then run every pass, forward and backward. Without a process group it changes
            nothing.

    Shapes:
        input and output: (..., C); pad_mask: (...), True on padding, which then moves no statistic.

    A batch that holds NaN or infinity, no token, or padding alone moves no statistic. The statistics are float32 or wider; half
    precision input is computed in float32. Every training pass counts as one batch, also within gradient accumulation.

    Raises:
        ValueError: a setting out of its range, another last axis than ``num_features``, or a mask that does not fit.
    """

    running_var: Tensor
    ema_gz: Tensor
    forward_window: Tensor
    backward_window: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        num_features: int,
        window_size: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
        compensation_warmup: int = 1000,
        count_padding: bool = False,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, sync, device, dtype)
        windows = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if len(windows) != 2 or min(windows) < 1:
            raise ValueError(f"window_size must be one or two numbers of at least 1; it is {window_size}")
        if not 0 < momentum < 1:
            raise ValueError(f"momentum must lie between 0 and 1; it is {momentum}")
        self.window_size, self.warmup_iters, self.momentum = windows, warmup_iters, momentum
        self.outlier_filtration, self.compensation_warmup = outlier_filtration, compensation_warmup
        self.count_padding = count_padding
        self._add_statistic("running_var", 1.0)
        self._add_statistic("ema_gz", 0.0)
        self._add_statistic("forward_window", 0.0, windows[0])
        self._add_statistic("backward_window", 0.0, windows[1])
        self.register_buffer("skip_counter", torch.zeros((), dtype=torch.int64, device=device))

    def reset_statistics(self) -> None:
        """Back to the state before the first batch, so that warm-up runs again (before fine-tuning, say)."""
        self.running_var.fill_(1)
        for buffer in (self.ema_gz, self.forward_window, self.backward_window, self.iters, self.skip_counter):
            buffer.zero_()

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The two vectors (s, b) with which the layer in evaluation is ``s * x + b``."""
        return self._scale_shift(self.running_var)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        self._check(x, pad_mask)
        if not self.training:
            return self._fixed(x, "running_var")
        statistics = (
            self.running_var,
            self.forward_window,
            self.iters,
            self.skip_counter,
            self.backward_window,
            self.ema_gz,
        )
        return unified_norm(
            x,
            self.weight,
            self.bias,
            pad_mask,
            statistics,
            warmup=self.warmup_iters,
            compensation=self.compensation_warmup,
            filtration=self.outlier_filtration,
            eps=self.eps,
            momentum=self.momentum,
            count_padding=self.count_padding,
            sync=self._together(),
            moves=self._frozen == 0,
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, window_size={self.window_size}, warmup_iters={self.warmup_iters}, eps={self.eps}"

    @classmethod
    def from_module(cls, module: nn.Module, *, site: Site | None = None, **settings: Any) -> UnifiedNorm | None:
        """The norm with the very parameters of a LayerNorm over the last axis and its own ``eps``; None for anything else."""
        return cls._from_layer_norm(module, **settings)
