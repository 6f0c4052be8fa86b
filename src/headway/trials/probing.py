"""Probes the model of any task: finds out what the task's loss calls the model with, and hands both to ``hw.probe``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from headway.signals.flow import Flow
from headway.signals.probe import probe
from headway.tasks.task import Task


class _Asked(Exception):
    def __init__(self, arguments: tuple, keywords: dict[str, Any]) -> None:
        self.arguments, self.keywords = arguments, keywords


class _Asker(nn.Module):
    """Stands in for the model to learn what it is called with."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        raise _Asked(arguments, keywords)


class _Answerer(nn.Module):
    """Stands in for the model and answers with an output that is known already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.output


def call_of(task: Task, batch: Any) -> tuple[tuple, dict[str, Any]]:
    """What ``task.loss`` calls the model with for this batch.

    Raises:
        TypeError: the loss never calls the model.
    """
    try:
        task.loss(_Asker(), batch)
    except _Asked as asked:
        return asked.arguments, asked.keywords
    raise TypeError(
        f"the loss of {task.name} does not call the model it is given; call model(...) in loss(model, batch)"
    )


def flow_of(model: nn.Module, task: Task, device: torch.device | str = "cpu") -> Flow:
    """A probe of ``model`` on the task's probe batch and with its loss. Raises what ``hw.probe`` raises."""
    batch = send_to_device(task.probe_batch(), device)
    arguments, keywords = call_of(task, batch)

    def loss(output: Any) -> Tensor:
        return task.loss(_Answerer(output), batch)

    # keywords go in as one mapping where they can: they may be called like settings of the probe
    if keywords and not arguments:
        return probe(model, keywords, loss=loss)
    return probe(model, *arguments, loss=loss, **keywords)


def probe_task(model: nn.Module, task: Task, device: torch.device) -> dict[str, Any]:
    """The plain data of a probe of ``model`` on the task's probe batch, or ``{"note": why there is none}``.

    The probe sees a copy, so that neither gradients nor running statistics of the model change.
    """
    try:
        return flow_of(copy.deepcopy(model), task, device).to_dict()
    except Exception as error:
        # A model that cannot be probed can still be trained and compared.
        return {"note": f"no probe: {type(error).__name__}: {error}"}
