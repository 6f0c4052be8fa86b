"""How things are spelled: ``key(name=value, ...)`` with plain Python values, and lists of such words."""

from __future__ import annotations

import ast
from typing import Any


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Splits ``"stdlib-text(depth=12)"`` into the key and its settings (Python literals, never evaluated).

    Raises:
        ValueError: what stands in the brackets is no list of name=value.
    """
    key, bracket, inner = text.strip().partition("(")
    if not bracket:
        return key.strip(), {}
    message = (
        f"{text!r} was not understood; write key(name=value, ...) with plain Python values, e.g. stdlib-text(depth=12)"
    )
    try:
        call = ast.parse(f"f({inner}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError(message)
        return key.strip(), {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(message) from None


def split(text: str, separator: str = ",") -> list[str]:
    """Splits at a separator outside brackets and quotes: ``"a(x=1,y=2),b"`` gives ``["a(x=1,y=2)", "b"]``."""
    parts, depth, quote, current = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == separator and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        current += letter
    parts.append(current.strip())
    return parts


def spell(key: str, settings: dict[str, Any]) -> str:
    """The inverse of :func:`parse`: ``spell("digits", {"depth": 2})`` gives ``"digits(depth=2)"``."""
    inner = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"{key}({inner})" if inner else key
