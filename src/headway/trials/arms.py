"""An arm of a comparison: a name, and the techniques that make it different from the task's own model and optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from headway.optim.use import UseOptimizer
from headway.surgery import Plan, Replace, Technique, apply, as_technique, plan
from headway.tasks.names import parse, split
from headway.tasks.task import by_path

BASELINE = "baseline"


@dataclass(frozen=True)
class Arm:
    """Techniques applied in order; none at all is the baseline."""

    label: str
    techniques: tuple[Technique, ...] = ()

    def build(self, model: nn.Module) -> nn.Module:
        """The model changed by this arm."""
        return apply(model, *chosen) if (chosen := self._on_the_model()) else model

    def plan(self, model: nn.Module) -> Plan | None:
        """What :meth:`build` would do; None where it would do nothing. Leaves the model alone."""
        return plan(model, *chosen) if (chosen := self._on_the_model()) else None

    def optimize(self, model: nn.Module, optimizer: Optimizer) -> Optimizer:
        """The optimiser this arm trains its changed model with, from the task's own."""
        for technique in self.techniques:
            optimizer = technique.optimize(model, optimizer)
        return optimizer

    def _on_the_model(self) -> list[Technique]:
        return [technique for technique in self.techniques if technique.changes_model]

    def identity(self) -> list[Any]:
        """What tells this arm from another, independent of its label: each technique's label and all its settings."""
        return [
            [technique.label(), {key: repr(value) for key, value in sorted(technique.settings().items())}]
            for technique in self.techniques
        ]


def arm(what: Any, label: str | None = None) -> Arm:
    """An arm from ``"baseline"``, ``"peri-ln"``, ``"mix-ln(alpha=0.5)+adam-p"``, a technique, a layer class, an optimiser class,
    the Python path of one of these with its settings (``"torch.optim:SGD(lr=0.1)"``), or a list of any of them.

    Raises:
        ValueError: an unknown name, or settings that cannot be read.
        TypeError: something that is no technique.
    """
    if isinstance(what, Arm):
        return what if label is None else Arm(label, what.techniques)
    parts = [what] if isinstance(what, str) or not isinstance(what, Sequence) else list(what)
    techniques: list[Technique] = []
    labels: list[str] = []
    for part in parts:
        if isinstance(part, str):
            for word in split(part, "+"):
                if word in ("", BASELINE):
                    continue
                techniques.append(_named(word))
                labels.append(word)
        else:
            techniques.append(_technique(part))
            labels.append(techniques[-1].label())
    return Arm(label or "+".join(labels) or BASELINE, tuple(techniques))


def arms(what: Any) -> list[Arm]:
    """All arms of a comparison: a list, a mapping from label to arm, or one comma-separated string.

    Raises:
        ValueError: no arm, or two of the same label.
    """
    if isinstance(what, str):
        what = split(what)
    if isinstance(what, Mapping):
        made = [arm(techniques, str(label)) for label, techniques in what.items()]
    elif isinstance(what, Sequence):
        made = [arm(one) for one in what]
    else:
        made = [arm(what)]
    if not made:
        raise ValueError(
            'a comparison needs at least one arm, such as ["baseline", "peri-ln"]; hw.methods() lists techniques'
        )
    labels = [one.label for one in made]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"{', '.join(twice)} stands more than once among the arms; name them apart with a mapping label -> arm"
        )
    return made


def _named(word: str) -> Technique:
    from headway.catalogue import technique

    key, settings = parse(word)
    return _technique(by_path(key), **settings) if ":" in key else technique(key, **settings)


def _technique(what: Any, **settings: Any) -> Technique:
    if isinstance(what, type) and issubclass(what, Optimizer):
        return UseOptimizer(what, **settings)
    if not settings:
        return as_technique(what)
    if isinstance(what, type) and issubclass(what, nn.Module):
        return Replace(what, **settings)
    made: Any = what(**settings) if callable(what) else what
    return as_technique(made)
