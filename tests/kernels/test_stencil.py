"""Convolutions with one output channel: C++ against torch's general convolution in every type, and the dispatcher's rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from headway.kernels.stencil import StencilConv2d, reference, stencil

OPS = torch.ops.headway
CLOSE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(CLOSE)),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([3, 7]),
    st.booleans(),
)
def test_cpp_equals_a_general_convolution(dtype, samples, channels, height, width, k, has_bias):
    x, gy = (numbers(samples, c, height, width, dtype=dtype, seed=c) for c in (channels, 1))
    weight, bias = (
        numbers(1, channels, k, k, dtype=dtype, seed=5),
        numbers(1, dtype=dtype, seed=6) if has_bias else None,
    )
    pairs = [(OPS.stencil.default(x, weight, bias), reference.stencil(x, weight, bias))]
    args = gy, x, weight, has_bias
    pairs += zip(OPS.stencil_backward.default(*args), reference.stencil_backward(*args), strict=True)
    for mine, truth in pairs:
        assert mine.shape == truth.shape and mine.dtype == truth.dtype
        size = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(mine / size, truth / size, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_tall_images_and_several_threads():
    x, gy = (numbers(3, c, 130, 40, dtype=torch.float32, seed=c) for c in (2, 1))
    weight = numbers(1, 2, 7, 7, dtype=torch.float32, seed=5)
    wanted, before = reference.stencil_backward(gy, x, weight, True), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for mine, truth in zip(OPS.stencil_backward.default(gy, x, weight, True), wanted, strict=True):
                torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [3, 7])
def test_the_layer_is_torchs_and_has_both_derivatives(k):
    torch.manual_seed(0)
    layer, x = StencilConv2d(2, k).double(), torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=k // 2))
    leaves = x, layer.weight, layer.bias
    assert torch.autograd.gradcheck(stencil, leaves) and torch.autograd.gradgradcheck(stencil, leaves)
    assert torch.autograd.gradcheck(lambda t: stencil(x.detach(), t), layer.weight)


def test_the_operators_keep_the_dispatchers_rules():
    x, gy, weight, bias = (numbers(*s, dtype=torch.float32) for s in ((2, 2, 4, 5), (2, 1, 4, 5), (1, 2, 3, 3), (1,)))
    opcheck(OPS.stencil.default, (x, weight, bias))
    opcheck(OPS.stencil_backward.default, (gy, x, weight, True))
    with pytest.raises(RuntimeError, match="3x3 or 7x7"):
        OPS.stencil.default(x, torch.ones(1, 2, 5, 5), None)
