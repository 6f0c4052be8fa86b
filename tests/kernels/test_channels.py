"""The operators of the norms with channel statistics: C++ against plain torch, and the dispatcher's rules."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from headway.kernels.channels import channel_scale, reference
from headway.norms.power import PowerNorm
from headway.norms.unified import UnifiedNorm, unified_norm_eval

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OPS = torch.ops.headway


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def padding(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def both(name: str, arguments: list) -> None:
    """Runs the operator and its plain body on copies of the arguments; results and moved arguments must agree."""
    ours, plain = copy.deepcopy(arguments), copy.deepcopy(arguments)
    results = getattr(OPS, name).default(*ours), getattr(reference, name)(*plain)
    dtype = next(a.dtype for a in arguments if isinstance(a, torch.Tensor))
    for mine, truth in zip(results[0], results[1], strict=True):
        assert mine.shape == truth.shape and mine.dtype == truth.dtype
        size = max(1.0, truth.double().abs().max().item()) if truth.numel() else 1.0
        torch.testing.assert_close(mine / size, truth / size, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    state = [[a for a in side if isinstance(a, torch.Tensor)] for side in (ours, plain)]
    torch.testing.assert_close(*state, rtol=CLOSE[torch.float32] if dtype != torch.float64 else 1e-11, atol=2e-5)


def unified(dtype, n, rows, pad, window=4, iters=20, filtration=False, count_padding=False):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x, w, b = numbers(rows, n, dtype=dtype), numbers(n, dtype=dtype, seed=1), numbers(n, dtype=dtype, seed=2)
    running, nu = numbers(n, dtype=state, seed=3).square() + 0.1, numbers(n, dtype=state, seed=4)
    ring, grads = numbers(window, n, dtype=state, seed=5).square(), numbers(3, n, dtype=state, seed=6)
    counters = torch.tensor(iters), torch.tensor(0)
    forward = [x, w, b, pad, None, running, ring, *counters, 3, 8, 10, filtration, 1e-5, 0.9, True]
    kept = reference.unified_norm(*copy.deepcopy(forward))[1]
    backward = [numbers(rows, n, dtype=dtype, seed=7), x, kept, w, pad, None, None, grads, nu, 0.9, count_padding]
    return forward, backward


def power(dtype, n, rows, pad, groups=0, iters=20, count_padding=False, clamp=False, exact=False, batch=False):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x, w, b = numbers(rows, n, dtype=dtype), numbers(n, dtype=dtype, seed=1), numbers(n, dtype=dtype, seed=2)
    phi, ema = numbers(n, dtype=state, seed=3).square() + 0.1, numbers(n, dtype=state, seed=4)
    forward = [x, w, b, pad, None, phi, torch.tensor(iters), groups, 10, 0.9, 1e-5, exact, batch, True]
    _, kept, rstd = reference.power_norm(*copy.deepcopy(forward))
    gy = numbers(rows, n, dtype=dtype, seed=7)
    backward = [gy, x, kept, rstd, w, pad, None, None, ema, groups, 0.8, count_padding, clamp, exact]
    return forward, backward


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 16, 17, 64, 100])
def test_compiled_unified_norm_equals_the_plain_one(dtype, n):
    for pad, iters, filtration, count in (
        (None, 20, False, False),
        (padding(37), 20, True, True),
        (padding(37), 4, False, False),
    ):
        forward, backward = unified(dtype, n, 37, pad, iters=iters, filtration=filtration, count_padding=count)
        both("unified_norm", forward)
        both("unified_norm_backward", backward)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n,groups", [(1, 1), (6, 0), (6, 3), (32, 4), (64, 4), (64, 2), (128, 2), (100, 1)])
def test_compiled_power_norm_equals_the_plain_one(dtype, n, groups):
    for pad, iters, options in (
        (None, 20, {}),
        (padding(37), 20, {"count_padding": True, "clamp": True}),
        (padding(37), 4, {"batch": True}),
        (padding(37), 20, {"exact": True}),
    ):
        forward, backward = power(dtype, n, 37, pad, groups, iters, **options)
        both("power_norm", forward)
        both("power_norm_backward", backward)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 40),
    window=st.integers(1, 9),
    iters=st.integers(0, 30),
    masked=st.booleans(),
    filtration=st.booleans(),
)
def test_any_number_of_tokens_channels_and_slots(rows, n, window, iters, masked, filtration):
    forward, backward = unified(torch.float64, n, rows, padding(rows) if masked else None, window, iters, filtration)
    both("unified_norm", forward)
    both("unified_norm_backward", backward)


def test_sums_over_many_rows_keep_their_digits():
    x = 1 + 1e-3 * numbers(20_000, 5, dtype=torch.float32)
    sums = OPS.column_squares(x, None, 0, 0.0)
    torch.testing.assert_close(sums[:-1], x.double().square().sum(0), rtol=2e-7, atol=0)
    assert sums[-1] == 20_000


def test_sums_of_products_tell_real_tokens_from_padding():
    x, gy, pad = numbers(2, 50, 6), numbers(2, 50, 6, seed=1), padding(2, 50)
    ours = OPS.column_products(gy, x, pad, x.new_empty(0), 0)
    parts = [(gy * x)[~pad], gy[~pad], (gy * x)[pad], gy[pad], x[pad].square()]
    torch.testing.assert_close(ours, torch.cat([*(p.sum(0) for p in parts), torch.tensor([(~pad).sum(), pad.sum()])]))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_fixed_statistics_are_one_multiply_add_with_any_affine_part(dtype, groups):
    x, square = numbers(3, 5, 8, dtype=dtype), numbers(8, seed=1).abs().float()
    for w, b in ((None, None), (numbers(8, dtype=dtype, seed=2), None), (None, numbers(8, dtype=dtype, seed=3))):
        with torch.no_grad():
            y = channel_scale(x, square, w, b, 1e-5, groups)
        assert y.dtype == dtype and y.shape == x.shape
        wanted = reference.channel_scale(x, square, w, b, groups, 1e-5)
        torch.testing.assert_close(y, wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    leaves = [x.double().requires_grad_(), square.double().requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda x, q: channel_scale(x, q, None, None, 1e-5, groups), leaves)


def test_input_that_does_not_lie_packed_is_read_as_it_is():
    x, pad = numbers(4, 6, 5).transpose(0, 1), padding(4, 6).t()
    packed, loose = UnifiedNorm(5).double(), UnifiedNorm(5).double()
    torch.testing.assert_close(loose(x, pad), packed(x.contiguous(), pad.contiguous()))
    torch.testing.assert_close(loose.running_var, packed.running_var)


def test_the_operators_keep_the_rules_of_the_dispatcher():
    pad = padding(9)
    for name, (forward, backward) in {
        "unified_norm": unified(torch.float32, 6, 9, pad),
        "power_norm": power(torch.float32, 6, 9, pad, 2),
    }.items():
        opcheck(getattr(OPS, name).default, tuple(forward))
        opcheck(getattr(OPS, name + "_backward").default, tuple(backward))
    x, gy = numbers(9, 6, dtype=torch.float32), numbers(9, 6, dtype=torch.float32, seed=1)
    opcheck(OPS.column_squares.default, (x, pad, 2, 1e-5))
    opcheck(OPS.column_products.default, (gy, x, pad, torch.ones(18), 2))
    opcheck(OPS.channel_scale.default, (x, torch.ones(6), torch.ones(6), None, 2, 1e-5))


LAYERS = {
    "unified": lambda: UnifiedNorm(6, warmup_iters=2, compensation_warmup=3, outlier_filtration=True),
    "power": lambda: PowerNorm(6, warmup_iters=2, group_num=2),
    "power v": lambda: PowerNorm(6, variant="v", group_num=None),
}


def train(layer: nn.Module, call, steps: int = 8, masked: bool = True) -> list[torch.Tensor]:
    found = []
    for step in range(steps):
        x = numbers(4, 5, 6, dtype=torch.float32, seed=step).requires_grad_()
        y = call(x, padding(4, 5, seed=step)) if masked else call(x)
        (y**3).sum().backward()
        found += [y.detach(), x.grad]
    return [*found, *(p.grad for p in layer.parameters()), *layer.state_dict().values()]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_compiled_training_loop_has_no_graph_break_and_equals_the_eager_one(kind):
    eager, layer = LAYERS[kind](), LAYERS[kind]()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(train(layer, compiled), train(eager, eager))
    x = numbers(3, 6, dtype=torch.float32)
    with torch.no_grad():
        layer.eval(), eager.eval()
        torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast_float32_is_computed_and_the_input_type_returned(kind):
    wide, half = LAYERS[kind](), LAYERS[kind]()
    x = numbers(40, 6, dtype=torch.bfloat16)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = half(x)
        z = wide(x.float())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, z.bfloat16())
    torch.testing.assert_close(list(half.state_dict().values()), list(wide.state_dict().values()))


def test_fixed_statistics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one number a channel"):
        unified_norm_eval(torch.randn(3, 4), torch.ones(5))


@pytest.mark.parametrize("setting", ["HEADWAY_KERNELS=reference", "HEADWAY_ISA=base", "HEADWAY_ISA=avx2"])
def test_plain_torch_and_every_instruction_set_give_the_same_training(setting, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, test_channels as t\n"
        "torch.save([t.train(layer, layer) for layer in (make() for make in t.LAYERS.values())], sys.argv[2])"
    )
    name, value = setting.split("=")
    path = tmp_path / "found.pt"
    env = {**os.environ, name: value, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), str(path)], env=env, check=True)
    ours = [train(layer, layer) for layer in (make() for make in LAYERS.values())]
    torch.testing.assert_close(torch.load(path), ours, rtol=1e-4, atol=1e-5)
