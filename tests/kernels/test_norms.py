import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import norms
from headway.kernels.norms import add_norm, add_rms_norm, channel_norm, crms_norm, layer_norm, norm_add_norm, rms_norm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)


def close(a, b, dtype, factor=1.0):
    return torch.allclose(a.double(), b.double(), atol=factor * TOLERANCE[dtype], rtol=factor * TOLERANCE[dtype])


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    n=st.integers(1, 131),
    dtype=st.sampled_from(DTYPES),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_both_norms_equal_torch_forward_and_backward_at_any_row_length(rows, n, dtype, has_weight, has_bias, seed):
    torch.manual_seed(seed)
    x, g = torch.randn(rows, n).to(dtype), torch.randn(rows, n).to(dtype)
    w = torch.randn(n).to(dtype) if has_weight else None
    b = torch.randn(n).to(dtype) if has_bias else None
    mine = [t for t in (x, w, b) if t is not None]
    ours, theirs = leaves(*mine), leaves(*(t.double() for t in mine))
    it, jt = iter(ours), iter(theirs)
    args = next(it), next(it) if has_weight else None, next(it) if has_bias else None
    wide = next(jt), next(jt) if has_weight else None, next(jt) if has_bias else None
    for rms in (False, True):
        if rms:
            y = rms_norm(args[0], n, args[1], args[2], 1e-5)
            z = F.rms_norm(wide[0], (n,), wide[1], 1e-5)
            z = z if wide[2] is None else z + wide[2]
        else:
            y, z = layer_norm(args[0], n, args[1], args[2]), F.layer_norm(wide[0], (n,), wide[1], wide[2])
        assert y.dtype == dtype and close(y, z, dtype, 4)
        # a row of one or two equal numbers has a gradient that is a difference of large ones
        if n > 3:
            grads = torch.autograd.grad(y, ours, g, allow_unused=True)
            truth = torch.autograd.grad(z, theirs, g.double(), allow_unused=True)
            for grad, true in zip(grads, truth, strict=True):
                assert close(grad, true, dtype, 40 + 4 * rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_take_float32_parameters(dtype):
    x, w, b = torch.randn(5, 33).to(dtype), torch.randn(33), torch.randn(33)
    assert close(layer_norm(x, 33, w, b), F.layer_norm(x.double(), (33,), w.double(), b.double()), dtype, 4)
    xs, ws = leaves(x, w)
    layer_norm(xs, 33, ws).sum().backward()
    assert xs.grad.dtype == dtype and ws.grad.dtype == torch.float32


def test_large_means_keep_three_digits():
    x = 1e4 + torch.randn(8, 257)
    assert torch.allclose(layer_norm(x, 257), F.layer_norm(x.double(), (257,)).float(), atol=1e-3)


def test_a_nan_or_inf_stays_in_its_row():
    x = torch.randn(6, 70)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    for y in (layer_norm(x, 70), add_norm(x, torch.zeros_like(x))[0]):
        assert y[[1, 4]].isnan().all() and y[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_survives_the_rounding_to_half(dtype):
    y = layer_norm(torch.full((2, 40), float("nan"), dtype=dtype), 40)
    assert y.isnan().all()


def test_a_constant_row_gives_the_bias():
    b = torch.randn(9)
    assert torch.equal(layer_norm(torch.full((2, 9), 3.0), 9, torch.ones(9), b), b.expand(2, 9))


def test_several_axes_and_non_contiguous_input():
    x, w = torch.randn(4, 6, 5).transpose(0, 2), torch.randn(6, 4)
    assert torch.allclose(layer_norm(x, (6, 4), w), F.layer_norm(x, (6, 4), w), atol=2e-6)


def test_out_is_written_and_refuses_gradients():
    x, y = torch.randn(4, 32), torch.empty(4, 32)
    assert layer_norm(x, 32, out=y) is y and torch.allclose(y, F.layer_norm(x, (32,)), atol=2e-6)
    with pytest.raises(ValueError, match="no gradients"):
        layer_norm(x.requires_grad_(), 32, out=y)
    with pytest.raises(ValueError, match="out must be contiguous"):
        rms_norm(x.detach(), 32, out=torch.empty(4, 31))


def test_large_results_that_bypass_the_caches_are_the_same():
    x = torch.randn(8192, 1024)
    y = torch.empty_like(x)
    assert torch.allclose(layer_norm(x, 1024, out=y), F.layer_norm(x, (1024,)), atol=2e-6)


def test_gemma_gain_is_one_plus_the_weight():
    x, w = torch.randn(3, 16), torch.randn(16)
    assert torch.allclose(rms_norm(x, 16, w, offset=1.0), rms_norm(x, 16, w + 1), atol=1e-6)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norm_equals_addition_then_norm_with_both_outputs_used(rms, dtype):
    x, r, w, b, g1, g2 = (torch.randn(*s).to(dtype) for s in [(7, 37), (7, 37), (37,), (37,), (7, 37), (7, 37)])
    ours, plain = leaves(x, r, w, b), leaves(x, r, w, b)
    y, h = add_norm(*ours, rms=rms)
    hp = plain[0] + plain[1]
    yp = rms_norm(hp, 37, plain[2], plain[3]) if rms else layer_norm(hp, 37, plain[2], plain[3])
    assert torch.equal(h, hp) and close(y, yp, dtype)
    ours_grads = torch.autograd.grad([y, h], ours, [g1, g2])
    for a, c in zip(ours_grads, torch.autograd.grad([yp, hp], plain, [g1, g2]), strict=True):
        assert close(a, c, dtype, 8)


def test_add_rms_norm_is_add_norm_of_the_other_kind():
    x, r, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    assert torch.equal(add_rms_norm(x, r, w)[0], add_norm(x, r, w, rms=True)[0])


@pytest.mark.parametrize("rms", [False, True])
def test_norm_add_norm_equals_its_unfused_composition_and_passes_gradcheck(rms):
    f, x, go, gi = (torch.randn(*s, dtype=torch.float64) for s in [(3, 5), (3, 5), (5,), (5,)])
    kind = rms_norm if rms else layer_norm
    x_new, u = norm_add_norm(f, x, go, gi, rms=rms)
    assert torch.allclose(x_new, x + kind(f, 5, go)) and torch.allclose(u, kind(x_new, 5, gi))
    assert torch.autograd.gradcheck(lambda *a: norm_add_norm(*a, rms=rms), leaves(f, x, go, gi))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 7, 300), (2, 4), (0, 4, 3), (2, 4, 0), (1, 3, 17, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_channel_norm_equals_layer_norm_after_permutation(shape, dtype):
    x = torch.randn(shape).to(dtype)
    w, b = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    ours, plain = leaves(x, w, b), leaves(x, w, b)
    y = channel_norm(*ours)
    z = F.layer_norm(plain[0].movedim(1, -1), (shape[1],), plain[1], plain[2]).movedim(-1, 1)
    assert y.shape == x.shape and close(y, z, dtype, 4)
    g = torch.randn(shape).to(dtype)
    truth = torch.autograd.grad(z, plain, g)
    for a, c in zip(torch.autograd.grad(y, ours, g), truth, strict=True):
        assert close(a, c, dtype, 40)


def test_gradcheck_and_gradgradcheck():
    x, r, w, b = (torch.randn(*s, dtype=torch.float64) for s in [(3, 6), (3, 6), (6,), (6,)])
    for f in (lambda x, w, b: layer_norm(x, 6, w, b), lambda x, w, b: rms_norm(x, 6, w, b)):
        assert torch.autograd.gradcheck(f, leaves(x, w, b))
        assert torch.autograd.gradgradcheck(f, leaves(x, w, b))
    assert torch.autograd.gradgradcheck(add_norm, leaves(x, r, w, b))
    assert torch.autograd.gradgradcheck(channel_norm, leaves(torch.randn(2, 3, 4, dtype=torch.float64), w[:3], b[:3]))


def test_crms_norm_equals_the_first_entries_of_the_rms_norm_of_the_completed_vector():
    z = torch.randn(5, 8, dtype=torch.float64)
    full = torch.cat([z, -z.sum(-1, keepdim=True)], -1)
    assert torch.allclose(crms_norm(z), rms_norm(full, 9)[:, :8], atol=1e-13)
    assert torch.autograd.gradcheck(crms_norm, leaves(z))


@pytest.mark.parametrize("rms", [False, True])
def test_operators_pass_opcheck(rms):
    x, w, b = leaves(torch.randn(4, 12), torch.randn(12), torch.randn(12))
    torch.library.opcheck(norms._norm_op, (x, w, b, 12, 1e-5, rms, 0.0, True))
    torch.library.opcheck(norms._add_norm_op, (x, x.detach().clone().requires_grad_(), w, b, 12, 1e-5, rms, 0.0, True))
    feature = torch.randn(2, 12, 5, requires_grad=True)
    torch.library.opcheck(norms._channel_norm_op, (feature, w, b, 1e-5, rms, True))
    torch.library.opcheck(norms._norm_out_op, (x.detach(), w.detach(), None, 12, 1e-5, rms, 0.0, torch.empty(4, 12)))


@pytest.mark.slow
def test_compiles_in_one_graph_with_the_same_numbers():
    def f(x, r, w):
        y, h = add_norm(x, r, w)
        return rms_norm(layer_norm(y, 16, w), 16, w) + h

    x, r, w = leaves(torch.randn(4, 16), torch.randn(4, 16), torch.randn(16))
    compiled = torch.compile(f, fullgraph=True)
    assert torch.allclose(compiled(x, r, w), f(x, r, w), atol=1e-5)
    ours = torch.autograd.grad(compiled(x, r, w).sum(), (x, r, w))
    for a, c in zip(ours, torch.autograd.grad(f(x, r, w).sum(), (x, r, w)), strict=True):
        assert torch.allclose(a, c, atol=1e-4)


def test_wrong_shapes_get_one_sentence():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="must end in the normalised shape"):
        layer_norm(x, 7)
    with pytest.raises(ValueError, match="weight must have the normalised shape"):
        rms_norm(x, 8, torch.ones(7))
    with pytest.raises(ValueError, match="must agree in shape and type"):
        add_norm(x, x.double())
    with pytest.raises(ValueError, match="one number a channel"):
        channel_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match="samples, channels"):
        channel_norm(torch.randn(3))


@pytest.mark.parametrize(
    "setting", [{"HEADWAY_ISA": "base"}, {"HEADWAY_ISA": "avx2"}, {"HEADWAY_KERNELS": "reference"}]
)
def test_every_instruction_set_and_the_plain_version_give_the_same(setting):
    code = (
        "import torch; torch.manual_seed(0); from headway.kernels.norms import *\n"
        "for d in (torch.float32, torch.bfloat16, torch.float16):\n"
        "  x, w = torch.randn(5, 83).to(d).requires_grad_(), torch.randn(83).to(d).requires_grad_()\n"
        "  y = layer_norm(x, 83, w); y.float().square().sum().backward()\n"
        "  print(y.double().sum().item(), x.grad.double().abs().sum().item(), w.grad.double().abs().sum().item())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        )
        for extra in ({}, setting)
    ]
    native, other = (torch.tensor([float(v) for v in run.stdout.split()]) for run in runs)
    assert torch.allclose(native, other, rtol=2e-2, atol=1e-2)
