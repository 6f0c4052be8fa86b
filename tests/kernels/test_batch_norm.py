# pyright: reportCallIssue=false
"""Batch norm with and without its ReLU against the plain body and against torch's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from headway.kernels.batch_norm import batch_norm, reference

OPS = torch.ops.headway
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(x, weight, bias, rectified, running=False, seed=1):
    """The operators and their plain bodies on the same arguments: outputs, statistics, running values and gradients agree."""
    close, sides = CLOSE[x.dtype], []
    gy = numbers(*x.shape, dtype=x.dtype, seed=seed)
    for forward, backward in (
        (OPS.batch_norm.default, OPS.batch_norm_backward.default),
        (reference.batch_norm, reference.batch_norm_backward),
    ):
        wide = torch.promote_types(x.dtype, torch.float32)
        moved = [torch.zeros(x.shape[1], dtype=wide), torch.ones(x.shape[1], dtype=wide)] if running else [None, None]
        y, statistics = forward(x, weight, bias, *moved, 0.3, 1e-5, rectified)
        sides.append(
            [
                y,
                statistics,
                *(m for m in moved if m is not None),
                *backward(gy, x, statistics, weight, bias, 1e-5, rectified),
            ]
        )
    for ours, plain in zip(*sides, strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        size = max(1.0, float(plain.double().abs().max()))
        torch.testing.assert_close(ours.double() / size, plain.double() / size, rtol=close, atol=close)


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 37), (64, 2, 4), (1, 3, 16), (2, 2, 5000), (3, 1, 1)])
def test_native_bodies_equal_the_plain_ones(shape, dtype, rectified):
    x, channels = numbers(*shape, dtype=dtype) * 2 + 1, shape[1]
    affine = [numbers(channels, dtype=dtype, seed=seed) for seed in (2, 3)]
    both(x, *affine, rectified, running=True)
    both(x, None, affine[1], rectified)
    both(x, affine[0].float(), None, rectified)


@settings(deadline=None, max_examples=30)
@given(samples=st.integers(1, 9), channels=st.integers(1, 9), space=st.integers(1, 70), rectified=st.booleans())
def test_any_number_of_samples_channels_and_positions(samples, channels, space, rectified):
    both(
        numbers(samples, channels, space), numbers(channels, seed=2), numbers(channels, seed=3), rectified, running=True
    )


@pytest.mark.parametrize("rectified", [False, True])
def test_it_is_torchs_batch_norm_and_relu_with_its_running_values_and_derivatives(rectified):
    x, gy = (numbers(4, 3, 5, 2, seed=seed) for seed in (0, 1))
    weight, bias = numbers(3, seed=2), numbers(3, seed=3)
    found = []
    for call in (
        lambda x, w, b, m, v: batch_norm(x, w, b, (m, v), 0.1, 1e-5, rectified),
        lambda x, w, b, m, v: (
            F.relu(y) if (y := F.batch_norm(x, m, v, w, b, True, 0.1)) is not None and rectified else y
        ),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        y = call(*leaves, *running)
        found.append([y.detach(), *running, *torch.autograd.grad(y, leaves, gy)])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)
    leaves = [t.clone().requires_grad_() for t in (numbers(2, 2, 3), numbers(2, seed=2), numbers(2, seed=3))]
    call = lambda *t: batch_norm(*t, rectified=rectified)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


def test_a_large_mean_costs_no_digits_of_the_variance():
    x = (numbers(8, 2, 1000) + 1e3).float()
    _, statistics = OPS.batch_norm(x, None, None, None, None, 0.1, 1e-5, False)
    torch.testing.assert_close(statistics[1], x.double().var((0, 2), correction=0), rtol=1e-6, atol=0)


def test_nan_stays_in_its_channel_and_passes_the_relu():
    x = numbers(4, 3, 6, dtype=torch.float32)
    x[1, 1, 2] = torch.nan
    y = batch_norm(x, None, None, rectified=True)
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all()


def test_a_channel_without_variance_is_its_shift_and_its_gain_learns_nothing():
    weight, bias = torch.ones(2, requires_grad=True), torch.tensor([0.5, -0.5], requires_grad=True)
    y = batch_norm(torch.full((3, 2, 4), 7.0), weight, bias, rectified=True)
    y.sum().backward()
    assert torch.equal(y[:, 0], torch.full((3, 4), 0.5)) and not y[:, 1].any()
    assert not weight.grad.any() and torch.equal(bias.grad, torch.tensor([12.0, 0.0]))  # type: ignore[union-attr]


def test_an_empty_batch_is_refused():
    with pytest.raises(RuntimeError, match="empty batch"):
        batch_norm(torch.zeros(0, 3, 4), None, None)


def test_the_operators_keep_the_rules_of_the_dispatcher():
    x, weight, bias = numbers(3, 2, 5, dtype=torch.float32), torch.rand(2), torch.rand(2)
    for rectified in (False, True):
        opcheck(OPS.batch_norm.default, (x, weight, bias, torch.zeros(2), torch.ones(2), 0.1, 1e-5, rectified))
        statistics = OPS.batch_norm(x, weight, bias, None, None, 0.1, 1e-5, rectified)[1]
        opcheck(OPS.batch_norm_backward.default, (x, x, statistics, weight, bias, 1e-5, rectified))


def trained() -> list[torch.Tensor]:
    x, weight, bias = numbers(6, 4, 33, dtype=torch.float32), torch.rand(4), numbers(4, dtype=torch.float32, seed=5)
    leaves = [t.requires_grad_() for t in (x, weight * 0 + 0.7, bias)]
    y = batch_norm(*leaves, rectified=True)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), leaves)]


@pytest.mark.parametrize("setting", ["HEADWAY_KERNELS=reference", "HEADWAY_ISA=base", "HEADWAY_ISA=avx2"])
def test_plain_torch_and_every_instruction_set_give_the_same_gradients(setting, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch, test_batch_norm as t; torch.save(t.trained(), sys.argv[2])"
    name, value = setting.split("=")
    path = tmp_path / "found.pt"
    env = {**os.environ, name: value, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), str(path)], env=env, check=True)
    torch.testing.assert_close(torch.load(path), trained(), rtol=1e-5, atol=1e-5)
