"""Pages that follow from the code: one for every row of the catalogue, the command line, the reference.

A row of ``src/headway/catalogue.py`` is all a technique needs to appear here. Importable without mkdocs.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import MISSING, fields
from functools import cache
from types import ModuleType
from typing import Any

import headway as hw
from headway.catalogue import Method, methods
from headway.claims.measure import measured_keys
from headway.surgery import Technique

Page = tuple[str, str]  # where the page lies, and its Markdown


def on_config(config: Any) -> Any:
    """Puts the written pages into the navigation."""
    for section in config.nav:
        for title, items in section.items():
            if title == "Techniques":
                items += [
                    {folder: [{row.name: technique_path(row)} for row in rows]} for folder, rows in storeys().items()
                ]
            if title == "Reference":
                items += [{f"hw.{room}": f"reference/{room}.md"} for room in rooms()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the written pages to those of the folder."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """All written pages: {path: Markdown}."""
    found = dict([techniques_index(), command_line()])
    found |= {technique_path(row): technique_page(row) for row in methods()}
    found |= {f"reference/{room}.md": room_page(room) for room in rooms()}
    return {**found, "reference/index.md": face_page()}


# the techniques


def storeys() -> dict[str, list[Method]]:
    """The rows by the folder in which they live, both in the order of the catalogue."""
    found: dict[str, list[Method]] = {}
    for row in methods():
        found.setdefault(row.see.split(".")[1], []).append(row)
    return found


def technique_path(row: Method) -> str:
    return f"techniques/{row.key}.md"


def techniques_index() -> Page:
    """All techniques by folder."""
    parts = ["# Techniques", "Every technique is one call on a model you already have, and each names its paper."]
    for folder, rows in storeys().items():
        parts += [f"## {folder}", _story(f"headway.{folder}")]
        table = ["| technique | when to use it | takes |", "|---|---|---|"]
        table += [f"| [{row.name}]({row.key}.md) | {_cell(row.use)} | {_cell(row.takes)} |" for row in rows]
        parts.append("\n".join(table))
    return "techniques/index.md", "\n\n".join(parts) + "\n"


def technique_page(row: Method) -> str:
    """What a technique does, how to apply it, what is claimed of it, and its classes."""
    parts = [
        f"# {row.name}",
        f"`{row.key}` · *{row.paper}*, {row.year}, [arXiv {row.arxiv}](https://arxiv.org/abs/{row.arxiv})\n{{ .facts }}",
        f"**When**: {row.use}.<br>\n**Takes**: {row.takes}.",
        _what_it_does(row),
        "## Use it",
        _usage(row),
        "## What the paper claims, on your machine",
        _claims(row),
        "## Classes and functions",
    ]
    parts += [f"::: {name}" for name in page_objects()[technique_path(row)]]
    seen = [name for name in technique_objects(row) if name not in page_objects()[technique_path(row)]]
    parts += [f"[`{name}`][{name}] is described on another page." for name in seen]
    return "\n\n".join(parts) + "\n"


def _what_it_does(row: Method) -> str:
    """The docstring of the row's module; a link where another row before it has the same one."""
    first = next(other for other in methods() if other.see == row.see)
    if first.key != row.key:
        return f"It lives in one file with [{first.name}]({first.key}.md), which tells its story."
    options = "members: false", "show_root_heading: false", "show_root_toc_entry: false"
    return "\n".join([f"::: {row.see}", "    options:", *(f"      {option}" for option in options)])


def technique_class(row: Method) -> Any:
    """The class that ``apply`` takes, or None where the row is a tool."""
    if row.technique is None:
        return None
    module, _, name = row.technique.partition(":")
    return getattr(importlib.import_module(module), name)


def technique_objects(row: Method) -> list[str]:
    """Full names of what a technique's page explains: its class first, then what else its module offers."""
    module = importlib.import_module(row.see)
    kind = technique_class(row)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
        and (inspect.isclass(value) or full_name(value) in spellings())
    ]
    values = [getattr(module, name) for name in names]
    offered = [full_name(value) for value in values if has_docstring(value)]
    return list(dict.fromkeys([*([full_name(kind)] if kind is not None else []), *offered]))


@cache
def page_objects() -> dict[str, list[str]]:
    """What each page describes: {path: full names}. Everything is described once; other pages link to it."""
    wanted: dict[str, list[str]] = {technique_path(row): technique_objects(row) for row in methods()}
    wanted |= {f"reference/{room}.md": list(public(getattr(hw, room)).values()) for room in rooms()}
    wanted["reference/index.md"] = list(public(hw).values())
    taken: set[str] = set()
    found: dict[str, list[str]] = {}
    for path, names in wanted.items():
        found[path] = [name for name in dict.fromkeys(names) if name not in taken]
        taken.update(names)
    return found


def _usage(row: Method) -> str:
    kind = technique_class(row)
    layer = kind is not None and hasattr(kind, "from_module")
    if kind is None or not (layer or (inspect.isclass(kind) and issubclass(kind, Technique))):
        return _tool_usage(row)
    short = spellings().get(full_name(kind))
    change = f'hw.technique("{row.key}")' if short is None else short if layer else f"{short}()"
    settings = _settings(kind, layer)
    example = next((f"{row.key}({name}={value!r})" for name, value in settings.items() if _plain(value)), row.key)
    written = f'"{example}"' if example != row.key else row.key
    told = ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
    return _tabs(
        "import headway as hw\n\n"
        f"print(hw.plan(model, {change}))  # which modules, from what, to what; touches nothing\n"
        f"model = hw.apply(model, {change})\n"
        "model = hw.undo(model)  # as before",
        f"headway plan mypackage.models:build {written}\n"
        f"headway apply mypackage.models:build {written} -o changed.safetensors\n"
        f'headway compare mypackage.tasks:make_task --arms "baseline,{row.key}"',
    ) + (f'\n\nSettings, with their defaults: {told}. By key: `hw.technique("{example}")`.' if told else "")


