"""Find, replace and rewire the modules of an existing model: ``apply``, ``plan``, ``undo``.

A :class:`Technique` is a frozen dataclass whose fields are its settings. ``apply`` shows it every module of the model as a
:class:`Site`; what it returns takes that module's place. Weights, tied parameters, shared modules, device and training mode
survive; everything done is recorded, so that ``undo`` takes it back exactly.
"""

from __future__ import annotations

import contextlib
import copy as copying
import fnmatch
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

logger = logging.getLogger("headway")
Where = str | Sequence[str] | Callable[["Site"], bool]


class NothingToChange(ValueError):
    """A technique found no module it could change. The message names what it looked for and what the model holds."""


@dataclass(frozen=True)
class Site:
    """A module where a technique may act.

    Attributes:
        module: the module itself.
        name: its qualified name in the model ("" for the model itself); the first one for a module used in several places.
        parent: the module that owns it (None for the model itself).
        model: the whole model.
    """

    module: nn.Module
    name: str
    parent: nn.Module | None
    model: nn.Module


class Edit:
    """One change to a model that can be taken back. ``do`` and ``undo`` are each other's exact inverse."""

    name: str = ""

    def do(self) -> None:
        raise NotImplementedError

    def undo(self) -> None:
        raise NotImplementedError

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        """Old parameter -> the new one that stands in its place, for the optimiser."""
        return {}

    def describe(self) -> tuple[str, str]:
        """What stands there before and after, for the plan."""
        return "", ""


def _brief(module: nn.Module) -> str:
    text = repr(module)
    if "\n" not in text and len(text) <= 90:
        return text
    extra = module.extra_repr()
    return (
        f"{type(module).__name__}({extra})"
        if extra and "\n" not in extra and len(extra) <= 60
        else type(module).__name__
    )


class Swap(Edit):
    """Puts ``new`` wherever ``old`` stands in ``model`` (every place, so that shared modules stay shared).

    Parameters of ``new`` that carry the name and shape of a parameter of ``old`` count as moved; if the old one was tied to a
    parameter elsewhere, the tie is renewed, unless ``untie`` is True.
    """

    def __init__(self, model: nn.Module, name: str, old: nn.Module, new: nn.Module, untie: bool = False) -> None:
        self.model, self.name, self.old, self.new = model, name, old, new
        self._places = [
            (parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old
        ]
        self._retied: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self._untie = untie

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        old, new = dict(self.old.named_parameters()), dict(self.new.named_parameters())
        return {
            old[name]: new[name]
            for name in old.keys() & new.keys()
            if old[name] is not new[name] and old[name].shape == new[name].shape
        }

    def do(self) -> None:
        for parent, key in self._places:
            parent._modules[key] = self.new
        if self._untie:
            return
        moved = self.moved()
        inside = {id(module) for module in self.new.modules()}
        self._retied = [
            (owner, key, parameter, moved[parameter])
            for owner in self.model.modules()
            if id(owner) not in inside
            for key, parameter in owner._parameters.items()
            if parameter is not None and parameter in moved
        ]
        for owner, key, _, fresh in self._retied:
            owner._parameters[key] = fresh

    def undo(self) -> None:
        for owner, key, former, _ in self._retied:
            owner._parameters[key] = former
        for parent, key in self._places:
            parent._modules[key] = self.old

    def describe(self) -> tuple[str, str]:
        return _brief(self.old), _brief(self.new)


class SetParameter(Edit):
    """Puts another tensor behind a parameter name of one module (a class token, a position table, a bias that was None)."""

    def __init__(self, owner: nn.Module, attribute: str, new: nn.Parameter | None, name: str = "") -> None:
        self.owner, self.attribute, self.new, self.name = owner, attribute, new, name or attribute
        self.old = owner._parameters.get(attribute)
        self._had = attribute in owner._parameters

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        same = self.old is not None and self.new is not None and self.old.shape == self.new.shape
        return {self.old: self.new} if same else {}  # type: ignore[dict-item]

    def do(self) -> None:
        self.owner.register_parameter(self.attribute, self.new)

    def undo(self) -> None:
        if self._had:
            self.owner._parameters[self.attribute] = self.old
        else:
            del self.owner._parameters[self.attribute]

    def describe(self) -> tuple[str, str]:
        return tuple("None" if p is None else f"parameter {tuple(p.shape)}" for p in (self.old, self.new))  # type: ignore


_ABSENT = object()


class SetAttribute(Edit):
    """Sets a plain Python attribute of an object (``norm_first`` of a layer, a field of a configuration)."""

    def __init__(self, owner: object, attribute: str, value: object, name: str = "") -> None:
        self.owner, self.attribute, self.value, self.name = owner, attribute, value, name or attribute
        self.before = getattr(owner, attribute, _ABSENT)

    def do(self) -> None:
        setattr(self.owner, self.attribute, self.value)

    def undo(self) -> None:
        if self.before is _ABSENT:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.before)

    def describe(self) -> tuple[str, str]:
        before = "not set" if self.before is _ABSENT else repr(self.before)
        return f"{self.attribute} = {before}", f"{self.attribute} = {self.value!r}"


