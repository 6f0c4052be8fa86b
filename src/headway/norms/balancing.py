"""AdaB2N in a model you already have, and on its way through a stream of tasks: which task a batch is of, when one ends, what to add
to the loss, and ordinary batch norms at the end.

    model = hw.apply(model, hw.AdaB2N(num_tasks=5))

The layers, the method and its paper (arXiv 2310.08855): :mod:`headway.norms.balanced`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.norms.balanced import AdaB2N1d, AdaB2N2d, AdaB2N3d, TaskBalancedNorm
from headway.surgery import Site, Swap, Technique, apply

_BALANCED: dict[type[nn.Module], type[TaskBalancedNorm]] = {
    nn.BatchNorm1d: AdaB2N1d,
    nn.BatchNorm2d: AdaB2N2d,
    nn.BatchNorm3d: AdaB2N3d,
}


@dataclass(frozen=True)
class AdaB2N(Technique):
    """Replaces every batch norm by one with task-balanced statistics.

    Attributes:
        num_tasks, kappa, init_task_weight, renormalize, sync: of :class:`TaskBalancedNorm`.
        momentum: None keeps that of each batch norm.
    """

    num_tasks: int = 10
    kappa: float = 0.7
    momentum: float | None = None
    init_task_weight: float = 0.0
    renormalize: bool = False
    sync: bool = False

    looks_for: ClassVar[str] = "nn.BatchNorm1d, 2d or 3d"

    def change(self, site: Site) -> nn.Module | None:
        kind = _BALANCED.get(type(site.module))
        if kind is None:
            return None
        settings = {name: value for name, value in self.settings().items() if value is not None}
        return kind.from_batchnorm(site.module, **settings)  # type: ignore[arg-type]


def convert_adab2n(model: nn.Module, num_tasks: int, kappa: float = 0.7, **settings: Any) -> nn.Module:
    """:class:`AdaB2N` applied in place."""
    return apply(model, AdaB2N(num_tasks, kappa, **settings))


def layers(model: nn.Module) -> list[TaskBalancedNorm]:
    """The task-balanced norms of a model."""
    return [module for module in model.modules() if isinstance(module, TaskBalancedNorm)]


@contextmanager
def task_batch(model: nn.Module, task_ids: Tensor) -> Iterator[None]:
    """Within it, ``task_ids`` (N,) says of which task each sample of a training batch is; a model without task-balanced norms is left
    alone. The counts are taken once, for all layers. With gradient checkpointing the backward belongs into the block too.

    Raises:
        ValueError: an id below 0 or above the current task, or ids that are not one integer a sample.
    """
    found = layers(model)
    if found:
        if task_ids.dim() != 1 or task_ids.is_floating_point():
            raise ValueError(
                f"task_ids must be integers of shape (N,); they are {task_ids.dtype} {tuple(task_ids.shape)}"
            )
        first = found[0]
        task_ids = task_ids.to(first.task_weight.device, torch.int64)
        low, high = (int(v) for v in task_ids.aminmax()) if task_ids.numel() else (0, 0)
        if low < 0 or high > first.current_task:
            raise ValueError(
                f"task ids must lie from 0 to the current task {first.current_task}; they go from {low} to {high}: "
                "end_task(model) starts the next task"
            )
        counts = torch.bincount(task_ids, minlength=max(first.num_tasks, first.current_task + 1))
        if first._together():
            torch.distributed.all_reduce(counts)
        for layer in found:
            layer._batch = task_ids, counts
    try:
        yield
    finally:
        for layer in found:
            layer._batch = None


def balance_penalty(model: nn.Module, start_task: int = 1) -> Tensor:
    """The sum of the layers' penalties for their last training batch, to be weighted (0.1) and added to the loss; 0 before the task
    ``start_task``, and for a model without task-balanced norms."""
    found = [layer for layer in layers(model) if layer.current_task >= start_task]
    penalties = [penalty for layer in found if (penalty := layer.penalty()) is not None]
    if not penalties:
        some = next(model.parameters(), None)
        return torch.zeros(()) if some is None else some.new_zeros(())
    weight = found[0].task_weight
    return torch.stack(penalties).sum().to(torch.promote_types(weight.dtype, torch.float32))


def start_task(model: nn.Module, task: int) -> None:
    """Makes ``task`` (from 0) the current one in every task-balanced norm."""
    for layer in layers(model):
        layer.start_task(task)


def end_task(model: nn.Module) -> None:
    """Ends the current task; the next one begins."""
    for layer in layers(model):
        layer.start_task(layer.current_task + 1)


def grow_tasks(model: nn.Module, n: int, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Makes room for ``n`` more tasks. The optimiser's groups are re-pointed at the longer weights; its state is kept for the tasks
    there were.

    Raises:
        ValueError: n below 1, or a model without task-balanced norms.
    """
    found = layers(model)
    if n < 1 or not found:
        raise ValueError(f"tasks are added one or more at a time to a model with task-balanced norms; n is {n}")
    for layer in found:
        old = layer.task_weight
        more = old.detach().new_full((n,), layer.init_task_weight)
        layer.task_weight = nn.Parameter(torch.cat([old.detach(), more]), old.requires_grad)
        layer.num_tasks += n
        if optimizer is None:
            continue
        for group in optimizer.param_groups:
            group["params"] = [layer.task_weight if p is old else p for p in group["params"]]
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[layer.task_weight] = {
                key: torch.cat([value, value.new_zeros(n)])
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for key, value in state.items()
            }
    return model


def to_batchnorm(model: nn.Module) -> nn.Module:
    """Plain batch norms with the same parameters and statistics in place, for deployment: the same outputs in evaluation. Returns the
    model, or a new module where the model is itself such a norm."""
    root = model
    plain = {ours: bn for bn, ours in _BALANCED.items()}
    for name, module in list(model.named_modules()):
        if type(module) not in plain:
            continue
        assert isinstance(module, TaskBalancedNorm)
        new: Any = plain[type(module)](module.num_features, module.eps, module.momentum, module.affine)  # type: ignore[call-arg]
        new.weight, new.bias = module.weight, module.bias
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(new, buffer, getattr(module, buffer).clone())
        Swap(model, name, module, new.train(module.training)).do()
        root = new if module is model else root
    return root
