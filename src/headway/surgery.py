"""Find, replace and rewire the modules of an existing model: ``apply``, ``plan``, ``undo``.

A :class:`Technique` is a frozen dataclass whose fields are its settings. ``apply`` shows it every module of the model as a
:class:`Site`; what it returns takes that module's place. Weights, tied parameters, shared modules, device and training mode
survive; everything done is recorded, so that ``undo`` takes it back exactly.
"""

from __future__ import annotations

import contextlib
import copy as copying
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from headway._edits import Edit, SetAttribute, SetParameter, Swap, fused_paths_off, nested_tensors_off
from headway._optimizers import owners_in, repoint
from headway._record import Plan, Row, Step, remember, steps_of
from headway._sites import Site, Where, refuse_wrapped, sites
from headway._technique import Replace, Technique, like

__all__ = [
    "Edit",
    "NothingToChange",
    "Plan",
    "Replace",
    "Row",
    "SetAttribute",
    "SetParameter",
    "Site",
    "Swap",
    "Technique",
    "Where",
    "applied",
    "apply",
    "applying",
    "as_technique",
    "fused_paths_off",
    "history",
    "like",
    "nested_tensors_off",
    "plan",
    "sites",
    "undo",
]
logger = logging.getLogger("headway")


class NothingToChange(ValueError):
    """A technique found no module it could change. The message names what it looked for and what the model holds."""


def as_technique(what: Technique | type) -> Technique:
    """A technique from a technique, a technique class, or a layer class with ``from_module``."""
    if isinstance(what, Technique):
        return what
    if isinstance(what, type) and issubclass(what, Technique):
        return what()
    if isinstance(what, type) and issubclass(what, nn.Module):
        return Replace(what)
    if isinstance(what, type) and issubclass(what, torch.optim.Optimizer):
        raise TypeError(_no_model_change(what.__name__))
    raise TypeError(
        f"a technique was expected, such as hw.PeriLN() or hw.norms.LayerNorm, not {what!r}; hw.methods() lists them all"
    )


def _no_model_change(name: str) -> str:
    return f"{name} is an optimiser and changes no model; build it from model.parameters(), or name it as an arm of hw.compare"


def apply(
    model: nn.Module,
    *techniques: Technique | type,
    where: Where | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    copy: bool = False,
) -> nn.Module:
    """Changes a model with one or more techniques and returns it.

    Args:
        model: any ``nn.Module``, not yet wrapped (DDP, FSDP, ``torch.compile``).
        *techniques: techniques, or layer classes that can stand in for others, applied in this order.
        where: restricts the sites: a glob on qualified names ("encoder.*"), several, or a predicate on :class:`Site`.
        optimizer: its parameter groups are re-pointed at the new parameters; state is kept where a parameter keeps its shape.
        copy: change a deep copy and leave ``model`` alone.

    Returns:
        The same object, changed (a copy with ``copy=True``; a new module where the model itself is what was replaced).

    Raises:
        NothingToChange: a technique matched nothing; the model is left as it was.
        TypeError: the model is wrapped, or something that is no technique was given.
    """
    if not techniques:
        raise TypeError(
            "apply needs at least one technique, e.g. hw.apply(model, hw.PeriLN()); hw.methods() lists them all"
        )
    chosen = tuple(as_technique(technique) for technique in techniques)
    refuse_wrapped(model)
    if idle := [technique.label() for technique in chosen if not technique.changes_model]:
        raise TypeError(_no_model_change(idle[0]))
    if copy:
        if optimizer is not None:
            raise ValueError(
                "copy=True and optimizer= exclude each other: the optimiser holds the parameters of the original"
            )
        model = copying.deepcopy(model)
    owners = owners_in(optimizer, model)
    former = steps_of(model)
    step, model = _run(model, chosen, where)
    remember(model, [*former, step])
    if optimizer is not None:
        repoint(optimizer, model, step.edits, owners)
        for technique in chosen:
            technique.optimize(model, optimizer)
    logger.info("%s", step.plan())
    return model


