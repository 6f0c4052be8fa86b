"""What a comparison trains on: a task gives a model, batches, a loss and a held-out measure.

Any object with the attributes and methods of :class:`Task` will do; subclassing it fills in the defaults. Names:
``get("stdlib-text(depth=12, dim=64)")`` for the built-in ones, ``get("pkg.module:make_task")`` for your own.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headway.tasks.names import parse

_BUILT_IN = {
    "stdlib-text": "headway.tasks.text:StdlibText",
    "text": "headway.tasks.text:TextFiles",
    "text-reversal": "headway.tasks.reversal:TextReversal",
    "digits": "headway.tasks.digits:Digits",
    "digits-vit": "headway.tasks.digits:DigitsViT",
    "digits-relabelled": "headway.tasks.relabelled:DigitsRelabelled",
    "digits-blocks": "headway.tasks.blocks:DigitsBlocks",
    "prior-fitted-regression": "headway.tasks.prior_fitted:PriorFittedRegression",
    "digits-diffusion": "headway.tasks.diffusion:DigitsDiffusion",
    "digits-incremental": "headway.tasks.incremental:DigitsIncremental",
    "digits-random-features": "headway.tasks.random_features:DigitsRandomFeatures",
    "digits-microbatch": "headway.tasks.microbatch:DigitsMicroBatch",
    "digits-mosaic": "headway.tasks.mosaic:DigitsMosaic",
    "digits-inpainting": "headway.tasks.inpainting:DigitsInpainting",
    "digits-translation": "headway.tasks.translation:DigitsTranslation",
    "inpainting": "headway.tasks.photos:PhotoInpainting",
    "translation": "headway.tasks.photos:PhotoTranslation",
    "mnist": "headway.tasks.digits:MNIST",
    "cifar": "headway.tasks.digits:CIFAR",
    "table": "headway.tasks.tables:Table",
}
_NEEDED = (
    "name",
    "metric",
    "lower_is_better",
    "model",
    "train_batches",
    "loss",
    "evaluate",
    "probe_batch",
    "optimizer",
)


class Task:
    """Something to train, and how well it went.

    Attributes:
        name: as it stands in tables.
        metric: the key of :meth:`evaluate`'s answer that decides.
        lower_is_better: which way that number is good.
        batch_size: samples a step, over all processes together.
        budget: how long a run lasts unless told otherwise ("200 steps", "60 s").
        learning_rate: of the default optimiser.
    """

    name: str = "task"
    metric: str = "loss"
    lower_is_better: bool = True
    batch_size: int = 32
    budget: str = "200 steps"
    learning_rate: float = 1e-3

    def model(self, seed: int) -> nn.Module:
        """A fresh model. The global generator is seeded with ``seed`` before the call."""
        raise NotImplementedError

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Any]:
        """An endless iterator of batches that depends on the seed alone. One with ``skip(n)`` resumes without reading."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss over the samples of a batch, a scalar. Call ``model(...)`` only: it may be wrapped for several
        processes."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out measures of a model in evaluation mode, ``self.metric`` among them; called without gradients."""
        raise NotImplementedError

    def probe_batch(self) -> Any:
        """The batch on which the signal is probed."""
        return next(self.train_batches(0, self.batch_size))

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser: AdamW by default."""
        return torch.optim.AdamW(params, lr=self.learning_rate)

    def rate(self, progress: float) -> float:
        """The factor on the learning rate when ``progress`` (0 to 1) of the budget is used: warm-up over the first tenth,
        then half a cosine down to a tenth."""
        if progress < 0.1:
            return max(progress, 1e-3) / 0.1
        return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * (progress - 0.1) / 0.9))

    def settings(self) -> dict[str, Any]:
        """What tells this task from another of the same name: the public attributes that are plain values."""
        plain = (int, float, str, bool, tuple, list, type(None))
        return {
            key: value
            for key, value in sorted(vars(self).items())
            if not key.startswith("_") and isinstance(value, plain)
        }


def names() -> list[str]:
    """The built-in tasks."""
    return sorted(_BUILT_IN)


def get(what: str | Task, **settings: Any) -> Task:
    """A task by name, with settings: ``get("stdlib-text", depth=12)``, ``get("stdlib-text(depth=12)")``, or by the Python path
    of its class or factory: ``get("pkg.module:make_task")``. A task is returned as it is.

    Raises:
        ValueError: no such name, or the path leads nowhere.
        TypeError: a setting the task does not have, or the path leads to something that is no task.
    """
    if not isinstance(what, str):
        return check(what)
    key, written = parse(what)
    settings = {**written, **settings}
    path = key if ":" in key else _BUILT_IN.get(key)
    if path is None:
        near = difflib.get_close_matches(key, _BUILT_IN, n=2, cutoff=0.5) or names()
        raise ValueError(
            f"there is no task {key!r}; did you mean {' or '.join(near)}? Your own is named pkg.module:make_task"
        )
    made = by_path(path)
    if not callable(made):
        return check(made, key)
    _check_settings(key, made, settings)
    return check(made(**settings), key)


def check(task: Any, name: str = "") -> Task:
    """The task itself, once it is seen to have all a task needs.

    Raises:
        TypeError: something is missing; the message lists what.
    """
    missing = [part for part in _NEEDED if not hasattr(task, part)]
    if missing or isinstance(task, type):
        what = f"{name} gives" if name else "a task was expected, not"
        detail = f"lacks {', '.join(missing)}" if missing else "is a class; call it"
        raise TypeError(
            f"{what} {task!r}, which {detail}; subclass headway.tasks.Task, or give one of {', '.join(names())}"
        )
    return task


def by_path(path: str) -> Callable[..., Any] | Any:
    """What a Python path names: ``"pkg.module:name"``; ValueError where it leads nowhere."""
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        # A console script does not search the working directory, where a user's own module lies.
        sys.path.append(os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ValueError(
                f"{path!r} was not found: there is no module {error.name}; run from the folder that holds it, or install it"
            ) from None
        raise
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{path!r} was not found: {module_name} has no {attribute!r}; write pkg.module:name")
        value = getattr(value, part)
    return value


def _check_settings(key: str, made: Callable[..., Any], settings: dict[str, Any]) -> None:
    accepted = inspect.signature(made).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if not free and (unknown := sorted(settings.keys() - accepted.keys())):
        raise TypeError(f"{key} has no setting {', '.join(unknown)}; it takes {', '.join(accepted) or 'none'}")
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in settings
    ]
    if missing:
        raise TypeError(f"{key} needs {', '.join(missing)}; write {key}({missing[0]}=...)")
