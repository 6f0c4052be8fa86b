"""What was done to a model: the plan a user reads, and the steps that ``undo`` takes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from headway._edits import Edit
from headway._technique import Technique


@dataclass(frozen=True)
class Row:
    """One change: where, what stands there before and after, and by which technique."""

    name: str
    before: str
    after: str
    technique: str


@dataclass(frozen=True)
class Plan:
    """What ``apply`` would do (or did): one :class:`Row` a change, and the number of parameters before and after."""

    rows: tuple[Row, ...]
    parameters_before: int
    parameters_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "changes": [{f.name: getattr(row, f.name) for f in fields(row)} for row in self.rows],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        lines = [f"{row.name or '(the model)':<{width}}  {row.before}  ->  {row.after}" for row in self.rows]
        total = f"{len(self.rows)} changes; parameters {self.parameters_before:,} -> {self.parameters_after:,}"
        return "\n".join([*lines, total])


@dataclass
class Step:
    """One call of ``apply``: the techniques, and the edits in the order they were done."""

    techniques: tuple[Technique, ...]
    edits: list[Edit]
    labels: list[str]
    parameters_before: int
    parameters_after: int

    def plan(self) -> Plan:
        """What was done, for a user to read."""
        rows = tuple(Row(e.name, *e.describe(), label) for e, label in zip(self.edits, self.labels, strict=True))
        return Plan(rows, self.parameters_before, self.parameters_after)


class _History(list[Step]):
    """The steps of one model, kept by the model itself so that both are freed together. Copies and pickles are without: what
    they hold are other modules."""

    def __deepcopy__(self, memo: object) -> _History:
        return _History()

    def __reduce__(self) -> tuple:
        return _History, ()


_KEY = "_headway_history"


def steps_of(model: nn.Module) -> list[Step]:
    """What was done to this model and not undone, oldest first."""
    return model.__dict__.get(_KEY, [])


def remember(model: nn.Module, steps: Sequence[Step]) -> None:
    """Makes these the steps of the model."""
    if steps:
        model.__dict__[_KEY] = _History(steps)
    else:
        model.__dict__.pop(_KEY, None)
