"""How operators are registered: the reference everywhere, the fake for compilers, the backward for autograd."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from headway.kernels import library


def test_a_defined_operator_has_a_body_a_fake_and_a_backward():
    op = library.define(
        "test_twice(Tensor x) -> Tensor",
        lambda x: 2 * x,
        setup_context=lambda ctx, inputs, output: None,
        backward=lambda ctx, gradient: 2 * gradient,
    )
    x = torch.randn(3, requires_grad=True)
    y = op(x)
    y.sum().backward()
    assert torch.equal(y, 2 * x) and torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    assert op(torch.empty(5, device="meta")).shape == (5,)
    torch.library.opcheck(op, (torch.randn(3, requires_grad=True),))


def test_autograd_is_seen_only_where_a_gradient_is_wanted():
    x, y = torch.randn(2), torch.randn(2, requires_grad=True)
    assert library.needs_grad(x, None, y) and not library.needs_grad(x, None)
    with torch.no_grad():
        assert not library.needs_grad(y)


def test_below_autograd_leaves_no_graph_behind():
    y = torch.randn(2, requires_grad=True)
    with library.below_autograd():
        z = y * 2
    assert z.grad_fn is None


def test_an_operation_that_was_never_built_falls_back():
    assert library.load("no_such_operation") is False


def test_a_library_built_from_other_sources_is_left_alone_with_a_warning(monkeypatch, tmp_path):
    (tmp_path / "norms.so").write_bytes(b"of another day")
    monkeypatch.setattr(library, "NATIVE", tmp_path)
    monkeypatch.setattr(library, "is_fresh", lambda operation: False)
    with pytest.warns(UserWarning, match="built from other sources"):
        assert library.load.__wrapped__("norms") is False


def test_without_the_built_libraries_the_reference_gives_the_same_numbers(tmp_path):
    code = (
        "import sys, torch; from headway.kernels.library import status\n"
        "from headway.kernels.norms import add_norm, channel_norm, functions, layer_norm\n"
        "functions.SMALL = functions.SMALL_GRAPH = 0\n"
        "assert not any(status().values()) or sys.argv[1] == 'best'\n"
        "g = torch.Generator().manual_seed(0); x = torch.randn(5, 40, generator=g).requires_grad_()\n"
        "w = torch.rand(40, generator=g).requires_grad_(); y = layer_norm(x, 40, w); h = add_norm(x, y, w)[0]\n"
        "out = torch.empty(5, 40)\n"
        "with torch.no_grad(): layer_norm(x, 40, w, out=out)\n"
        "found = [y, h, out, channel_norm(x), *torch.autograd.grad(h.pow(2).sum(), (x, w))]\n"
        "torch.save([t.detach() for t in found], sys.argv[2])"
    )
    results = []
    for kind in ("reference", "best"):
        path = tmp_path / kind
        env = {**os.environ, "HEADWAY_KERNELS": kind, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code, kind, str(path)], env=env, check=True)
        results.append(torch.load(path))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
