"""What can be done to a model and taken back exactly: another module, another parameter, another attribute."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


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

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All parameters of the place before and after, for the optimiser: what is new joins the group of what was there."""
        return [], []

    def describe(self) -> tuple[str, str]:
        """What stands there before and after, for the plan."""
        return "", ""


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

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return list(self.old.parameters()), list(self.new.parameters())

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

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        beside = [p for p in self.owner.parameters() if p is not self.old and p is not self.new]
        before, after = ([p, *beside] if p is not None else beside for p in (self.old, self.new))
        return before, after

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


def nested_tensors_off(model: nn.Module) -> list[Edit]:
    """torch's encoder packs padded batches into nested tensors, which only its own layer's forward understands."""
    return [
        SetAttribute(module, attribute, False, name=f"{name}.{attribute}" if name else attribute)
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder)
        for attribute in ("enable_nested_tensor", "use_nested_tensor")
        if getattr(module, attribute, False)
    ]


def fused_paths_off(model: nn.Module, norms: Iterable[nn.Module]) -> list[Edit]:
    """Makes torch's encoder layers call the norms that take the place of ``norms``: in evaluation they compute everything in one
    fused call, which takes whatever stands at ``norm1`` and ``norm2`` for layer norms."""
    gone = {id(norm) for norm in norms}
    found: list[Edit] = [
        SetAttribute(module, "activation_relu_or_gelu", 0, name=f"{name}.activation_relu_or_gelu".lstrip("."))
        for name, module in model.named_modules()
        if getattr(module, "activation_relu_or_gelu", 0) and gone & {id(child) for child in module.children()}
    ]
    return [*found, *nested_tensors_off(model)] if found else []


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
