"""An optimiser as a technique: what an arm of ``hw.compare`` trains with in place of the task's own optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from headway.surgery import Technique

_SHARED = ("lr", "betas", "momentum", "dampening", "nesterov", "weight_decay", "maximize")


@dataclass(frozen=True, init=False)
class UseOptimizer(Technique):
    """Trains with another optimiser: ``hw.compare(task, ["baseline", hw.optim.AdamP])``, ``"adam-p(lr=1e-3)"``,
    ``"torch.optim:SGD(lr=0.1, momentum=0.9)"``.

    It is built from the parameter groups of the task's optimiser. Of each group it keeps the learning rate, and the betas,
    momentum and weight decay where it has a setting of that name, unless ``settings`` say otherwise.

    Args:
        kind: a class with torch.optim's signature.
        **settings: passed on to it.

    Raises:
        TypeError: ``kind`` is no optimiser class, or has no such setting.
    """

    changes_model: ClassVar[bool] = False
    kind: type[Optimizer]
    given: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, kind: type[Optimizer], **settings: Any) -> None:
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise TypeError(f"a class of torch.optim's kind was expected, such as hw.optim.AdamP, not {kind!r}")
        accepted = list(inspect.signature(kind).parameters)[1:]
        if unknown := sorted(settings.keys() - set(accepted)):
            raise TypeError(f"{kind.__name__} has no setting {', '.join(unknown)}; it takes {', '.join(accepted)}")
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "given", dict(settings))

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Optimizer:
        accepted = set(inspect.signature(self.kind).parameters)
        groups = [
            {"params": group["params"]}
            | {name: group[name] for name in _SHARED if name in group and name in accepted and name not in self.given}
            for group in optimizer.param_groups
        ]
        made: Any = self.kind
        return made(groups, **{"lr": optimizer.param_groups[0]["lr"], **self.given})

    def settings(self) -> dict[str, Any]:
        return {"kind": f"{self.kind.__module__}.{self.kind.__qualname__}", **self.given}

    def label(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.given.items())
        return f"{self.kind.__name__}({given})" if given else self.kind.__name__