def plan(model: nn.Module, *techniques: Technique | type, where: Where | None = None) -> Plan:
    """Answers what :func:`apply` would do, and leaves the model and the random generator as they were."""
    if not techniques:
        raise TypeError(
            "plan needs at least one technique, e.g. hw.plan(model, hw.PeriLN()); hw.methods() lists them all"
        )
    chosen = tuple(as_technique(technique) for technique in techniques)
    refuse_wrapped(model)
    with torch.random.fork_rng():
        step, _ = _run(model, chosen, where)
    _take_back(step.edits)
    return step.plan()


def undo(model: nn.Module, steps: int = 1, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Takes back the last ``steps`` calls of :func:`apply` and returns the model as it was before them.

    Parameters that the change shared with the original keep what they have learned since.

    Args:
        model: what ``apply`` returned.
        steps: how many calls.
        optimizer: its parameter groups are re-pointed at the former parameters.

    Raises:
        ValueError: the model has not been changed that often (a copy or a loaded model carries no history), or a technique
            cannot be undone.
    """
    done = list(steps_of(model))
    if steps < 1 or steps > len(done):
        raise ValueError(
            f"undo was asked for {steps} step(s), and {len(done)} call(s) of apply are recorded for this model"
        )
    for step in done[-steps:]:
        for technique in step.techniques:
            if not technique.undoable:
                raise ValueError(f"{technique.label()} cannot be undone; keep a copy with apply(..., copy=True)")
    for _ in range(steps):
        owners = owners_in(optimizer, model)
        step = done.pop()
        _take_back(step.edits)
        remember(model, [])
        model = _root_before(step.edits, model)
        remember(model, done)
        if optimizer is not None:
            repoint(optimizer, model, step.edits, owners, back=True)
    return model


def history(model: nn.Module) -> list[Plan]:
    """What every call of :func:`apply` did to this model, oldest first."""
    return [step.plan() for step in steps_of(model)]


def applied(model: nn.Module) -> list[Technique]:
    """The techniques applied to this model and not undone, oldest first."""
    return [technique for step in steps_of(model) for technique in step.techniques]


def _run(model: nn.Module, techniques: Sequence[Technique], where: Where | None) -> tuple[Step, nn.Module]:
    """Does all edits and returns them with the new root; on any error everything done so far is taken back."""
    before = _count(model)
    done: list[Edit] = []
    labels: list[str] = []
    root = model
    try:
        for technique in techniques:
            allowed = list(sites(root, where))
            edits = technique.edits(root, allowed)
            if not edits:
                raise NothingToChange(_nothing(technique, root, where))
            for edit in edits:
                done.append(edit)
                labels.append(technique.label())
                edit.do()
                if isinstance(edit, Swap) and edit.old is root:
                    root = edit.new
    except BaseException:
        _take_back(done)
        raise
    return Step(tuple(techniques), done, labels, before, _count(root)), root


def _take_back(edits: Sequence[Edit]) -> None:
    for edit in reversed(edits):
        edit.undo()


def _root_before(edits: Sequence[Edit], root: nn.Module) -> nn.Module:
    for edit in reversed(edits):
        if isinstance(edit, Swap) and edit.new is root:
            root = edit.old
    return root


def _nothing(technique: Technique, model: nn.Module, where: Where | None) -> str:
    seen: dict[str, int] = {}
    for module in model.modules():
        seen[type(module).__name__] = seen.get(type(module).__name__, 0) + 1
    listed = ", ".join(f"{count} {name}" for name, count in sorted(seen.items(), key=lambda item: -item[1])[:12])
    limited = f" within where={where!r}" if where is not None else ""
    return f"{technique.label()} found nothing to change: it looks for {technique.looks_for}{limited}; the model holds {listed}"


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def applying(model: nn.Module, *techniques: Technique | type, where: Where | None = None) -> Iterator[nn.Module]:
    """The model changed inside a ``with`` block and restored after it."""
    changed = apply(model, *techniques, where=where)
    try:
        yield changed
    finally:
        undo(changed)