def _tool_usage(row: Method) -> str:
    offered = technique_objects(row)
    names = ", ".join(f"[`{spellings().get(name, name)}`][{name}]" for name in offered)
    commands = [name for name in _commands() if any(full.endswith(f".{name}") for full in offered)]
    shell = "\n".join([f"headway {name} --help" for name in commands] or [f"headway show {row.key}"])
    return f"It is no change of a model but a tool. In Python: {names}. On the command line:\n\n```sh\n{shell}\n```"


def _tabs(python: str, shell: str) -> str:
    def block(title: str, language: str, code: str) -> str:
        return "\n".join(
            [f'=== "{title}"', "", *(f"    {line}".rstrip() for line in [f"```{language}", *code.split("\n"), "```"])]
        )

    return block("Python", "python", python) + "\n\n" + block("Command line", "sh", shell)


def _settings(kind: Any, layer: bool) -> dict[str, Any]:
    """The settings that the docstring of a technique explains, with their defaults, in its order."""
    if layer:
        given = {**inspect.signature(kind.__init__).parameters, **inspect.signature(kind.from_module).parameters}
        known = {name: p.default for name, p in given.items() if p.default is not inspect.Parameter.empty}
    else:
        known = {f.name: f.default for f in fields(kind) if f.init and f.default is not MISSING}
    lines = re.findall(r"^ {4}(\w+(?:, \w+)*):", inspect.getdoc(kind) or "", re.MULTILINE)
    return {name: known[name] for line in lines for name in line.split(", ") if name in known}


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _claims(row: Method) -> str:
    if not measured_keys([row.key]):
        return "Not measured yet; `headway claims --list` names the systems that are."
    return (
        f"```sh\nheadway claims {row.key} --quick\n```\n\n"
        "prints the paper's numbers beside those of this machine, against the strongest baseline there is here, with a verdict "
        "that is computed from what was measured. Without `--quick` it takes larger sizes and more seeds."
    )


# the command line


def _commands() -> dict[str, Any]:
    import typer

    from headway.cli import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def command_line() -> Page:
    """What ``headway --help`` and its commands say, as a page."""
    import typer
    from typer.cli import get_docs_for_click

    from headway.cli import app

    whole = typer.main.get_command(app)
    context = typer.Context(whole)
    wrong = "An error you can mend is one sentence on standard error, and exit status 2."
    parts = ["# Command line", f"{whole.help} {wrong}"]
    parts.append("\n".join(f"- [`headway {name}`](#headway-{name}): {c.help}" for name, c in _commands().items()))
    parts += [get_docs_for_click(obj=c, ctx=context, indent=1, call_prefix="headway") for c in _commands().values()]
    return "command_line.md", "\n\n".join(parts) + "\n"


# the reference


@cache
def rooms() -> list[str]:
    """The folders on the face that offer names of their own."""
    return [name for name in hw._NAMES if inspect.ismodule(getattr(hw, name)) and public(getattr(hw, name))]


def public(module: ModuleType) -> dict[str, str]:
    """{name: full name} of the classes and functions a package offers."""
    values = {name: getattr(module, name) for name in getattr(module, "_NAMES", getattr(module, "__all__", ()))}
    return {name: full_name(value) for name, value in values.items() if has_docstring(value)}


@cache
def spellings() -> dict[str, str]:
    """{full name: how a user writes it}, the shortest way: ``hw.PeriLN``, ``hw.norms.UnifiedNorm``."""
    deep = {full: f"hw.{room}.{name}" for room in rooms() for name, full in public(getattr(hw, room)).items()}
    return {**deep, **{full: f"hw.{name}" for name, full in public(hw).items()}}


def has_docstring(value: Any) -> bool:
    """Whether it is a class or function of headway that says what it is."""
    named = callable(value) and hasattr(value, "__qualname__") and bool(value.__doc__)
    return named and str(value.__module__).startswith("headway.")


def full_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def room_page(room: str) -> str:
    """One room: its names in a table, then those that no technique's page describes."""
    module = getattr(hw, room)
    return _reference(f"hw.{room}", _story(module.__name__), module, f"hw.{room}.", f"reference/{room}.md")


def face_page() -> str:
    """The names people write after ``import headway as hw``."""
    story = "What `import headway as hw` offers. Everything is imported when it is first used."
    return _reference("Reference", story, hw, "hw.", "reference/index.md")


def _reference(title: str, story: str, module: ModuleType, prefix: str, path: str) -> str:
    table = ["| name | what it is |", "|---|---|"]
    for name, full in public(module).items():
        table.append(f"| [`{prefix}{name}`][{full}] | {_cell(first_sentence(getattr(module, name)))} |")
    parts = [f"# {title}", story, "\n".join(table), *(f"::: {name}" for name in page_objects()[path])]
    return "\n\n".join(parts) + "\n"


def first_sentence(value: Any) -> str:
    """The docstring's first line or sentence, roles taken off."""
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    sentence = re.split(r"(?<=[^.][.])\s", paragraph, maxsplit=1)[0]
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", sentence)


def _story(module: str) -> str:
    """A package's own words about itself."""
    return first_sentence(importlib.import_module(module))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
