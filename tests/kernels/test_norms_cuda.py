"""The Triton bodies against the plain equations, run by Triton's interpreter, so that no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install triton (Linux)"
)

CHECK = """
import torch
from headway.kernels.norms import cuda, reference
from headway.kernels.norms.reference import LAYER, RMS

cuda._LARGEST = 64  # so that rows longer than a block are met
CLOSE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

def close(ours, truth, dtype, what):
    truth = truth.double()
    assert ours.shape == truth.shape, (what, ours.shape, truth.shape)
    far = ((ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1)) if truth.numel() else 0.0
    assert far <= CLOSE[dtype], (what, dtype, float(far))

def wide(t):
    return None if t is None else t.double()

CASES = [(torch.float32, 1), (torch.float32, 64), (torch.float32, 130), (torch.bfloat16, 100), (torch.float16, 100)]
for dtype, n in CASES:
    for kind in (LAYER, RMS):
        for affine in ("", "w", "wb", "b") if n == 130 else ("wb",):
            x, r = draw(5, n, dtype=dtype), draw(5, n, dtype=dtype, seed=1)
            w = draw(n, dtype=dtype, seed=2) if "w" in affine else None
            b = draw(n, seed=3) if "b" in affine else None
            offset = 1.0 if kind == RMS and w is not None else 0.0
            what = kind, n, affine
            if kind == RMS:
                y, stats = cuda.rms_norm(x, w, b, n, 1e-5, offset)
            else:
                y, stats = cuda.layer_norm(x, w, b, n, 1e-5)
            assert torch.equal(cuda.norm(x, w, b, n, 1e-5, kind, offset), y), what
            assert y.dtype == dtype
            wanted, wanted_stats = reference.rows(wide(x), wide(w), wide(b), n, 1e-5, kind, offset)
            close(y, wanted, dtype, ("y", *what))
            close(stats, wanted_stats, torch.float32, ("stats", *what))
            y, h, stats = cuda.add_norm(x, r, w, b, n, 1e-5, kind == RMS, offset, True)
            close(h, x + r, dtype, ("h", *what))  # the interpreter cuts bfloat16 off where a GPU rounds it
            wanted, wanted_stats = reference.rows(wide(h), wide(w), wide(b), n, 1e-5, kind, offset)
            close(y, wanted, dtype, ("add y", *what))
            gy, gh = draw(5, n, dtype=dtype, seed=4), draw(5, n, dtype=dtype, seed=5)
            for beside in (None, gh):
                found = cuda.norm_backward(gy, beside, h, stats, w, n, kind, offset, True, True)
                truth = list(reference.rows_backward(wide(gy), wide(h), wanted_stats, wide(w), n, kind, offset))
                truth[0] = truth[0] if beside is None else truth[0] + wide(beside)
                for name, a, c in zip(("gx", "gw", "gb"), found, truth):
                    close(a, c, dtype, (name, *what))
            gx, gw, gb = cuda.norm_backward(gy, None, h, stats, w, n, kind, offset, False, True)
            assert gw.shape == (0,) and gb.shape == (n,)

x = draw(6, 4, 10).permute(2, 1, 0)
wanted = reference.rows(x.double(), None, None, 6, 1e-5, LAYER)[0]
close(cuda.norm(x, None, None, 6, 1e-5, LAYER, 0.0), wanted, torch.float32, "strides")
shifted = draw(4, 200) + 1e4
wanted = reference.rows(shifted.double(), None, None, 200, 1e-5, LAYER)[0]
close(cuda.norm(shifted, None, None, 200, 1e-5, LAYER, 0.0), wanted, torch.float16, "mean")
assert cuda.layer_norm(torch.empty(0, 8), None, None, 8, 1e-5)[1].shape == (0, 2)
assert cuda.rms_norm(x.double(), None, None, 6, 1e-5, 0.0)[0].dtype == torch.float64
bad = draw(5, 100); bad[2, 3] = float("nan")
y = cuda.norm(bad, None, None, 100, 1e-5, LAYER, 0.0)
assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()
"""


def test_triton_bodies_follow_the_equations_for_any_row_length_type_and_affine_part():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headway.kernels.norms import cuda

WIDE, SCALARS = ("STATS", "GW", "GB"), {"n": "i32", "rows": "i32", "eps": "fp32", "offset": "fp32"}
for kernel in (cuda._forward, cuda._backward):
    settings = {name: True for name in kernel.arg_names if name.islower() and name not in SCALARS} | {"rms": False, "BLOCK": 512}
    types = {name: "constexpr" if name in settings else SCALARS.get(name) or ("*fp32" if name in WIDE else "*bf16")
             for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=settings)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 2}).asm["cubin"]
"""


def test_triton_bodies_compile_for_a_gpu_that_is_not_here(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_norms_does_not_import_triton():
    code = "import sys; import headway.kernels.norms; assert 'headway.kernels.norms.cuda' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_triton_is_missing_or_switched_off_the_plain_body_serves_cuda(monkeypatch):
    from headway.kernels.norms import lazy

    body = lazy.on_cuda("layer_norm", lambda *arguments: arguments)
    for change in (
        lambda: monkeypatch.setenv("HEADWAY_KERNELS", "reference"),
        lambda: monkeypatch.setattr(lazy, "find_spec", lambda name: None),
    ):
        change()
        lazy._triton_bodies.cache_clear()
        assert body(1, 2) == (1, 2)
        monkeypatch.undo()
    lazy._triton_bodies.cache_clear()
