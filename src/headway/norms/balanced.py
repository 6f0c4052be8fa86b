"""AdaB2N: batch norm whose statistics give every task its share, for continual learning with rehearsal.

    pi_j = (exp(omega_j) + n_j) / sum over the tasks seen so far        n_j: samples of task j in this batch, omega learned
    mean = sum of (pi_k / n_k) * mean over the positions of x_i,  k the task of sample i;  var likewise
    running += eta_t * (statistic - running),  eta_t = eta_(t-1) / (eta_(t-1) + (1 - momentum)^kappa)

Batch norm's statistics belong to the newest task: most of a batch is new, and the running average forgets at a constant rate. Here the
batch's statistics are weighted by task, and the rate lies between that of batch norm (kappa 1) and of a plain average (kappa 0). A
penalty holds both near each other. Paper: "Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and
Adaptation" (Lyu et al.), NeurIPS 2023, arXiv 2310.08855. For online, single-pass class- or domain-incremental training with a replay
buffer and known task ids. Not for offline training, for models without batch norm, or for streams without task boundaries.

    model = hw.apply(model, hw.AdaB2N(num_tasks=5))
    with task_batch(model, task_ids):                      # new and replayed samples in ONE forward pass
        loss = F.cross_entropy(model(x), y) + 0.1 * balance_penalty(model)
    end_task(model)                                        # between two tasks
    deployed = to_batchnorm(model)                         # ordinary batch norms

The task weights ``task_weight`` belong into the optimiser, without weight decay. :mod:`headway.norms.balancing` has these calls, and
:mod:`headway.tasks.rehearsal` the buffer and the training steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.kernels.planes import Tasks, plane_step
from headway.norms.statistics import RunningStatistics, by_running_statistics


class TaskBalancedNorm(RunningStatistics, _BatchNorm):
    """Batch norm with task-balanced statistics and a rate between exponential and cumulative averaging.

    Args:
        num_features: channels.
        num_tasks: how many tasks there will be; :func:`headway.norms.balancing.grow_tasks` adds more.
        kappa: 1 for batch norm's constant rate, 0 for a plain average of all batches.
        momentum: batch norm's, the share of a new batch.
        eps: added to the variance.
        affine: a gain and an offset a channel.
        init_task_weight: omega at the start; at -40 a task weighs what it has in the batch, at +40 all tasks weigh the same.
        renormalize: weigh only tasks that are in the batch. False, as released, keeps the shares of absent ones, which shrinks mean
            and variance by what is missing.
        sync: statistics over the batches of all processes of the default group.

    Shapes:
        input and output: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d.

    The biased variance is stored. A batch with NaN or infinity and an empty one move nothing. Evaluation is batch norm's.

    Raises:
        ValueError: a setting out of its range, an input of another shape, or task ids that do not fit the batch.
        RuntimeError: a training pass outside :func:`headway.norms.balancing.task_batch` once there is more than one task, or beyond
            the last task.
    """

    dims: tuple[int, ...] = (2, 3, 4, 5)
    exact = ("eta",)
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    cur_tasks: Tensor
    eta: Tensor

    def __init__(
        self,
        num_features: int,
        num_tasks: int,
        kappa: float = 0.7,
        momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        init_task_weight: float = 0.0,
        renormalize: bool = False,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1; it is {num_tasks}")
        if not 0 <= kappa <= 1:
            raise ValueError(f"kappa must lie between 0 and 1; it is {kappa}")
        if momentum is None or not 0 < momentum <= 1:
            raise ValueError(
                f"momentum must be above 0 and at most 1; it is {momentum}. kappa=0 is the plain average that None would mean"
            )
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.num_tasks, self.kappa, self.renormalize, self.sync = num_tasks, kappa, renormalize, sync
        self.init_task_weight = init_task_weight
        self.task_weight = nn.Parameter(torch.full((num_tasks,), float(init_task_weight), device=device, dtype=dtype))
        self.decay = (1 - momentum) ** kappa
        self.register_buffer("eta", torch.tensor(self.rate_after(0), dtype=torch.float64, device=device))
        self.register_buffer("cur_tasks", torch.zeros((), dtype=torch.int64, device=device))
        self.current_task = 0  # what cur_tasks holds, without reading it back
        self._batch: tuple[Tensor, Tensor] | None = None
        self._penalty: Tensor | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.dims or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} takes {' or '.join(map(str, self.dims))} dimensions with {self.num_features} channels as "
                f"the second; the input has the shape {tuple(input.shape)}"
            )

    def rate_after(self, batches: int) -> float:
        """eta of the last of so many batches, the recursion summed up; before the first, what gives momentum^kappa there."""
        assert self.momentum is not None
        first, decay = self.momentum**self.kappa, self.decay
        if first == 1 and not batches:
            return 1.0 if decay == 0 else torch.inf
        # 1 / eta_t = 1 + decay / eta_(t-1)
        ones = batches - 1 if decay == 1 else (1 - decay ** (batches - 1)) / (1 - decay)
        return 1 / (decay ** (batches - 1) / first + ones)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return by_running_statistics(x, self)
        planes = x[..., None] if x.dim() == 2 else x.flatten(2)
        sync, moves = self._together(), self._frozen == 0
        if planes.shape[0] * planes.shape[2] == 1 and not sync:
            warnings.warn("one value a channel in training: its variance is 0 and the output the bias", stacklevel=2)
        # before the output: a recomputation under checkpointing ends with the last tensor that the backward needs
        if moves and (planes.numel() or sync):
            self.num_batches_tracked.add_(1)
        # past nn.Module's own bookkeeping of attributes, which takes longer than the penalty itself
        y, _, _, self.__dict__["_penalty"] = plane_step(
            planes, self.weight, self.bias, (self.running_mean, self.running_var), self.eta, decay=self.decay, moves=moves,
            tasks=self._tasks(x), eps=self.eps, sync=sync,
        )  # fmt: skip
        return y.reshape(x.shape)

    def _tasks(self, x: Tensor) -> Tasks | None:
        """The tasks of the batch; None for the first one, whose samples count alike."""
        if self.current_task == 0:
            return None
        if self.current_task >= self.num_tasks:
            raise RuntimeError(f"all {self.num_tasks} tasks have ended; grow_tasks(model, n) makes room for more")
        if self._batch is None:
            raise RuntimeError(
                "from the second task on, a training pass needs the tasks of its samples: with task_batch(model, task_ids): ..."
            )
        task_ids, counts = self._batch
        if task_ids.shape[0] != x.shape[0]:
            raise ValueError(f"{task_ids.shape[0]} task ids were given for a batch of {x.shape[0]} samples")
        return Tasks(self.task_weight, task_ids, counts, self.current_task + 1, self.renormalize)

    def penalty(self) -> Tensor | None:
        """Mean squared distance of the last training batch's statistics from the running ones as they were then, the latter
        constant; None before the first batch."""
        return self._penalty

    def start_task(self, task: int) -> None:
        """Makes ``task`` (from 0) the current one."""
        if task < 0:
            raise ValueError(f"tasks are counted from 0; it is {task}")
        self.current_task = task
        self.cur_tasks.fill_(task)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        batches = state_dict.get(f"{prefix}num_batches_tracked")
        if f"{prefix}eta" not in state_dict and batches is not None:  # the released code does not keep it
            state_dict[f"{prefix}eta"] = self.eta.new_tensor(self.rate_after(int(batches)))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.current_task = int(self.cur_tasks)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batch": None, "_penalty": None}  # a graph can be neither copied nor stored

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_tasks={self.num_tasks}, kappa={self.kappa}, momentum={self.momentum}, eps={self.eps}"

    @classmethod
    def from_batchnorm(cls, bn: _BatchNorm, num_tasks: int, **settings: Any) -> TaskBalancedNorm:
        """The layer with the very parameters, the statistics, ``eps`` and momentum of a batch norm.

        Raises:
            ValueError: the batch norm has no momentum, and none is given, or keeps no statistics.
        """
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError("a batch norm that keeps no running statistics has none to balance")
        given: dict[str, Any] = {"eps": bn.eps, "momentum": bn.momentum, **settings}
        new = cls(bn.num_features, num_tasks, affine=bn.affine, **given)
        new.to(bn.running_mean.device)
        if bn.affine:
            new.weight, new.bias = bn.weight, bn.bias
        new.running_mean.copy_(bn.running_mean)
        new.running_var.copy_(bn.running_var)
        return new.train(bn.training)


class AdaB2N1d(TaskBalancedNorm):
    __doc__ = TaskBalancedNorm.__doc__
    dims = (2, 3)


class AdaB2N2d(TaskBalancedNorm):
    __doc__ = TaskBalancedNorm.__doc__
    dims = (4,)


class AdaB2N3d(TaskBalancedNorm):
    __doc__ = TaskBalancedNorm.__doc__
    dims = (5,)
