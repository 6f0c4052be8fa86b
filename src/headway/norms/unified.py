"""Unified Normalization: channel statistics smoothed over recent batches while training, a fixed scale and shift afterwards.

    training     y = weight * x / sqrt(psi + eps) + bias,  psi = geometric mean over the last M batches of mean(x^2)
    gradient     dx = (g - nu * z) / sqrt(psi + eps),  g = gy * weight * r,  z = x / sqrt(psi + eps)
    evaluation   y = weight * x / sqrt(running_var + eps) + bias

No mean is subtracted. ``nu`` follows the mean of g * z over recent batches, and ``r = sqrt(psi + eps) / sqrt(running_var + eps)``,
held within [0.2, 5], makes the gradient that of a layer scaled by the running statistic: on purpose, it is not the derivative of
the forward pass. Paper: "Unified Normalization for Accelerating and Stabilizing Transformers" (Yang et al.), ACM Multimedia 2022,
arXiv 2208.01313. For transformers with norms in front of their sublayers that are trained with it. Not for exchanging the norm of
a trained model without training on, and not for strictly causal training: the training statistic mixes positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headway.norms.layer import LayerNorm
from headway.surgery import Site


class ChannelStatistics(nn.Module):
    """What norms with running channel statistics share: float32 statistics, freezing, checks, and standing in for a LayerNorm."""

    looks_for = "nn.LayerNorm over the last axis"
    weight: Tensor | None
    bias: Tensor | None
    iters: Tensor

    def __init__(
        self, num_features: int, eps: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1; it is {num_features}")
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("iters", torch.zeros((), dtype=torch.int64, device=device))
        self._frozen = 0

    def _add_statistic(self, name: str, value: float, *rows: int) -> None:
        assert self.weight is not None
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = (*rows, self.num_features)
        self.register_buffer(name, torch.full(shape, value, dtype=dtype, device=self.weight.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():  # model.half() leaves the statistics in float32
            new = self._buffers[name]
            if old is not None and new is not None and new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device)
        return self

    @contextmanager
    def freeze_statistics(self) -> Iterator[None]:
        """Within it, a training pass computes what it would compute anyhow but moves no statistic, neither does its backward.

        With gradient checkpointing, freeze the first of the two passes, so that both start from the same state and the second
        one alone moves it: ``checkpoint(..., context_fn=lambda: (norm.freeze_statistics(), nullcontext()))``.
        """
        self._frozen += 1
        try:
            yield
        finally:
            self._frozen -= 1

    def _scale(self) -> Tensor:
        return torch.ones(self.num_features, device=self.iters.device) if self.weight is None else self.weight

    def _shift(self) -> Tensor:
        return torch.zeros(self.num_features, device=self.iters.device) if self.bias is None else self.bias

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


def valid_tokens(pad_mask: Tensor | None) -> Tensor | None:
    """The mask of real tokens as a column beside the channels."""
    return None if pad_mask is None else ~pad_mask.reshape(-1, 1)


def valid_mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid rows; NaN where there is none."""
    if valid is None:
        return rows.mean(0)
    return torch.where(valid, rows, 0).sum(0) / valid.sum()


