"""Several tasks on one network: a set of gains, shifts and statistics each, everything else shared.

    bank = NormBank(model)
    bank.add("digits"); ...; bank.use("letters")        the whole batch is of one task
    with bank.rows(["digits", "letters", "digits"]):    each sample of its own, in evaluation: gamma, beta gathered by row
        logits = model(batch)

arXiv 2003.00152, 2020.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.learning.batchnorm_only.task_files import (
    load_norm_state_dict,
    norm_state_dict,
    read_task,
    save_task,
    task_modules,
)


class NormBank:
    """Tasks by name, of which one at a time stands in the model.

    Args:
        model: whose normalisers are exchanged; its other weights belong to all tasks.
        include_output: the output layer is part of a task (True, or its name).

    A task is a snapshot: what the model learns later enters it by :meth:`update` alone.

    Raises:
        ValueError: no normaliser with a gain or a shift, or an output layer that cannot be told.
    """

    def __init__(self, model: nn.Module, include_output: bool | str = False) -> None:
        self.model, self.include_output = model, include_output
        self.active: str | None = None
        self._tasks: dict[str, dict[str, Tensor]] = {}
        task_modules(model, include_output)

    @property
    def tasks(self) -> list[str]:
        return list(self._tasks)

    def add(self, task: str, state: Mapping[str, Tensor] | None = None) -> None:
        """Keeps a task: what stands in the model now (it is then in use), or a state of :func:`norm_state_dict`.

        Raises:
            ValueError: a task of this name is there already, or the state does not fit.
        """
        if task in self._tasks:
            raise ValueError(f"the bank holds a task {task!r} already; remove it first or choose another name")
        now = norm_state_dict(self.model, self.include_output)
        if state is None:
            self._tasks[task], self.active = now, task
            return
        if wrong := [name for name in now if name not in state or state[name].shape != now[name].shape]:
            raise ValueError(
                f"the state of {task!r} does not fit the model: {', '.join(wrong[:4])} missing or of another shape"
            )
        self._tasks[task] = {name: state[name].detach().to(now[name].device, now[name].dtype).clone() for name in now}

    def use(self, task: str) -> None:
        """Puts a task into the model, in place, so that optimisers keep their parameters.

        Raises:
            ValueError: there is no such task.
        """
        self._check([task])
        load_norm_state_dict(self.model, self._tasks[task])
        self.active = task

    def remove(self, task: str) -> None:
        """Forgets a task; the model stays as it is."""
        self._check([task])
        del self._tasks[task]
        self.active = None if self.active == task else self.active

    def state(self, task: str) -> dict[str, Tensor]:
        """Copies of a task's tensors, as :func:`norm_state_dict` names them."""
        self._check([task])
        return {name: tensor.clone() for name, tensor in self._tasks[task].items()}

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes ``<task>.safetensors`` for every task and returns their paths."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [save_task(self.state(task), Path(folder) / f"{task}.safetensors") for task in self._tasks]

    def load(self, folder: str | os.PathLike[str]) -> list[str]:
        """Adds the tasks that :meth:`save` wrote, by the names of their files, and returns these.

        Raises:
            FileNotFoundError: there is no such file in the folder.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no *.safetensors; NormBank.save writes them")
        for file in files:
            self.add(file.stem, read_task(file))
        return [file.stem for file in files]

    def update(self) -> None:
        """Takes what stands in the model now into the task in use.

        Raises:
            ValueError: none is in use.
        """
        if self.active is None:
            raise ValueError("no task of the bank is in use; add(task) keeps what stands in the model under a name")
        self._tasks[self.active] = norm_state_dict(self.model, self.include_output)

    def _check(self, tasks: Sequence[str]) -> None:
        if unknown := sorted({task for task in tasks if task not in self._tasks}):
            raise ValueError(
                f"the bank has no task {', '.join(unknown)}; it has {', '.join(self._tasks) or 'none yet'}"
            )

    @contextmanager
    def rows(self, tasks: Sequence[str]) -> Iterator[nn.Module]:
        """Within it each sample of the batch is computed with the task of its own, in evaluation mode.

        Args:
            tasks: a task for every sample, along the first axis of what every normaliser sees.

        Raises:
            ValueError: an unknown task, a model in training mode, a kind of normaliser or output layer that cannot be gathered by
                row, or (in the pass) another number of samples.
        """
        self._check(tasks)
        if self.model.training:
            raise ValueError(
                "tasks by row are for evaluation: statistics of a mixed batch belong to no task; call model.eval()"
            )
        names = list(dict.fromkeys(tasks))
        index = torch.tensor([names.index(task) for task in tasks])
        swapped: list[nn.Module] = []
        try:
            for name, module, keys in task_modules(self.model, self.include_output):
                prefix = f"{name}." if name else ""
                stacked = {key: torch.stack([self._tasks[task][prefix + key] for task in names])[index] for key in keys}
                module.forward = _by_row(name, module, stacked)  # type: ignore[method-assign]
                swapped.append(module)
            yield self.model
        finally:
            for module in swapped:
                del module.forward  # type: ignore[attr-defined]


def _by_row(name: str, module: Any, rows: dict[str, Tensor]) -> Any:
    """The module's forward with tensors (samples, ...) in place of its own."""
    weight, bias = rows.get("weight"), rows.get("bias")
    if "forward" in module.__dict__:
        raise ValueError(f"{name} has a forward of its own already; leave the other rows(...) block first")
    if isinstance(module, _BatchNorm):
        if module.running_mean is None:
            raise ValueError(
                f"{name} keeps no running statistics, so its rows depend on each other; use one task a batch"
            )
        scale = torch.rsqrt(rows["running_var"] + module.eps)
        scale = scale if weight is None else scale * weight
        shift = -rows["running_mean"] * scale
        shift = shift if bias is None else shift + bias
        return _checked(name, module, rows, lambda x: _channels(x, scale, shift))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        shape, eps = list(module.normalized_shape), module.eps
        return _checked(name, module, rows, lambda x: _last(norm(x, shape, eps=eps), weight, bias, len(shape)))  # type: ignore[call-arg]
    if isinstance(module, nn.GroupNorm):
        groups, eps = module.num_groups, module.eps
        return _checked(name, module, rows, lambda x: _channels(F.group_norm(x, groups, eps=eps), weight, bias))
    if isinstance(module, nn.Linear):
        assert weight is not None

        def linear(x: Tensor) -> Tensor:
            y = torch.matmul(x.flatten(1, -2) if x.dim() > 2 else x[:, None], weight.transpose(1, 2))
            y = y if bias is None else y + bias[:, None]
            return y.reshape(*x.shape[:-1], -1)

        return _checked(name, module, rows, linear)
    raise ValueError(f"{name} is a {type(module).__name__}, whose gain cannot be gathered by row; use one task a batch")


def _checked(name: str, module: nn.Module, rows: Mapping[str, Tensor], call: Any) -> Any:
    samples = len(next(iter(rows.values())))

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if module.training:
            raise ValueError(f"tasks by row are for evaluation, and {name} is in training mode; call model.eval()")
        if len(x) != samples:
            raise ValueError(
                f"{samples} tasks were given by row, and {name} sees {len(x)} samples; give one task a sample"
            )
        return call(x)

    return forward


def _channels(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    view = (len(x), -1, *(1,) * (x.dim() - 2))
    y = x if scale is None else x * scale.view(view).to(x.dtype)
    return y if shift is None else y + shift.view(view).to(x.dtype)


def _last(x: Tensor, scale: Tensor | None, shift: Tensor | None, axes: int) -> Tensor:
    def view(t: Tensor) -> Tensor:
        return t.view(len(t), *(1,) * (x.dim() - 1 - axes), *t.shape[1:]).to(x.dtype)

    y = x if scale is None else x * view(scale)
    return y if shift is None else y + view(shift)
