"""The operators of region normalisation: C++ against plain torch in every type, and the dispatcher's rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from headway.kernels.region import channel_pool, reference

OPS = torch.ops.headway
CLOSE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
PLAIN = {
    "region_norm": "norm",
    "region_norm_backward": "norm_backward",
    "channel_pool": "pool",
    "channel_pool_backward": "pool_backward",
}


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(name: str, *arguments) -> list[torch.Tensor]:
    ours, plain = getattr(OPS, name).default(*arguments), getattr(reference, PLAIN[name])(*arguments)
    ours, plain = ([side] if isinstance(side, torch.Tensor) else list(side) for side in (ours, plain))
    close = CLOSE[arguments[0].dtype]
    for mine, truth in zip(ours, plain, strict=True):
        assert mine.shape == truth.shape and mine.dtype == truth.dtype
        size = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(mine / size, truth / size, rtol=close, atol=close)
    return plain


def vectors(channels: int, samples: int, space: int, dtype: torch.dtype, kind: str) -> list[torch.Tensor | None]:
    four = [numbers(channels, dtype=dtype, seed=2 + i) for i in range(4)]
    two = [numbers(samples, 1, space, dtype=dtype, seed=6 + i) for i in range(2)]
    return {"vectors": [*four, None, None], "some": [four[0], None, None, four[3], None, None], "pixels": [None] * 4 + two,
            "gain": [None] * 4 + [two[0], None], "none": [None] * 6}[kind]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(CLOSE)),
    st.integers(0, 4),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from(["vectors", "some", "pixels", "gain", "none"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_cpp_equals_plain_torch(dtype, samples, channels, space, kind, batch, shared, released, share):
    param = torch.float32 if dtype == torch.bfloat16 else dtype
    x, gy = (numbers(samples, channels, space, dtype=dtype, seed=s) for s in (0, 1))
    mask = torch.rand(samples, space, generator=torch.Generator().manual_seed(0)) < share
    parameters = vectors(channels, samples, space, param, kind)
    _, kept = both("region_norm", x, mask, *parameters, None, batch, 1.0, shared, 1e-2, released)
    both("region_norm_backward", gy, x, mask, kept, *parameters, None, batch, 1.0, shared)
    if batch:
        other = reference.norm(x * 2, mask, *parameters, None, batch, 1.0, shared, 1e-2, released)[1]
        both("region_norm", x, mask, *parameters, other, batch, 1.0, shared, 1e-2, released)
        whole = numbers(2, 2, channels, dtype=torch.float64, seed=9)
        both("region_norm_backward", gy, x, mask, kept, *parameters, whole, batch, 1.0, shared)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_planes_and_several_threads(batch, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in ("vectors", "pixels"):
            x, gy = (numbers(2, 5, 9000, dtype=torch.float32, seed=s) for s in (0, 1))
            mask = torch.rand(2, 9000, generator=torch.Generator().manual_seed(0)) < 0.4
            parameters = vectors(5, 2, 9000, torch.float32, kind)
            _, kept = both("region_norm", x, mask, *parameters, None, batch, 1.0, False, 1e-5, False)
            both("region_norm_backward", gy, x, mask, kept, *parameters, None, batch, 1.0, False)
        both("channel_pool_backward", gy[:, :2], both("channel_pool", x)[1], 5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_region_that_is_not_finite_takes_part_in_no_gradient_but_its_own(batch, value):
    x, mask = numbers(2, 3, 7, dtype=torch.float32), torch.arange(14).reshape(2, 7) % 3 == 0
    x = torch.where(mask[:, None], value, x)
    for gy in (torch.where(mask[:, None], 0.0, 1.0).expand(2, 3, 7), torch.ones(2, 3, 7)):
        parameters = vectors(3, 2, 7, torch.float32, "vectors")
        _, kept = OPS.region_norm.default(x, mask, *parameters, None, batch, 1.0, False, 1e-5, False)
        given_ = gy, x, mask, kept, *parameters, None, batch, 1.0, False
        torch.testing.assert_close(
            OPS.region_norm_backward.default(*given_),
            reference.norm_backward(*given_),
            equal_nan=True,
            rtol=1e-5,
            atol=1e-5,
        )


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(CLOSE)), st.integers(0, 3), st.integers(1, 6), st.integers(1, 700))
def test_mean_and_maximum_over_the_channels(dtype, samples, channels, space):
    x = numbers(samples, channels, space, dtype=dtype)
    _, index = both("channel_pool", x)
    gradient = numbers(samples, 2, space, dtype=dtype, seed=1)
    (found,) = both("channel_pool_backward", gradient, index, channels)
    onto = numbers(samples, channels, space, dtype=dtype, seed=2)
    mine, truth = onto.clone(), onto.clone()
    OPS.channel_pool_backward_.default(mine, gradient, index)
    reference.pool_backward_(truth, gradient, index)
    torch.testing.assert_close(mine, truth, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(truth, onto + found, rtol=CLOSE[dtype], atol=2 * CLOSE[dtype])


def test_of_equal_maxima_the_first_has_the_gradient_and_nan_is_the_largest():
    x = torch.tensor([[1.0, 5, 2], [1, 5, torch.nan], [0, 7, 9]]).reshape(1, 3, 1, 3).requires_grad_()
    pooled = channel_pool(x)[1]
    torch.testing.assert_close(
        pooled, torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1), equal_nan=True
    )
    pooled[:, 1].sum().backward()
    assert x.grad is not None
    assert x.grad.reshape(3, 3).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("kind", ["vectors", "pixels"])
def test_the_operators_keep_the_dispatchers_rules(kind):
    x, gy = (numbers(3, 4, 6, dtype=torch.float32, seed=s) for s in (0, 1))
    mask, parameters = torch.arange(18).reshape(3, 6) % 2 == 0, vectors(4, 3, 6, torch.float32, kind)
    _, kept = OPS.region_norm.default(x, mask, *parameters, None, False, 1.0, False, 1e-5, False)
    _, index = OPS.channel_pool.default(x)
    for name, arguments in {
        "region_norm": (x, mask, *parameters, None, False, 1.0, False, 1e-5, False),
        "region_norm_backward": (gy, x, mask, kept, *parameters, None, False, 1.0, False),
        "channel_pool": (x,),
        "channel_pool_backward": (gy[:, :2], index, 4),
        "channel_pool_backward_": (x.clone(), gy[:, :2].contiguous(), index),
    }.items():
        opcheck(getattr(OPS, name).default, arguments)


def test_what_else_is_made_of_the_pooled_input_has_its_gradient_too():
    x = numbers(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    pull = numbers(2, 2, 4, 5, dtype=torch.float64, seed=1)

    def through(pool):
        same, pooled = pool(x)
        return torch.autograd.grad((same * 2).sin().sum() + (pooled * pull).sum(), x, create_graph=True)[0]

    plain = through(lambda x: (x, torch.stack([x.mean(1), x.amax(1)], 1)))
    torch.testing.assert_close(through(channel_pool), plain)
    with torch.no_grad():
        leaf = x.detach().clone().requires_grad_()
    same, pooled = channel_pool(leaf)
    ((same * 2).sin().sum() + (pooled * pull).sum()).backward()
    torch.testing.assert_close(leaf.grad, plain.detach())
    same, _ = channel_pool(leaf)
    torch.testing.assert_close(torch.autograd.grad(same.sum(), leaf)[0], torch.ones_like(leaf))