class _UnifiedScale(torch.autograd.Function):
    """z * weight + bias with the smoothed gradient; its backward moves the two tensors of ``state``, window and running mean."""

    @staticmethod
    def forward(ctx, x, weight, bias, valid, psi, r, t, skip, own, live, settings, state):
        eps, ctx.momentum, ctx.count_padding = settings
        z = x * torch.rsqrt(psi + eps)
        # all of it as saved tensors: under checkpointing they then come from the second pass, as does ``live``
        ctx.save_for_backward(z, weight, valid, torch.rsqrt(psi + eps), r, t, skip, own, live)
        ctx.state = state
        return z * weight.to(z.dtype) + bias.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):  # type: ignore[override]
        z, weight, valid, inverse, r, t, skip, own, live = ctx.saved_tensors
        ring, nu = ctx.state
        g = gy * (weight.to(z.dtype) * r)
        counted = None if ctx.count_padding else valid
        s_now = valid_mean(g * z, counted)
        row = torch.where(skip, nu, s_now.to(nu.dtype))
        rows = ring.index_copy(0, (t % len(ring)).reshape(1), row[None])
        s = torch.where(own, s_now.to(nu.dtype), rows.mean(0))
        new_nu = ctx.momentum * nu + (1 - ctx.momentum) * s
        moves = live & torch.isfinite(s_now).all()
        ring.copy_(torch.where(moves, rows, ring))
        nu.copy_(torch.where(moves, new_nu, nu))
        pull = torch.where(skip, s, new_nu).to(z.dtype) * z
        grad_x = (g - (pull if counted is None else torch.where(counted, pull, 0))) * inverse
        grad_weight = (gy * z).sum(0) * r
        return grad_x, grad_weight.to(weight.dtype), gy.sum(0).to(weight.dtype), *(None,) * 9


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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, device, dtype)
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
        return self._scale() * torch.rsqrt(self.running_var + self.eps), self._shift()

    @torch.no_grad()
    def _observe(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        running = self.running_var.to(torch.promote_types(x.dtype, self.running_var.dtype))
        window = self.forward_window.to(running.dtype)
        size, t = len(window), self.iters + 1
        some = torch.ones_like(t, dtype=torch.bool) if valid is None else valid.any()
        q = torch.where(some, valid_mean(x.square(), valid).to(running.dtype), running)
        usable = some & torch.isfinite(q).all()
        slot = (t % size).reshape(1)
        rows = window.index_copy(0, slot, q[None])
        skip = ~usable | (size == 1)
        fired = torch.zeros_like(skip)
        warm = t >= self.warmup_iters
        geometric = rows.log().mean(0).exp()
        if self.outlier_filtration:
            spread = window.sqrt().var() if window.numel() > 1 else window.new_zeros(())
            fired = usable & warm & (rows.mean(0) - geometric > size * spread).any()
            rows = torch.where(fired, window.index_copy(0, slot, running[None]), rows)
            skip = skip | fired
        own = (t <= size) | ~warm | skip
        psi = torch.where(own, q, geometric)
        ratio = ((psi + self.eps) / (running + self.eps)).sqrt().clamp(0.2, 5)
        r = torch.where((t <= max(self.compensation_warmup, self.warmup_iters)) | skip, 1, ratio)
        live = usable & (self._frozen == 0)
        # the gradient's own test: its window may have another size than the forward one
        own_gradient = (t <= len(self.backward_window)) | ~warm | skip
        if not self._frozen:
            kept = self.momentum * running + (1 - self.momentum) * psi
            self.running_var.copy_(torch.where(usable, kept, running))
            self.forward_window.copy_(torch.where(usable, rows, window))
            self.skip_counter.add_(fired)
            self.iters.add_(usable)
        return psi.to(x.dtype), r.to(x.dtype), t, skip, own_gradient, live

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        self._check(x, pad_mask)
        wide = torch.promote_types(x.dtype, torch.float32)
        if not self.training or x.numel() == 0:
            scale, shift = self.scale_shift()
            return (x.to(wide) * scale.to(wide) + shift.to(wide)).to(x.dtype)
        rows, valid = x.reshape(-1, self.num_features).to(wide), valid_tokens(pad_mask)
        psi, r, t, skip, own, live = self._observe(rows.detach(), valid)
        state = (self.backward_window, self.ema_gz)
        y = _UnifiedScale.apply(
            rows, self._scale(), self._shift(), valid, psi, r, t, skip, own, live,
            (self.eps, self.momentum, self.count_padding), state,
        )  # fmt: skip
        return y.reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, window_size={self.window_size}, warmup_iters={self.warmup_iters}, eps={self.eps}"

    @classmethod
    def from_module(cls, module: nn.Module, *, site: Site | None = None, **settings: Any) -> UnifiedNorm | None:
        """The norm with the very parameters of a LayerNorm over the last axis and its own ``eps``; None for anything else."""
        return cls._from_layer_norm(module, **settings)
