"""Compiling the C++ sources, and what is said when that cannot be done."""

from __future__ import annotations

import pytest

from headway.kernels import build as builder
from headway.kernels.build import BuildError, build, is_fresh, main

TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(builder, "sources", lambda: tmp_path)
    return tmp_path


@pytest.mark.skipif(builder.compiler() is None, reason="no C++ compiler on this machine")
def test_a_source_is_built_once_and_again_when_it_changes(folder):
    into = folder / "native"
    assert build(["tiny"], into) == {"tiny": "built"} and (into / "tiny.so").exists()
    assert build(["tiny"], into) == {"tiny": "fresh"} and is_fresh("tiny", into)
    (folder / "tiny.cpp").write_text(TINY.replace("42", "43"))
    assert not is_fresh("tiny", into)
    assert build(["tiny"], into) == {"tiny": "built"}
    (folder / "shared.h").write_text("// every source may include it")
    assert not is_fresh("tiny", into)
    assert build(["tiny"], into) == {"tiny": "built"} and is_fresh("tiny", into)
    assert not list(into.glob("*.part"))


@pytest.mark.skipif(builder.compiler() is None, reason="no C++ compiler on this machine")
def test_a_source_with_a_mistake_gives_the_complaint_and_leaves_no_library(folder):
    (folder / "wrong.cpp").write_text("this is no C++")
    outcome = build(["wrong"], folder / "native")
    assert "error" in outcome["wrong"] and not (folder / "native" / "wrong.so").exists()


def test_an_unknown_operation_is_named_with_those_there_are(folder):
    if builder.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    assert "operations: tiny" in build(["huge"], folder / "native")["huge"]


def test_without_a_compiler_everything_still_runs_and_the_message_says_so(monkeypatch, capsys):
    monkeypatch.setattr(builder, "compiler", lambda: None)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build()
    assert main([]) == 1
    assert "plain PyTorch is used instead" in capsys.readouterr().err
