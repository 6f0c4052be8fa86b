"""The code blocks of a page, in order: tests run them, and ``pictures.py`` makes the pictures of the guides with them."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``output`` is the ``text`` block that follows it at once: what it prints."""

    language: str
    code: str
    line: int
    output: str | None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text that name a language; ``text`` blocks are outputs of those before them."""
    found = list(FENCE.finditer(text))
    listed = []
    for index, here in enumerate(found):
        after = found[index + 1] if index + 1 < len(found) else None
        follows = after is not None and after[2] == "text" and not text[here.end() : after.start()].strip()
        code = "".join(line.removeprefix(here[1]) for line in here[3].splitlines(keepends=True))
        if here[2] != "text":
            line = text.count("\n", 0, here.start()) + 2
            listed.append(Block(here[2], code, line, after[3] if follows and after is not None else None))
    return listed


def run_python(page: Path, namespace: dict[str, Any]) -> Iterator[tuple[Block, str]]:
    """Runs the Python blocks of a page in one namespace; yields each with what it printed."""
    for block in blocks(page.read_text()):
        if block.language == "python":
            printed = io.StringIO()
            # empty lines in front, so that a traceback names the line of the page
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            yield block, printed.getvalue()
