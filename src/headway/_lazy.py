"""Names that are imported when they are first used, so that ``import headway`` and the command line start at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping


def attach(package: str, names: Mapping[str, str]) -> tuple:
    """``__getattr__``, ``__dir__`` and ``__all__`` for ``package``: {public name: module that defines it}.

    A value "module:other" takes the attribute ``other``; "module:" takes the module itself.
    """

    def getattr_(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = names[name].partition(":")
        loaded = importlib.import_module(module)
        if ":" in names[name] and not attribute:
            value: object = loaded
        else:
            value = getattr(loaded, attribute or name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*names, *vars(sys.modules[package])})

    return getattr_, dir_, sorted(names)
