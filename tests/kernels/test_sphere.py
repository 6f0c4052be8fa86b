"""Weights back to their norms: the C++ body beside the plain one."""

import math

import pytest
import torch

from headway.kernels import sphere
from headway.kernels.sphere import reference

SHAPES = [(3, 5), (1, 1), (70, 33), (2, 3, 3, 3), (4, 40001), (1, 200_000), (17, 4096)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def lists(dtype, grow=1.5):
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return params, [p * grow for p in params]


@pytest.mark.skipif(not sphere.built, reason="needs the C++ kernels")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_cpp_body_is_the_plain_one(dtype, rows):
    start, moved = lists(dtype)
    rho = [reference.norm(p, rows, torch.float64).to(reference.norms_type(p)) for p in start]
    own, other = [p.clone() for p in moved], [p.clone() for p in moved]
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    sphere.to_sphere_(own, rho, counts[0], 0.0, rows)
    reference.to_sphere_(other, rho, counts[1], 0.0, rows)
    for a, b, r in zip(own, other, rho, strict=True):
        # the plain body's sums are torch's, in float32
        torch.testing.assert_close(a, b, rtol=max(2e-6 if dtype is torch.float32 else 0.0, TOLERANCE[dtype]), atol=0)
        found = reference.norm(a, rows, torch.float64).to(r.dtype)
        torch.testing.assert_close(found, r, rtol=TOLERANCE[dtype], atol=0)
    assert not any(counts)


@pytest.mark.parametrize("body", [sphere.adam_to_sphere_, reference.adam_to_sphere_], ids=["operator", "plain"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_pass_is_a_step_of_adam_and_then_a_projection(dtype, rows, body):
    start, _ = lists(dtype)
    rho = [reference.norm(p, rows, torch.float64).to(dtype) for p in start]
    own, other = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    moments = [[torch.zeros_like(p) for p in start] for _ in range(2)]
    steps, missed = [torch.zeros(()) for _ in start], torch.zeros((), dtype=torch.int64)
    adam, draw = torch.optim.Adam(other, 1e-2, (0.8, 0.99), 1e-6, maximize=True), torch.Generator().manual_seed(1)
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=draw, dtype=dtype) for p in start]
        for p, g in zip(other, gradients, strict=True):
            p.grad = g
        adam.step()
        values = [p.detach() for p in other]
        reference.to_sphere_(values, rho, missed, 0.0, rows)
        body([p.detach() for p in own], gradients, *moments, steps, rho, missed, 1e-2, 0.8, 0.99, 1e-6, True, rows)
    tolerance = 5e-6 if dtype is torch.float32 else 1e-13
    for i, (a, b) in enumerate(zip(own, other, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(moments[0][i], adam.state[b]["exp_avg"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moments[1][i], adam.state[b]["exp_avg_sq"], rtol=1e-6, atol=1e-7)
    assert missed == 0 and all(step == 3 for step in steps)


@pytest.mark.parametrize("body", [sphere.to_sphere_, reference.to_sphere_], ids=["operator", "plain"])
def test_what_has_no_norm_stays_and_what_is_not_finite_is_counted(body):
    bad, endless, zero, empty = torch.ones(3, 4), torch.ones(2, 2), torch.zeros(2, 3), torch.zeros(0, 4)
    bad[1, 1], endless[0, 0] = math.nan, math.inf
    params = [bad, endless, zero, empty, torch.ones(2, 2)]
    before, missed = [p.clone() for p in params], torch.zeros((), dtype=torch.int64)
    body(params, [torch.tensor(2.0)] * 5, missed, 0.0, False)
    assert missed == 2 and all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(params[:4], before, strict=False)
    )
    assert torch.equal(params[4], torch.ones(2, 2))
    rows = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [0.0, 0.0]])
    body([rows], [torch.tensor([10.0, 1.0, 1.0])], missed, 0.0, True)
    assert missed == 3 and rows[0].tolist() == [6.0, 8.0] and rows[2].tolist() == [0.0, 0.0]
    assert rows[1].isnan().tolist() == [True, False] and rows[1, 1] == 1


@pytest.mark.parametrize("body", [sphere.to_sphere_, reference.to_sphere_], ids=["operator", "plain"])
def test_a_factor_near_one_waits(body):
    p, missed = torch.ones(4, 4), torch.zeros((), dtype=torch.int64)
    body([p], [torch.tensor(4.0 * 1.003)], missed, 2.0**-8, False)
    assert torch.equal(p, torch.ones(4, 4))
    body([p], [torch.tensor(4.0 * 1.005)], missed, 2.0**-8, False)
    torch.testing.assert_close(p, torch.full((4, 4), 1.005))


def test_threads_change_no_bit():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            start, moved = lists(torch.float32)
            rho = [reference.norm(p, False) for p in start]
            sphere.to_sphere_(moved, rho, torch.zeros((), dtype=torch.int64), 0.0, False)
            found.append(moved)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_operator_passes_opcheck():
    params, rho = [torch.randn(3, 4), torch.randn(5)], [torch.tensor(1.0), torch.tensor(2.0)]
    arguments = (params, rho, torch.zeros((), dtype=torch.int64), 0.0, False)
    torch.library.opcheck(sphere.to_sphere_, arguments, test_utils=("test_schema", "test_faketensor"))
    more = [[torch.randn(3, 4), torch.randn(5)] for _ in range(3)] + [[torch.zeros(()), torch.zeros(())]]
    arguments = (params, *more, rho, arguments[2], 0.1, 0.9, 0.99, 1e-8, False, False)
    torch.library.opcheck(sphere.adam_to_sphere_, arguments, test_utils=("test_schema", "test_faketensor"))
