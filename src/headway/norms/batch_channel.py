"""Batch-Channel Normalization: channels by what many batches say of them, then groups of channels of each sample.

    z = weight * (x - running_mean) / sqrt(running_var + eps) + bias       (micro-batches: running estimates, moved before use)
    y = gain * (z - mean of z's group) / sqrt(var of z's group + eps) + offset

Group norm alone trains with any batch but lets channels die: after it, a channel's place relative to zero depends on the others. The
batch statistic in front keeps every channel's own mean near zero. With one to four images a step that statistic is a running
estimate, which takes no part in the gradient; with large batches it is batch norm's. Paper: "Micro-Batch Training with Batch-Channel
Normalization and Weight Standardization" (Qiao et al., 2019), arXiv 1903.10520, and "Rethinking Normalization and Elimination
Singularity in Neural Networks" (2019), arXiv 1911.09738. For convolutional nets with few images a device; one call changes a net that
has batch norms, and standardises the convolutions in front of them (:mod:`headway.weights.standardising`):

    model = hw.apply(model, hw.MicroBatch())

Not for transformers, not for convolutions that no norm follows, and not for a trained batch norm model without fine-tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.kernels.planes import plane_norm, plane_step
from headway.norms.statistics import RunningStatistics, by_running_statistics

Affine = Literal["group", "channel"]


def _check_speed(moving_speed: float) -> float:
    if not 0 < moving_speed <= 1:
        raise ValueError(f"moving_speed must be above 0 and at most 1; it is {moving_speed}")
    return float(moving_speed)


def _planes(x: Tensor) -> Tensor:
    return x[..., None] if x.dim() == 2 else x.flatten(2)


class EstBatchNorm(RunningStatistics, _BatchNorm):
    """Normalises channels by running estimates that each training batch moves BEFORE they are used; no gradient goes through them.

    Args:
        num_features: channels.
        moving_speed: the share of the way to the batch's statistics that the estimates move. The variance is taken around the
            estimate of the mean as it was.
        eps: added to the variance.
        affine: a gain and an offset a channel.
        sync: move by the statistics of all processes of the default group, so that the estimates stay equal.

    Shapes:
        input and output: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d.

    A batch with NaN or infinity and an empty one move nothing. Estimates are float32 or wider. Every micro-batch counts, also within
    gradient accumulation; with gradient checkpointing see :meth:`freeze_statistics`.

    Raises:
        ValueError: ``moving_speed`` outside (0, 1], or an input of another shape.
        RuntimeError: training with a moving speed of 0 (as the released code has it until it is set), which never learns them.
    """

    dims: tuple[int, ...] = (2, 3, 4, 5)
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        moving_speed: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, None, affine, True, device, dtype)
        self.moving_speed, self.sync = _check_speed(moving_speed), sync

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.dims or input.shape[1] != self.num_features:
            wanted = " or ".join(str(dims) for dims in self.dims)
            raise ValueError(
                f"{type(self).__name__} takes {wanted} dimensions with {self.num_features} channels as the second; "
                f"the input has the shape {tuple(input.shape)}"
            )

    def step(self, planes: Tensor, **second: Any) -> Tensor:
        """A training pass over planes (samples, channels, space); ``second`` is of :func:`headway.kernels.planes.plane_step`."""
        if self.moving_speed == 0:
            raise RuntimeError(
                "moving_speed is 0, so that the statistics would never move; set_moving_speed(model, 0.1) sets it"
            )
        sync, moves = self._together(), self._frozen == 0
        # before the output: a recomputation under checkpointing ends with the last tensor that the backward needs
        if moves and self.num_batches_tracked is not None and (planes.numel() or sync):
            self.num_batches_tracked.add_(1)
        y, *_ = plane_step(
            planes, self.weight, self.bias, (self.running_mean, self.running_var), self.moving_speed, moves=moves,
            estimate=True, eps=self.eps, sync=sync, **second,
        )  # fmt: skip
        return y

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return by_running_statistics(x, self)
        return self.step(_planes(x)).reshape(x.shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        released = state_dict.pop(f"{prefix}estbn_moving_speed", None)  # the released code keeps it as a buffer
        if released is not None:
            self.moving_speed = float(released)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.num_features}, moving_speed={self.moving_speed}, eps={self.eps}, affine={self.affine}"


class EstBatchNorm1d(EstBatchNorm):
    __doc__ = EstBatchNorm.__doc__
    dims = (2, 3)


class EstBatchNorm2d(EstBatchNorm):
    __doc__ = EstBatchNorm.__doc__
    dims = (4,)


class EstBatchNorm3d(EstBatchNorm):
    __doc__ = EstBatchNorm.__doc__
    dims = (5,)


class BatchChannelNorm2d(nn.Module):
    """A batch norm, estimated or of the batch, and a group norm of its output, as one pass over the input.

    Args:
        num_channels: channels of the input.
        num_groups: groups of channels of the second stage.
        estimate: False for batch norm's own statistics (large batches), True for running estimates (micro-batches).
        moving_speed: of the estimates; see :class:`EstBatchNorm`.
        eps: added to the variances of both stages.
        channel_affine: the gain and offset of the second stage: one a "group", as released, or one a "channel".
        strict: False lowers ``num_groups`` to the nearest divisor of the channels.
        sync: statistics of all processes.

    Shapes:
        input and output: (N, C, H, W).

    ``batch`` holds the first stage's parameters and statistics, so a batch norm's can be loaded into it; ``group_weight`` and
    ``group_bias`` are the second stage's.

    Raises:
        ValueError: groups that do not divide the channels, another input shape, or, as batch norm does, one value a channel in
            training without ``estimate``.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        estimate: bool = False,
        moving_speed: float = 0.1,
        eps: float = 1e-5,
        channel_affine: Affine = "group",
        strict: bool = True,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channel_affine not in ("group", "channel"):
            raise ValueError(f'channel_affine is "group" or "channel"; it is {channel_affine!r}')
        self.num_channels, self.num_groups = num_channels, fitting_groups(num_channels, num_groups, strict)
        self.estimate, self.eps, self.channel_affine, self.sync = estimate, eps, channel_affine, sync
        self.batch: _BatchNorm
        if estimate:
            self.batch = EstBatchNorm2d(num_channels, moving_speed, eps, sync=sync, device=device, dtype=dtype)
        else:
            self.batch = _BatchStage(num_channels, eps, device=device, dtype=dtype)
            self.batch.sync = sync
        count = self.num_groups if channel_affine == "group" else num_channels
        self.group_weight = nn.Parameter(torch.ones(count, device=device, dtype=dtype))
        self.group_bias = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_channels:
            raise ValueError(f"the input must have the shape (N, {self.num_channels}, H, W); it has {tuple(x.shape)}")
        planes, first = _planes(x), self.batch
        second: Any = {
            "groups": self.num_groups,
            "group_weight": self.group_weight,
            "group_bias": self.group_bias,
            "group_eps": self.eps,
        }
        if isinstance(first, EstBatchNorm) and first.training:
            return first.step(planes, **second).reshape(x.shape)
        if not isinstance(first, EstBatchNorm) and (first.training or first.running_mean is None):
            return self._batch_step(first, planes, second).reshape(x.shape)
        statistics = torch.stack([first.running_mean, first.running_var]).double()  # type: ignore[list-item]
        y, _ = plane_norm(planes, first.weight, first.bias, None, statistics, eps=first.eps, **second)
        return y.reshape(x.shape)

    def _batch_step(self, first: _BatchNorm, planes: Tensor, second: dict[str, Any]) -> Tensor:
        sync = bool(self.sync and isinstance(first, RunningStatistics) and first._together())
        if planes.shape[0] * planes.shape[2] == 1 and not sync:
            raise ValueError(
                f"batch statistics need more than one value a channel in training; the planes have the shape {tuple(planes.shape)}: "
                "use estimate=True"
            )
        running, rate = (None, None), first.momentum
        if (
            isinstance(first, _BatchStage)
            and first.training
            and not first._frozen
            and first.num_batches_tracked is not None
        ):
            running = first.running_mean, first.running_var
            if planes.numel() or sync:
                first.num_batches_tracked.add_(1)
            rate = rate if rate is not None else 1 / max(1, int(first.num_batches_tracked))
        y, *_ = plane_step(
            planes, first.weight, first.bias, running, rate or 0.0, unbiased=True, eps=first.eps, sync=sync, **second
        )
        return y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for key in list(state_dict):
            name = key.removeprefix(prefix)
            first, _, rest_of_it = name.partition(".")
            if name in ("weight", "bias"):  # released as (1, G, 1)
                state_dict[f"{prefix}group_{name}"] = state_dict.pop(key).reshape(-1)
            elif first in ("bn", "pbn"):  # the released names of the first stage
                state_dict[f"{prefix}batch.{rest_of_it}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, groups={self.num_groups}, estimate={self.estimate}, channel_affine={self.channel_affine!r}"


class _BatchStage(RunningStatistics, nn.BatchNorm2d):
    """Batch norm's parameters and running statistics, moved as batch norm moves them (the unbiased variance)."""


def fitting_groups(channels: int, groups: int, strict: bool = True) -> int:
    """``groups``, or with ``strict=False`` the largest number of at most so many that divides the channels.

    Raises:
        ValueError: strict, and the groups do not divide the channels.
    """
    if channels < 1 or groups < 1 or (strict and channels % groups):
        raise ValueError(
            f"num_groups {groups} must divide the {channels} channels; strict=False takes the nearest that does"
        )
    return next(count for count in range(min(groups, channels), 0, -1) if channels % count == 0)


def set_moving_speed(model: nn.Module, moving_speed: float) -> nn.Module:
    """Sets the moving speed of every estimated batch norm of a model.

    Raises:
        ValueError: a speed outside (0, 1], or a model that holds none.
    """
    found = [module for module in model.modules() if isinstance(module, EstBatchNorm)]
    if not found:
        raise ValueError("the model holds no EstBatchNorm; MicroBatch() puts them in")
    for module in found:
        module.moving_speed = _check_speed(moving_speed)
    return model
