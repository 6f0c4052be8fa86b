import doctest
import importlib
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
import typer

import headway as hw
from headway import cli
from headway.catalogue import method, methods, technique
from headway.trials.arms import arms

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
reader, hooks, checks = (importlib.import_module(name) for name in ("blocks", "hooks", "checks"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def same_but_for_numbers(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed; numbers may differ from machine to machine, and ``...`` stands for anything."""
    shown, printed = (NUMBER.sub("#", text) for text in (shown, printed))
    return doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An empty folder to work in, and comparisons of a few steps of one seed."""
    monkeypatch.chdir(tmp_path)
    compare = hw.compare

    def few_steps(task, arms, **settings):
        return compare(task, arms, **{**settings, "seeds": 1, "budget": "2 steps", "progress": False, "probe": False})

    monkeypatch.setitem(vars(hw), "compare", few_steps)
    # blocks run as a module of their own: dataclasses and pickles look their classes up there
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return vars(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page, small):
    if page in ("README.md", "docs/index.md"):  # the first lines speak of the reader's own model
        torch.manual_seed(0)
        small["model"] = hw.residual.TransformerDecoder(vocab_size=256, dim=16, depth=3, heads=2)
        small["batch"] = torch.randint(256, (4, 16))
    for block, printed in reader.run_python(ROOT / page, small):
        assert block.output is None or same_but_for_numbers(block.output, printed), f"{page}:{block.line}:\n{printed}"


def commands(text: str) -> list[list[str]]:
    """The command lines of the shell blocks of a page, split into words."""
    lines = [line for block in reader.blocks(text) if block.language == "sh" for line in block.code.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> None:
    """Meets a command line of a page as the program would, short of running it."""
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        assert (ROOT / rest[0]).exists() or importlib.util.find_spec(rest[1])
    elif program == "headway":
        command = typer.main.get_command(cli.app).commands[rest[0]]
        given = command.make_context(rest[0], rest[1:]).params if "--help" not in rest else {}
        for key in given.get("techniques") or ():
            technique(key)
        for key in [*(given.get("keys") or ()), *([given["key"]] if "key" in given else [])]:
            method(key)
        if given.get("arms"):
            arms(",".join(given["arms"]))
    else:
        assert program in ("pip", "export"), f"what is {program}?"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page):
    for words in commands((ROOT / page).read_text()):
        check_command(words)


@pytest.mark.parametrize("row", methods(), ids=lambda row: row.key)
def test_every_row_of_the_catalogue_has_its_page(row):
    text = hooks.technique_page(row)
    assert f"https://arxiv.org/abs/{row.arxiv}" in text and row.paper in text and row.use in text
    assert importlib.import_module(row.see).__doc__
    assert f"::: {row.see}\n" in text or "tells its story" in text
    described = hooks.technique_objects(row)
    assert described, f"{row.see} offers no class or function with a docstring"
    if row.technique is not None:
        assert described[0] == row.technique.replace(":", ".")
    for words in commands(text):
        check_command(words)
    for block in reader.blocks(text):
        if block.language == "python":
            compile(block.code, row.key, "exec")


def test_every_page_of_a_technique_stands_under_its_folder():
    config = types.SimpleNamespace(nav=[{"Techniques": ["techniques/index.md"]}, {"Reference": []}])
    listed = hooks.on_config(config).nav[0]["Techniques"][1:]
    found = {
        path: folder for group in listed for folder, pages in group.items() for page in pages for path in page.values()
    }
    assert found == {f"techniques/{row.key}.md": row.see.split(".")[1] for row in methods()}
    assert found.keys() <= hooks.pages().keys()


def test_everything_on_the_face_is_described_once():
    described = [name for names in hooks.page_objects().values() for name in names]
    assert len(described) == len(set(described))
    assert set(hooks.public(hw).values()) <= set(described)
    assert "headway.surgery.apply" in hooks.page_objects()["reference/index.md"]


def test_the_page_of_the_command_line_holds_every_command():
    text = dict([hooks.command_line()])["command_line.md"]
    for name in typer.main.get_command(cli.app).commands:
        assert f"`headway {name}`" in text


def test_a_site_that_fetches_or_misses_something_is_refused(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="here"></h1><a href="#here">x</a><a href="a.html#here">y</a>')
    assert checks.problems(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<script src="https://elsewhere.example/x.js"></script><a href="a.html#gone">x</a><a href="gone.html">y</a>'
    )
    (tmp_path / "c.css").write_text("@import url(//elsewhere.example/font.css);")
    assert checks.problems(tmp_path) == [
        "b.html fetches https://elsewhere.example/x.js",
        "b.html links to a.html#gone, which is not there",
        "b.html links to gone.html, which is not there",
        "c.css fetches //elsewhere.example/font.css",
    ]


def test_the_task_of_the_examples_is_compared_from_its_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    files = ["--store", str(tmp_path / "own.sqlite"), "--report", str(tmp_path / "own.html")]
    words = [
        "compare",
        "own_task:make_task(depth=1)",
        "--arms",
        "baseline,peri-ln",
        "--seeds",
        "1",
        "--budget",
        "3 steps",
    ]
    monkeypatch.setattr("sys.argv", ["headway", *words, *files, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["finished"] and result["arms"] == ["baseline", "peri-ln"]
    assert (tmp_path / "own.html").stat().st_size > 10_000
