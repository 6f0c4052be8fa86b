"""Where a technique may act: the modules of a model, those a user allows, and models that must not be changed any more."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

_WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
}
Where = str | Sequence[str] | Callable[["Site"], bool]


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


def sites(model: nn.Module, where: Where | None = None) -> Iterator[Site]:
    """Every module of the model once, the model itself first, under its first qualified name."""
    parents: dict[int, nn.Module] = {}
    for owner in model.modules():
        for child in owner.children():
            parents.setdefault(id(child), owner)
    for name, module in model.named_modules():
        site = Site(module, name, parents.get(id(module)), model)
        if allows(where, site):
            yield site


def allows(where: Where | None, site: Site) -> bool:
    """Whether the user's filter lets this site be changed."""
    if where is None:
        return True
    if isinstance(where, str):
        return fnmatch.fnmatchcase(site.name, where)
    if callable(where):
        return bool(where(site))
    return any(fnmatch.fnmatchcase(site.name, pattern) for pattern in where)


def refuse_wrapped(model: nn.Module) -> None:
    """Raises TypeError for what is no module, or is wrapped, compiled or scripted already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module was expected, not {type(model).__name__}")
    for module in model.modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise TypeError(
                f"the model is already wrapped by {_WRAPPERS[wrapper]}; change the plain model first and wrap it afterwards"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                "the model is already compiled in place; change it first and call model.compile() afterwards"
            )
        if type(module).__module__.startswith("torch.jit"):
            raise TypeError(
                "the model is a TorchScript module, whose code is fixed; change the Python model and script it after"
            )
