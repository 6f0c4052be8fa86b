"""The operators of EvoNorm: C++ against plain torch in every type, and the dispatcher's rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from headway.kernels.evo import reference

OPS = torch.ops.headway
CLOSE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(name: str, *arguments) -> list[torch.Tensor]:
    ours, plain = getattr(OPS, name).default(*arguments), getattr(reference, name)(*arguments)
    ours, plain = ([side] if isinstance(side, torch.Tensor) else list(side) for side in (ours, plain))
    close = CLOSE[arguments[0].dtype]
    for mine, truth in zip(ours, plain, strict=True):
        assert mine.shape == truth.shape and mine.dtype == truth.dtype
        size = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(mine / size, truth / size, rtol=close, atol=close)
    return plain


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(CLOSE)),
    st.integers(0, 4),
    st.sampled_from([(1, 1), (4, 2), (6, 3)]),
    st.integers(1, 70),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
)
def test_cpp_equals_plain_torch(dtype, samples, channels, space, kind, act, given_variance):
    (c, groups), param = channels, torch.float32 if dtype == torch.bfloat16 else dtype
    x, gy = numbers(samples, c, space, dtype=dtype), numbers(samples, c, space, dtype=dtype, seed=1)
    w, b, v = (numbers(c, dtype=param, seed=2 + i) for i in range(3))
    variance = numbers(c, dtype=reference.wide(dtype), seed=7).square() + 0.1 if given_variance else None
    both("evo_moments", x)
    _, planes, of_channels = both("evo_batch", x, w, b, v, variance, kind, act, 1e-2)
    both("evo_batch_backward", gy, x, planes, of_channels, w, v, kind, act, 1e-2, variance is None)
    _, stats = both("evo_group", x, w, None, v, groups, kind != 2, act, 1e-2)
    both("evo_group_backward", gy, x, stats, w, v, groups, act)


def test_long_planes_and_absent_parameters():
    x, gy = numbers(2, 4, 5000, dtype=torch.bfloat16), numbers(2, 4, 5000, dtype=torch.bfloat16, seed=1)
    _, planes, of_channels = both("evo_batch", x, None, None, None, None, 0, True, 1e-5)
    both("evo_batch_backward", gy, x, planes, of_channels, None, None, 0, True, 1e-5, True)
    _, stats = both("evo_group", x, None, None, None, 2, True, True, 1e-5)
    both("evo_group_backward", gy, x, stats, None, None, 2, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operators_keep_the_dispatchers_rules(dtype):
    x, w = numbers(3, 4, 6, dtype=dtype), numbers(4, dtype=dtype, seed=1)
    _, planes, of_channels = OPS.evo_batch.default(x, w, w, w, None, 0, True, 1e-5)
    _, stats = OPS.evo_group.default(x, w, w, w, 2, True, True, 1e-5)
    for name, arguments in {
        "evo_moments": (x,),
        "evo_batch": (x, w, w, w, None, 0, True, 1e-5),
        "evo_batch_backward": (x, x, planes, of_channels, w, w, 0, True, 1e-5, True),
        "evo_group": (x, w, w, w, 2, True, True, 1e-5),
        "evo_group_backward": (x, x, stats, w, w, 2, True),
    }.items():
        opcheck(getattr(OPS, name).default, arguments)
