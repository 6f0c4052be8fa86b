"""The one-pass moments against a transparent float64 computation, for every layout, number format and awkward value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import moments as kernel
from headway.kernels.moments import combine, moments


def truth(x, channel_dim=1):
    rows = x.double().movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)
    flat = rows.flatten()
    finite = flat[flat.isfinite()]
    d = finite - finite.mean()
    scalars = [finite.numel(), finite.mean(), d.pow(2).sum(), d.pow(3).sum(), d.pow(4).sum(), finite.abs().max()]
    scalars += [(finite == 0).sum(), flat.numel() - finite.numel()]
    per = []
    for row in rows:
        row = row[row.isfinite()]
        mean = row.mean() if row.numel() else torch.tensor(0.0)
        per.append([row.numel(), mean, (row - mean).square().sum()])
    return torch.tensor([float(s) for s in scalars], dtype=torch.float64), torch.tensor(per, dtype=torch.float64).T


def close(got, wanted, rtol):
    size = wanted[0][5].clamp(min=1e-300)
    n = wanted[0][0]
    scale = torch.stack([n, size, n * size**2, n * size**3, n * size**4, size, n, n])
    assert ((got[0] - wanted[0]).abs() <= rtol * scale).all(), (got[0], wanted[0])
    torch.testing.assert_close(got[1][0], wanted[1][0])
    torch.testing.assert_close(got[1][1], wanted[1][1], rtol=rtol, atol=float(rtol * size))
    torch.testing.assert_close(got[1][2], wanted[1][2], rtol=10 * rtol, atol=float(rtol * size**2))


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_moments_equal_the_definition_for_any_shape_and_dtype(shape, dtype, seed, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    close(moments(x, dim), truth(x, dim), 1e-11 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize("shape", [(64, 16, 33, 31), (4096, 130), (7, 300, 67), (2, 3, 100001)])
def test_large_tensors_equal_the_definition_in_every_layout(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5
    wanted = truth(x)
    close(moments(x), wanted, 1e-5)
    close(moments(x.double()), truth(x.double()), 1e-12)
    close(moments(x.transpose(0, -1).contiguous().transpose(0, -1)), wanted, 1e-5)
    if len(shape) == 4:
        close(moments(x.contiguous(memory_format=torch.channels_last)), wanted, 1e-5)


def test_a_strided_view_is_read_without_a_full_copy_and_gives_the_same_numbers():
    base = torch.randn(64, 32, 3, 100)
    view = base[:, :, 1].transpose(0, 1)
    assert not view.is_contiguous()
    close(moments(view, 1), truth(view, 1), 1e-5)
    big = torch.randn(600, 3, 700)[:, 1].t()
    close(moments(big, 0), truth(big, 0), 1e-5)


def test_a_large_mean_costs_no_digits_of_the_variance():
    x = torch.randn(4096, 24) * 0.01 + 1000
    _, channels = moments(x)
    torch.testing.assert_close(channels[2] / 4095, x.double().var(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e12, 1e18])
def test_squares_that_would_overflow_or_vanish_in_float32_are_still_counted(size):
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    a, b = moments(x), moments(x * size)
    assert float(b[0][2] / a[0][2]) == pytest.approx(size**2, rel=1e-3)
    assert float(b[0][4] * a[0][2] ** 2 / (b[0][2] ** 2 * a[0][4])) == pytest.approx(1, rel=1e-3)


def test_one_huge_entry_among_small_ones_is_not_lost():
    x = torch.full((100, 64), 1e-9)
    x[57, 13] = 1e15
    scalars, _ = moments(x)
    assert scalars[5] == pytest.approx(1e15)
    assert float(scalars[2]) == pytest.approx(1e30, rel=1e-3)


def test_nonfinite_entries_are_counted_and_left_out_of_the_rest():
    for layout in (torch.randn(40, 6, 20), torch.randn(40, 70)):
        layout[3, 2] = float("nan")
        layout[5, 1] = float("inf")
        layout[6, 1] = -float("inf")
        got, wanted = moments(layout), truth(layout)
        assert got[0][7] == wanted[0][7] > 0
        close(got, wanted, 1e-5)


def test_all_nan_empty_and_constant_tensors_give_finite_sums():
    scalars, channels = moments(torch.full((3, 4), float("nan")))
    assert scalars[0] == 0 and scalars[7] == 12 and torch.isfinite(channels).all()
    scalars, _ = moments(torch.empty(0, 5))
    assert scalars.eq(0).all()
    scalars, _ = moments(torch.full((30, 5), 7.0))
    assert scalars[1] == 7 and scalars[2] == 0 and scalars[4] == 0
    assert moments(torch.zeros(30, 5))[0][6] == 150


def test_parts_put_together_equal_the_whole():
    x = torch.randn(90, 7, 5, dtype=torch.float64) + torch.arange(90.0)[:, None, None]
    joined = combine(moments(x[:31]), moments(x[31:]))
    close(joined, truth(x), 1e-12)


def test_the_same_numbers_come_out_whatever_the_number_of_threads():
    x = torch.randn(64, 32, 40, 40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = moments(x)
        torch.set_num_threads(2)
        two = moments(x)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_operator_passes_opcheck_and_agrees_with_its_reference():
    x = torch.randn(6, 5, 4)
    torch.library.opcheck(kernel._moments, (x,))
    close(kernel._moments(x), kernel.reference(x), 1e-5)


def test_bad_input_is_refused_with_a_sentence():
    with pytest.raises(TypeError, match="floating"):
        moments(torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError, match="no axis"):
        moments(torch.ones(3), 1)
