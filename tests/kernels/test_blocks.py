"""Products of blocks: every body against the plain one, and their derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from headway.kernels import blocks
from headway.kernels.blocks import block_gram, block_outer, block_product, color_blocks, reference

SIZES = st.tuples(st.integers(0, 3), st.sampled_from([1, 3, 32, 64, 70]), st.sampled_from([0, 1, 7, 64, 2050]))


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_every_size_and_type_agrees_with_the_plain_product(size, dtype):
    k, n, p = size
    torch.manual_seed(0)
    W, z, other = (torch.randn(shape).to(dtype) for shape in ((k, n, n), (k, n, p), (k, n, p)))
    close = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-3}
    torch.testing.assert_close(block_product(W, z), reference.block_product(W, z), **close)
    torch.testing.assert_close(block_outer(z, other), reference.block_outer(z, other), **close)
    torch.testing.assert_close(block_gram(z), reference.block_outer(z, z), **close)


def test_views_and_transposed_blocks_are_taken_as_they_are():
    torch.manual_seed(0)
    W, z = torch.randn(2, 64, 64).mT, torch.randn(2, 2100, 64).mT
    torch.testing.assert_close(block_product(W, z), W @ z, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(block_outer(z, z), z @ z.mT, rtol=1e-4, atol=1e-2)


def test_large_blocks_take_the_faster_way_and_small_ones_the_batched_one(monkeypatch):
    calls = []
    monkeypatch.setattr(blocks, "linear", lambda x, y: calls.append(x.shape) or x @ y.T)
    block_product(torch.randn(2, 64, 64), torch.randn(2, 64, 9))
    block_gram(torch.randn(2, 32, 2048))
    if not blocks.has_onednn(torch.ones(1)):
        pytest.skip("no oneDNN here")
    assert len(calls) == 4
    block_product(torch.randn(2, 32, 32), torch.randn(2, 32, 4000))
    block_gram(torch.randn(2, 32, 100))
    block_gram(torch.randn(2, 64, 100, dtype=torch.float64))
    assert len(calls) == 4


def test_derivatives_of_first_and_second_order():
    torch.manual_seed(0)
    W, z, other = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 3), (2, 3, 4), (2, 3, 4))
    )
    for call, inputs in ((block_product, (W, z)), (block_outer, (z, other)), (block_gram, (z,))):
        assert gradcheck(call, inputs) and gradgradcheck(call, inputs)


@pytest.mark.parametrize("n", [3, 64])
def test_the_operators_are_what_the_compiler_takes_them_for(n):
    W, z = torch.randn(2, n, n, requires_grad=True), torch.randn(2, n, 5, requires_grad=True)
    torch.library.opcheck(blocks._product_op, (W, z))
    torch.library.opcheck(blocks._outer_op, (z, z.detach()))
    torch.library.opcheck(blocks._gram_op, (z,))


def block(k, n, p, dtype):
    torch.manual_seed(0)
    x = 3 + torch.randn(k, n, p).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return x, x.to(wide).mean(2), torch.randn(k, n, n, dtype=wide) / n**0.5, torch.randn(k, n, dtype=wide)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.sampled_from([1, 2, 4, 7, 32, 33, 128, 130]),
    st.sampled_from([1, 15, 16, 63, 64, 65, 512, 513, 1100]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_coloring_in_one_pass_agrees_with_the_plain_one_at_every_size(k, n, p, dtype):
    given = block(k, n, p, dtype)
    (y, gram), (wanted, wanted_gram) = color_blocks(*given), reference.color_blocks(*(t.double() for t in given))
    assert y.dtype == dtype and gram.dtype == given[1].dtype
    close = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(y.double(), wanted, **close)
    torch.testing.assert_close(gram.double(), wanted_gram, rtol=1e-4, atol=1e-3)


def test_views_without_change_and_what_is_not_a_number():
    x, mean, change, shift = block(4, 32, 70, torch.float32)
    same, _ = color_blocks(x, mean, 0 * change, 0 * shift)
    assert torch.equal(same, x)
    turned = x.mT.contiguous().mT
    torch.testing.assert_close(color_blocks(turned, mean, change, shift), color_blocks(x, mean, change, shift))
    x[1, 3, 69] = torch.nan
    y, gram = color_blocks(x, mean, change, shift)
    assert y[1, :, 69].isnan().all() and gram[1, 3].isnan().all() and torch.isfinite(y[[0, 2, 3]]).all()
    assert torch.isfinite(y[1, :, :69]).all() and torch.isfinite(gram[[0, 2, 3]]).all()


def test_derivatives_of_the_one_pass_form_of_first_and_second_order():
    torch.manual_seed(0)
    x, change, shift = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3, 3), (2, 3)))

    def call(x, change, shift):
        return color_blocks(x, x.mean(2), change, shift)

    assert gradcheck(call, (x, change, shift)) and gradgradcheck(call, (x, change, shift))


def test_gradients_in_single_precision_are_those_in_double():
    given = block(2, 32, 100, torch.float32)
    pulls = torch.randn(2, 32, 100), torch.randn(2, 32, 32) / 100
    grads = []
    for dtype in (torch.float32, torch.float64):
        x, _, change, shift = (t.to(dtype).requires_grad_() for t in given)
        out = color_blocks(x, x.mean(2), change, shift)
        grads.append(torch.autograd.grad(out, (x, change, shift), [g.to(dtype) for g in pulls]))
    for single, double in zip(*grads, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_the_one_pass_operators_are_what_the_compiler_takes_them_for():
    x, mean, change, shift = (t.requires_grad_() for t in block(2, 3, 5, torch.float32))
    torch.library.opcheck(blocks._color_op, (x, mean, change, shift))
    torch.library.opcheck(blocks._color_float_op, tuple(t.detach() for t in (x, mean, change, shift)))
