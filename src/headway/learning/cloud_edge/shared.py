"""Norms whose batch is in several processes: their statistics are those of all parts of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.learning.cloud_edge.renorm import BatchRenorm
from headway.norms.statistics import RunningStatistics
from headway.surgery import Replace, apply

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SharedBatchNorm(BatchRenorm):
    """torch's batch norm over the batches of all processes of the default group, on any device (``nn.SyncBatchNorm`` wants a GPU)."""

    looks_for = "nn.BatchNorm1d, 2d or 3d with running statistics"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, var = self._batch_statistics(x)
        values = self._values(x)
        self._move(mean, var)
        y = (x - self._spread(mean, x)) / self._spread((var * ((values - 1) / values) + self.eps).sqrt(), x)
        if self.weight is not None:
            y = y * self._spread(self.weight, x) + self._spread(self.bias, x)
        return y.to(input.dtype)

    def _values(self, x: Tensor) -> Tensor:
        """How many values a channel has in all processes."""
        values = x.new_tensor(x.numel() // x.shape[1])
        if self._together():
            torch.distributed.all_reduce(values)
        return values


def check_shareable(*models: nn.Module) -> None:
    """ValueError where a norm looks at a whole batch even at inference, so that parts of a batch would be told otherwise."""
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"{name or type(module).__name__} has no running statistics, so that what it says of a sample depends on which "
                    "others are beside it; use processes=1, or batch norms with track_running_stats=True"
                )
            if type(module) in _PLAIN and module.momentum is None:
                raise ValueError(
                    f"{name or type(module).__name__} averages its statistics over all batches (momentum=None), which processes that "
                    "come and go cannot count; use processes=1, or give it a momentum"
                )


def share_statistics(model: nn.Module) -> nn.Module:
    """Has every norm of a model take its training statistics from all processes."""
    if any(type(module) in _PLAIN for module in model.modules()):
        model = apply(model, Replace(SharedBatchNorm))
    for module in model.modules():
        if isinstance(module, RunningStatistics):
            module.sync = True
    return model
