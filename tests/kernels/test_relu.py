"""The ReLU that keeps bits against its plain body and against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from headway.kernels.relu import reference, relu_bits

ops = torch.ops.headway


@pytest.mark.parametrize("n", [0, 1, 7, 64, 1003])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_native_bodies_equal_the_plain_ones(dtype, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    if n > 5:
        x[:5] = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])
    y, bits = ops.relu_bits(x)
    wanted, plain = reference.relu_bits(x)
    torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits, plain) and bits.numel() == (n + 7) // 8
    over = x.clone()
    assert torch.equal(ops.relu_bits_(over), bits)
    torch.testing.assert_close(over, y, rtol=0, atol=0, equal_nan=True)
    gy = torch.randn(n).to(dtype)
    assert torch.equal(ops.keep_bits(gy, bits), reference.keep_bits(gy, bits))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gradient_is_torchs_in_any_memory_order_and_over_its_input(channels_last):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    gy = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = []
    for call in (torch.relu, relu_bits, lambda t: relu_bits(t, inplace=True)):
        leaf = x.clone().requires_grad_()
        inner = leaf * 1
        y = call(inner)
        (g,) = torch.autograd.grad(y, leaf, gy)
        found.append((y.detach(), g))
    assert y is inner
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    strided = torch.randn(4, 6, dtype=torch.float64)[:, ::2].requires_grad_()
    (g,) = torch.autograd.grad(relu_bits(strided).sum(), strided)
    assert torch.equal(g, (strided > 0).double())
    shifted = (x + 0.1 * x.sign()).requires_grad_()
    assert torch.autograd.gradcheck(relu_bits, shifted) and torch.autograd.gradgradcheck(relu_bits, shifted)


def test_operators_have_fakes_that_agree():
    x = torch.randn(11)
    opcheck(ops.relu_bits.default, (x,), test_utils=("test_schema", "test_faketensor"))
    opcheck(ops.relu_bits_.default, (x.clone(),), test_utils=("test_schema", "test_faketensor"))
    bits = ops.relu_bits(x)[1]
    opcheck(ops.keep_bits.default, (x, bits), test_utils=("test_schema", "test_faketensor"))