class Technique:
    """What can be done to a forward pass. Subclasses are frozen dataclasses; their fields are the settings.

    Override :meth:`change` for what concerns one module at a time, or :meth:`edits` for what has to see the whole model.
    """

    looks_for: ClassVar[str] = "modules it can change"
    undoable: ClassVar[bool] = True

    def change(self, site: Site) -> nn.Module | None:
        """The module that takes the place of ``site.module``, or None to leave it. Reuse its Parameter objects where their
        values stay the same, so that optimisers and tied weights keep working. Must not modify ``site.module``."""
        return None

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        """Everything to be done to ``model``, not yet done. ``sites`` are the modules the user allows to change."""
        found: list[Edit] = []
        inside_replaced: set[int] = set()
        for site in sites:
            if id(site.module) in inside_replaced:
                continue
            new = self.change(site)
            if new is not None and new is not site.module:
                inside_replaced.update(id(module) for module in site.module.modules())
                found.append(Swap(model, site.name, site.module, _like(site.module, new)))
        return found

    def settings(self) -> dict[str, Any]:
        """The fields and their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def label(self) -> str:
        """A short name with the settings that differ from their defaults: ``PeriLN(eps=1e-05)``."""
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if f.init and getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(given)})" if given else type(self).__name__


@dataclass(frozen=True, init=False)
class Replace(Technique):
    """Replaces modules by another layer that knows how to stand in for them.

    The layer is a module class with ``from_module(module, *, site, **settings)``, which returns the new module, or None where
    it cannot stand in. ``hw.apply(model, Layer)`` is short for ``hw.apply(model, hw.Replace(Layer))``.

    Args:
        layer: e.g. ``hw.norms.LayerNorm``.
        where: a glob on qualified names, several of them, or a predicate on :class:`Site`; everywhere by default.
        **settings: passed on to ``from_module``.
    """

    layer: type[nn.Module]
    where: Where | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, layer: type[nn.Module], where: Where | None = None, **settings: Any) -> None:
        if not hasattr(layer, "from_module"):
            raise TypeError(
                f"{getattr(layer, '__name__', layer)!s} cannot stand in for another module: it has no from_module; "
                "write a Technique whose change(site) returns the new module"
            )
        accepted = inspect.signature(layer.from_module).parameters  # type: ignore[attr-defined]
        free = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        known = accepted if not free else {**accepted, **inspect.signature(layer.__init__).parameters}
        if unknown := sorted(settings.keys() - known.keys()):
            options = sorted(known.keys() - {"self", "module", "site", "settings", "device", "dtype"})
            raise TypeError(f"{layer.__name__} has no setting {', '.join(unknown)}; it takes {', '.join(options)}")
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "given", dict(settings))

    @property
    def looks_for(self) -> str:  # type: ignore[override]
        return getattr(self.layer, "looks_for", f"modules that {self.layer.__name__} can stand in for")

    def change(self, site: Site) -> nn.Module | None:
        if isinstance(site.module, self.layer) or not _allows(self.where, site):
            return None
        return self.layer.from_module(site.module, site=site, **self.given)  # type: ignore[attr-defined]

    def settings(self) -> dict[str, Any]:
        return dict(self.given)

    def label(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.given.items())
        return f"{self.layer.__name__}({given})" if given else self.layer.__name__


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
class _Step:
    """One call of ``apply``: the techniques, and the edits in the order they were done."""

    techniques: tuple[Technique, ...]
    edits: list[Edit]
    labels: list[str]
    parameters_before: int
    parameters_after: int


_HISTORY: WeakKeyDictionary[nn.Module, list[_Step]] = WeakKeyDictionary()


def as_technique(what: Technique | type) -> Technique:
    """A technique from a technique, a technique class, or a layer class with ``from_module``."""
    if isinstance(what, Technique):
        return what
    if isinstance(what, type) and issubclass(what, Technique):
        return what()
    if isinstance(what, type) and issubclass(what, nn.Module):
        return Replace(what)
    raise TypeError(
        f"a technique was expected, such as hw.PeriLN() or hw.norms.LayerNorm, not {what!r}; hw.methods() lists them all"
    )


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
    _refuse_wrapped(model)
    if copy:
        if optimizer is not None:
            raise ValueError(
                "copy=True and optimizer= exclude each other: the optimiser holds the parameters of the original"
            )
        model = copying.deepcopy(model)
    holders = _optimizer_owners(model, optimizer)
    step, model = _run(model, chosen, where)
    _HISTORY.setdefault(model, []).append(step)
    if optimizer is not None:
        _repoint(optimizer, model, step, holders)
    logger.info("%s", _plan_of(step))
    return model


def plan(model: nn.Module, *techniques: Technique | type, where: Where | None = None) -> Plan:
    """Answers what :func:`apply` would do, and leaves the model and the random generator as they were."""
    if not techniques:
        raise TypeError(
            "plan needs at least one technique, e.g. hw.plan(model, hw.PeriLN()); hw.methods() lists them all"
        )
    chosen = tuple(as_technique(technique) for technique in techniques)
    _refuse_wrapped(model)
    with torch.random.fork_rng():
        step, _ = _run(model, chosen, where)
    _take_back(step.edits)
    return _plan_of(step)


def undo(model: nn.Module, steps: int = 1) -> nn.Module:
    """Takes back the last ``steps`` calls of :func:`apply` and returns the model as it was before them.

    Parameters that the change shared with the original keep what they have learned since.

    Raises:
        ValueError: the model has not been changed that often (a copy or a loaded model carries no history), or a technique
            cannot be undone.
    """
    done = _HISTORY.get(model, [])
    if steps < 1 or steps > len(done):
        raise ValueError(
            f"undo was asked for {steps} step(s), and {len(done)} call(s) of apply are recorded for this model"
        )
    for step in done[-steps:]:
        for technique in step.techniques:
            if not technique.undoable:
                raise ValueError(f"{technique.label()} cannot be undone; keep a copy with apply(..., copy=True)")
    for _ in range(steps):
        step = done.pop()
        _take_back(step.edits)
        former = _root_before(step.edits, model)
        if former is not model:
            _HISTORY.pop(model, None)
            model = former
            if done:
                _HISTORY[model] = done
    return model


def history(model: nn.Module) -> list[Plan]:
    """What every call of :func:`apply` did to this model, oldest first."""
    return [_plan_of(step) for step in _HISTORY.get(model, [])]


def applied(model: nn.Module) -> list[Technique]:
    """The techniques applied to this model and not undone, oldest first."""
    return [technique for step in _HISTORY.get(model, []) for technique in step.techniques]


def sites(model: nn.Module, where: Where | None = None) -> Iterator[Site]:
    """Every module of the model once, the model itself first, under its first qualified name."""
    parents: dict[int, nn.Module] = {}
    for owner in model.modules():
        for child in owner.children():
            parents.setdefault(id(child), owner)
    for name, module in model.named_modules():
        site = Site(module, name, parents.get(id(module)), model)
        if _allows(where, site):
            yield site


def _allows(where: Where | None, site: Site) -> bool:
    if where is None:
        return True
    if isinstance(where, str):
        return fnmatch.fnmatchcase(site.name, where)
    if callable(where):
        return bool(where(site))
    return any(fnmatch.fnmatchcase(site.name, pattern) for pattern in where)


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module was expected, not {type(model).__name__}")
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "OptimizedModule"):
            verb = "torch.compile" if kind == "OptimizedModule" else kind
            raise TypeError(
                f"the model is already wrapped by {verb}; change the plain model first and wrap it afterwards"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                "the model is already compiled in place; change it first and call model.compile() afterwards"
            )
        if type(module).__module__.startswith("torch.jit"):
            raise TypeError(
                "the model is a TorchScript module, whose code is fixed; change the Python model and script it after"
            )


def _run(model: nn.Module, techniques: Sequence[Technique], where: Where | None) -> tuple[_Step, nn.Module]:
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
    return _Step(tuple(techniques), done, labels, before, _count(root)), root


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


def _plan_of(step: _Step) -> Plan:
    rows = tuple(Row(e.name, *e.describe(), label) for e, label in zip(step.edits, step.labels, strict=True))
    return Plan(rows, step.parameters_before, step.parameters_after)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Gives a new module the training mode, device, parameter dtype and hooks of the one it replaces."""
    new.train(old.training)
    kept = {id(tensor) for tensor in [*old.parameters(), *old.buffers()]}
    reference = next((p for p in old.parameters() if p.is_floating_point()), None)
    if reference is not None:
        for module in new.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in kept:
                    dtype = reference.dtype if parameter.is_floating_point() else parameter.dtype
                    if parameter.dtype != dtype or parameter.device != reference.device:
                        moved = parameter.detach().to(reference.device, dtype)
                        module._parameters[key] = nn.Parameter(moved, parameter.requires_grad)
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.device != reference.device:
                    module._buffers[key] = buffer.to(reference.device)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(old, hooks) and not getattr(new, hooks):
            getattr(new, hooks).update(getattr(old, hooks))
    return new


