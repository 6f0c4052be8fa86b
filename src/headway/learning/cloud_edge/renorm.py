"""Batch renormalisation: batch norm that learns from batches but computes, to the digit, what running statistics compute.

    y = w ((x - mu_B) / sd_B r + d) + b,    r = sd_B / sd_run,  d = (mu_B - mu_run) / sd_run,  without gradient through r and d
    then  mu_run += momentum (mu_B - mu_run)  and the same for the unbiased variance;  sd = sqrt(variance + eps)

In value y is the input normalised by the running statistics as they were before this batch; the gradient is batch norm's, scaled. So
a network that adapts on one machine in training mode is the same function as its copy that only infers on another, also at batch
size 1, which is what :mod:`headway.learning.cloud_edge` needs. r and d are not clipped. "Batch Renormalization: Towards Reducing
Minibatch Dependence in Batch-Normalized Models", 2017, arXiv 1702.03275; without clipping in the released code of arXiv 2402.17316
(2024). For fine-tuning and test-time adaptation; not for training from scratch, where r and d need clipping.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from headway.norms.statistics import RunningStatistics
from headway.surgery import Replace, Site, apply


class _Everywhere(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        whole = gradient.clone()
        torch.distributed.all_reduce(whole)
        return whole


class BatchRenorm(RunningStatistics, _BatchNorm):
    """Batch renormalisation over all axes but the second, with the parameters and statistics of the batch norm it replaces.

    Args:
        num_features: channels.
        eps: added to the variance, inside the root.
        momentum: how far a batch moves the running statistics.
        affine: a weight and a bias a channel.
        reset_stats: forget the running statistics: the first batch seen defines them (the released code).
        sync: statistics of all processes of the default group.

    Shapes:
        input and output: (N, C, ...).

    In training an empty batch passes through and moves nothing; statistics are float32 or wider.

    Raises:
        ValueError: an input without the channels, or, in training, one value a channel: its variance is unknown.
    """

    looks_for = "nn.BatchNorm1d, 2d, 3d or nn.SyncBatchNorm with running statistics"
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        reset_stats: bool = False,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.sync, self._undefined = sync, False
        if reset_stats:
            self.reset_statistics()

    def reset_statistics(self) -> None:
        """The next batch, in training or not, defines the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.zero_()
        self._undefined = True

    @property
    def undefined(self) -> bool:
        """Whether the next batch defines the running statistics."""
        return self._undefined

    def statistics_loaded(self) -> None:
        """Says that the running statistics were written from outside."""
        self._undefined = False

    @classmethod
    def from_module(
        cls, module: nn.Module, *, site: Site | None = None, reset_stats: bool = False, sync: bool = False
    ) -> BatchRenorm | None:
        """The same layer, holding the very same parameters and a copy of the statistics; None for what is no batch norm of torch."""
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        if type(module) not in plain or not isinstance(module, _BatchNorm) or module.running_mean is None:
            return None
        momentum = 0.1 if module.momentum is None else module.momentum
        new = cls(module.num_features, module.eps, momentum, affine=False, sync=sync)
        new.affine, new.weight, new.bias = module.affine, module.weight, module.bias
        for name, buffer in module.named_buffers():
            setattr(new, name, buffer.clone())
        if reset_stats:
            new.reset_statistics()
        return new.train(module.training)

    @classmethod
    def convert(cls, model: nn.Module, reset_stats: bool = False, sync: bool = False) -> nn.Module:
        """Puts it in the place of every batch norm with running statistics; a model that has none is returned as it is."""
        if not any(cls.from_module(module) is not None for module in model.modules()):
            return model
        return apply(model, Replace(cls, reset_stats=reset_stats, sync=sync))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"the input must have the shape (N, {self.num_features}, ...); it has {tuple(input.shape)}"
            )

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each channel (C,), with gradient, over all processes if they go together."""
        axes = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        if not self._together():
            if count == 1 and self.training:
                raise ValueError(
                    f"batch statistics need more than one value a channel; the input has the shape {tuple(x.shape)}"
                )
            var, mean = torch.var_mean(x, axes, correction=min(1, count - 1))
            return mean, var
        total = _Everywhere.apply(torch.cat([x.sum(axes), x.new_tensor([count])]))
        mean = total[:-1] / total[-1]
        squares = _Everywhere.apply((x - self._spread(mean, x)).square().sum(axes))
        return mean, squares / (total[-1] - 1)

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics towards those of a batch."""
        if not self._frozen:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
            self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum or 0.0)

    @staticmethod
    def _spread(channels: Tensor, x: Tensor) -> Tensor:
        return channels.view(1, -1, *[1] * (x.dim() - 2))

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and not self._undefined:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if input.numel() == 0 and not self._together():
            return input
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, var = self._batch_statistics(x)
        with torch.no_grad():
            if self._undefined:
                self.running_mean.copy_(mean)
                self.running_var.copy_(var)
                self._undefined = False
            sd_run = (self.running_var + self.eps).sqrt()
            r = (var + self.eps).sqrt() / sd_run
            d = (mean - self.running_mean) / sd_run
        if self.training:
            self._move(mean, var)
        y = (x - self._spread(mean, x)) * self._spread(r / (var + self.eps).sqrt(), x) + self._spread(d, x)
        if self.weight is not None:
            y = y * self._spread(self.weight, x) + self._spread(self.bias, x)
        return y.to(input.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        # a layer that was reset and has seen nothing is saved as such
        self._undefined = self._undefined and int(self.num_batches_tracked or 0) == 0

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, sync={self.sync}"
