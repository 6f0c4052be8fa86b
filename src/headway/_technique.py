"""A technique: a frozen dataclass of settings with one method that changes a model; and the one that any layer class makes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import nn

from headway._edits import Edit, Swap, fused_paths_off
from headway._sites import Site, Where, allows


class Technique:
    """What can be done to a forward pass. Subclasses are frozen dataclasses; their fields are the settings.

    Override :meth:`change` for what concerns one module at a time, or :meth:`edits` for what has to see the whole model.
    """

    looks_for: ClassVar[str] = "modules it can change"
    undoable: ClassVar[bool] = True
    changes_model: ClassVar[bool] = True
    """False for what concerns the optimiser alone: an arm of ``hw.compare``, nothing for ``hw.apply``."""

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
                found.append(Swap(model, site.name, site.module, like(site, new)))
        return found

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimiser to train the changed model with: ``optimizer`` itself, perhaps with hooks attached to its step, or
        another one made from its parameter groups. ``hw.compare`` calls it once, before training, with the task's optimiser;
        ``hw.apply(..., optimizer=)`` with the user's, which must come back."""
        return optimizer

    def for_loading(self) -> Technique:
        """The same change for a fresh model whose weights and statistics are loaded right afterwards. Override it where the
        change asks for values that such a model does not have yet."""
        return self

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
        exclude: the same for what is to stay as it is.
        **settings: passed on to ``from_module``.
    """

    layer: type[nn.Module]
    where: Where | None = None
    exclude: Where = ()
    given: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self, layer: type[nn.Module], where: Where | None = None, exclude: Where = (), **settings: Any
    ) -> None:
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
        object.__setattr__(self, "exclude", exclude)
        object.__setattr__(self, "given", dict(settings))

    @property
    def looks_for(self) -> str:  # type: ignore[override]
        return getattr(self.layer, "looks_for", f"modules that {self.layer.__name__} can stand in for")

    def change(self, site: Site) -> nn.Module | None:
        if isinstance(site.module, self.layer) or not allows(self.where, site) or allows(self.exclude, site):
            return None
        return self.layer.from_module(site.module, site=site, **self.given)  # type: ignore[attr-defined]

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        from headway.checkpoints import record_layer

        found = super().edits(model, sites)
        # a layer that is still a layer norm computes what torch's fused call computes
        other = [e.old for e in found if isinstance(e, Swap) and not isinstance(e.new, nn.LayerNorm)]
        return [*found, *fused_paths_off(model, other), *record_layer(model, self, [e.name for e in found])]

    def settings(self) -> dict[str, Any]:
        return dict(self.given)

    def label(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.given.items())
        return f"{self.layer.__name__}({given})" if given else self.layer.__name__


def like(site: Site, new: nn.Module) -> nn.Module:
    """Gives a new module the training mode, device, parameter dtype and hooks of the one it replaces; device and dtype of the
    parameters around it where that one has none (an activation, say)."""
    old = site.module
    new.train(old.training)
    kept = {id(tensor) for tensor in [*old.parameters(), *old.buffers()]}
    around = [module for module in (old, site.parent, site.model) if module is not None]
    reference = next((p for module in around for p in module.parameters() if p.is_floating_point()), None)
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
