"""Decoder blocks that scale the long skips they are given: the same modules, weights and names, and one more step in their forward.

A block stays the same object and becomes an instance of a subclass of its class. It holds the network's
:class:`~headway.residual.long_skip.LongSkips` without owning it: that one is registered once, in the network.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn

from headway.residual.long_skip import LongSkips
from headway.residual.long_skip_graph import rewritten
from headway.residual.long_skip_sites import Host
from headway.surgery import Edit

_HELD = ("long_skip_layer", "host_at", "host_operands", "_forwards")


class ScaledHost(nn.Module):
    """What every block with scaled long skips has.

    Attributes:
        long_skip_layer: the network's LongSkips, not registered here.
        host_at, host_operands: as in :class:`~headway.residual.long_skip_sites.Host`.
    """

    original: type[nn.Module]
    argument: str
    long_skip_layer: LongSkips
    host_at: tuple[int | None, ...]
    host_operands: tuple[tuple[int, int], ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self.original, self.argument), self.__getstate__()  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        numbers = ", ".join(str(i) for i in self.host_at if i is not None)
        inner = super().extra_repr()
        return f"{inner}, long skips {numbers}" if inner else f"long skips {numbers}"


class ByArgument(ScaledHost):
    """Scales the argument of its forward, a tensor or a tuple of them."""

    position: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, place = self.argument, self.position
        if name in kwargs:
            kwargs = {**kwargs, name: self._scaled(kwargs[name])}
        elif len(args) > place:
            args = (*args[:place], self._scaled(args[place]), *args[place + 1 :])
        return super().forward(*args, **kwargs)

    def _scaled(self, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, tuple | list):
            return self.long_skip_layer(value, self.host_at[0])
        if len(value) != len(self.host_at):
            raise ValueError(
                f"{self.argument} holds {len(value)} long skips, and {len(self.host_at)} were counted when they were scaled"
            )
        return tuple(x if i is None else self.long_skip_layer(x, i) for x, i in zip(value, self.host_at, strict=True))


class Rewritten(ScaledHost):
    """Runs its own forward with the long skips scaled where it concatenates or adds them.

    The forward is traced once in either mode, so that what depends on ``self.training`` stays; other attributes of the block that
    decide its path are those of the moment when it was scaled.
    """

    _forwards: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forwards[self.training](self, *args, **kwargs)

    def write(self) -> None:
        """Traces the forward pass."""
        mode, forwards = self.training, []
        try:
            for training in (False, True):
                self.training = training
                at = [i for i in self.host_at if i is not None]
                forwards.append(rewritten(self, self.host_operands, at, "long_skip_layer"))
        finally:
            self.training = mode
        self.__dict__["_forwards"] = tuple(forwards)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_forwards"}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.write()


@cache
def _subclass(original: type[nn.Module], argument: str) -> type[nn.Module]:
    more: dict[str, Any] = {"original": original, "argument": argument}
    if argument:
        more["position"] = list(inspect.signature(original.forward).parameters).index(argument) - 1
    else:
        more["_unscaled_forward"] = original.forward
    return type(f"Scaled{original.__name__}", (ByArgument if argument else Rewritten, original), more)


def _revive(original: type[nn.Module], argument: str) -> nn.Module:
    kind: Any = _subclass(original, argument)
    return kind.__new__(kind)


class SetScaling(Edit):
    """Makes a block scale its long skips, or (``skips`` None) leave them again; the block stays the same object.

    Args:
        host: as it was found; its module and name alone where ``skips`` is None.
        skips: the network's layer.
        told: what the plan says of it before and after.
    """

    def __init__(self, host: Host, skips: LongSkips | None, told: tuple[str, str]) -> None:
        self.host, self.skips, self.told, self.name = host, skips, told, host.name
        self._before: tuple[type[nn.Module], dict[str, Any]] | None = None

    def do(self) -> None:
        module: Any = self.host.module
        self._before = type(module), {key: module.__dict__.pop(key) for key in _HELD if key in module.__dict__}
        if self.skips is None:
            module.__class__ = module.original
            return
        module.__class__ = _subclass(type(module), self.host.argument)
        module.__dict__.update(long_skip_layer=self.skips, host_at=self.host.at, host_operands=self.host.operands)
        if not self.host.argument:
            module.write()

    def undo(self) -> None:
        if self._before is not None:
            module: Any = self.host.module
            kind, held = self._before
            for key in _HELD:
                module.__dict__.pop(key, None)
            module.__class__ = kind
            module.__dict__.update(held)

    def describe(self) -> tuple[str, str]:
        return self.told


def plain_twin(host: ScaledHost) -> Any:
    """The block as it was, sharing all that it holds."""
    twin: Any = host.original.__new__(host.original)
    twin.__dict__.update({key: value for key, value in host.__dict__.items() if key not in _HELD})
    return twin