def _optimizer_owners(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[int, int]:
    """id(parameter) -> index of its group, for the parameters of the model that the optimiser holds."""
    if optimizer is None:
        return {}
    mine = {id(parameter) for parameter in model.parameters()}
    owners = {
        id(parameter): index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) in mine
    }
    if not owners:
        raise ValueError("optimizer= holds no parameter of this model; pass the optimiser that was built from it")
    return owners


def _repoint(optimizer: torch.optim.Optimizer, model: nn.Module, step: _Step, owners: dict[int, int]) -> None:
    """Moves groups and state to the new parameters; drops what left the model; adds what is new beside its neighbours."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for edit in step.edits:
        for old, new in edit.moved().items():
            moved[old] = new
    alive = {id(parameter) for parameter in model.parameters()}
    handled: set[int] = set()
    for group in optimizer.param_groups:
        fresh: list[nn.Parameter] = []
        for parameter in group["params"]:
            target = parameter
            while target in moved:
                target = moved[target]
            if id(parameter) in owners and id(target) not in alive:
                optimizer.state.pop(parameter, None)
                continue
            if target is not parameter and parameter in optimizer.state:
                optimizer.state[target] = optimizer.state.pop(parameter)
            if id(target) not in handled:
                handled.add(id(target))
                fresh.append(target)
        group["params"] = fresh
    before = {id(p) for edit in step.edits if isinstance(edit, Swap) for p in edit.old.parameters()}
    for edit in step.edits:
        if isinstance(edit, Swap):
            groups = [owners[id(p)] for p in edit.old.parameters() if id(p) in owners]
            added = [(p, groups[0] if groups else None) for p in edit.new.parameters()]
            was_frozen = not groups and any(True for _ in edit.old.parameters())
        elif isinstance(edit, SetParameter) and edit.new is not None:
            added, was_frozen = [(edit.new, None)], False
        else:
            continue
        for parameter, index in added:
            if id(parameter) in handled or id(parameter) not in alive or id(parameter) in before or was_frozen:
                continue
            handled.add(id(parameter))
            optimizer.param_groups[index or 0]["params"].append(parameter)


@contextlib.contextmanager
def applying(model: nn.Module, *techniques: Technique | type, where: Where | None = None) -> Iterator[nn.Module]:
    """The model changed inside a ``with`` block and restored after it."""
    changed = apply(model, *techniques, where=where)
    try:
        yield changed
    finally:
        undo(changed)
