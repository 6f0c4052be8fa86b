"""Makes Markdown of the docstrings: roles become links, ``>>>`` lines become code blocks."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

from griffe import Extension, Module, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")
PROMPT = re.compile(r"(?:^ *>>> .*\n?(?:^(?! *>>>) *\S.*\n?)*)+", re.MULTILINE)


class Prose(Extension):
    """Rewrites every docstring before it is parsed, and takes fields that cannot be set out of signatures."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = PROMPT.sub(_fenced, ROLE.sub(lambda found: _link(found, obj), obj.docstring.value))

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for cls in _classes(pkg):
            init = cls.members.get("__init__")
            fixed = {name for name, member in cls.members.items() if "init=False" in str(getattr(member, "value", ""))}
            # an inherited field that a subclass fixes is still in the signature that griffe makes up
            if fixed and init is not None and init.is_function:
                init.parameters._params = [p for p in init.parameters if p.name not in fixed]  # type: ignore[union-attr]


def _classes(obj: Any) -> Iterator[Any]:
    for member in obj.members.values():
        if not member.is_alias and (member.is_module or member.is_class):
            if member.is_class:
                yield member
            yield from _classes(member)


def _link(found: re.Match[str], obj: Object) -> str:
    """A link to the object where the site holds it, and its bare name where it does not."""
    short, name = found.groups()
    owner: Any = obj if isinstance(obj, Module) or obj.is_class else obj.parent
    try:
        target = name if name.startswith("headway.") else owner.resolve(name)
    except Exception:
        target = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{html.escape(target)}" optional><code>{html.escape(shown)}</code></autoref>'


def _fenced(found: re.Match[str]) -> str:
    lines = found[0].rstrip("\n").split("\n")
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join([f"{indent}```pycon", *lines, f"{indent}```", ""])
