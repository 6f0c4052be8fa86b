"""Likeness of samples: the exact cases, awkward values, and the cheap route against the whole matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.functional import mean_cosine, stable_rank
from headway.signals.statistics import between_tokens, cosine_of, gram, rank_of


# oracle 2
def test_orthonormal_rows_have_cosine_zero_and_full_rank():
    q = torch.linalg.qr(torch.randn(40, 12, dtype=torch.float64))[0].T
    assert float(mean_cosine(q)) == pytest.approx(0, abs=1e-6)
    assert float(stable_rank(q)) == pytest.approx(12, abs=1e-6)


def test_identical_rows_have_cosine_one_and_rank_one():
    x = torch.randn(1, 3, 5, 5).expand(9, 3, 5, 5)
    assert float(mean_cosine(x)) == pytest.approx(1, abs=1e-6)
    assert float(stable_rank(x)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("clusters", [2, 3, 8])
def test_equal_clusters_of_identical_orthogonal_rows_have_that_many_directions(clusters):
    q = torch.linalg.qr(torch.randn(32, clusters))[0].T
    assert float(stable_rank(q.repeat_interleave(4, 0))) == pytest.approx(clusters, abs=1e-5)


@given(
    batch=st.integers(2, 9),
    features=st.integers(1, 50),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1.0, 1e25]),
)
@settings(max_examples=40, deadline=None)
def test_the_numbers_are_their_definitions_at_any_scale(batch, features, seed, scale):
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(seed))
    a = x.double() / x.double().norm(dim=1, keepdim=True)
    m = a @ a.T
    assert float(mean_cosine(x * scale)) == pytest.approx(float(((m.sum(1) - 1) / (batch - 1)).mean()), abs=1e-5)
    assert float(stable_rank(x * scale)) == pytest.approx(float(m.trace() / torch.linalg.matrix_norm(m, 2)), rel=1e-4)
    centred = x.double() - x.double().mean(0)
    a = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-30)
    if features > 3 and batch > 2:
        m = a @ a.T
        assert float(mean_cosine(x, centered=True)) == pytest.approx(
            float(((m.sum(1) - 1) / (batch - 1)).mean()), abs=1e-4
        )


def test_half_precision_squares_do_not_overflow():
    x = (torch.randn(8, 200) * 300).half()
    assert float(mean_cosine(x)) == pytest.approx(float(mean_cosine(x.double())), abs=1e-4)


def test_a_zero_row_is_unlike_every_other_and_one_row_is_not_compared():
    x = torch.ones(4, 6)
    x[2] = 0
    assert float(mean_cosine(x)) == pytest.approx(0.5)
    assert float(stable_rank(x)) == pytest.approx(1)
    assert math.isnan(mean_cosine(x[:1])) and math.isnan(stable_rank(x[:1]))
    assert math.isnan(stable_rank(torch.full((3, 3), float("nan"))))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sequence_first", "sliced"])
def test_any_memory_layout_gives_the_same_inner_products(layout):
    x = torch.randn(10, 6, 40, 40)
    wanted = x.flatten(1) @ x.flatten(1).T
    batch = 0
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sequence_first":
        x, batch = x.transpose(0, 1).contiguous(), 1
    elif layout == "sliced":
        x = torch.cat([x, x], 3)[..., :40]
    torch.testing.assert_close(gram(x, batch, None, None), wanted, rtol=1e-4, atol=1e-2)


def test_a_subsample_of_features_estimates_the_whole_and_is_the_same_every_time():
    x = torch.randn(16, 100_000) + 0.5
    few = gram(x, max_features=8192)
    assert torch.equal(few, gram(x, max_features=8192))
    assert float(cosine_of(few)) == pytest.approx(float(mean_cosine(x)), abs=0.01)
    strided = torch.randn(50_000, 16, 2)[..., 0].t() + 0.5
    assert float(cosine_of(gram(strided, max_features=8192))) == pytest.approx(float(mean_cosine(strided)), abs=0.02)
    assert float(rank_of(few)) == pytest.approx(float(stable_rank(x)), rel=0.02)


def test_samples_are_taken_evenly_over_the_batch():
    x = torch.arange(100.0)[:, None]
    assert gram(x, max_samples=10).diagonal().sqrt().tolist() == pytest.approx(list(range(0, 100, 10)))


def test_likeness_between_tokens_is_the_mean_over_pairs_within_a_sample():
    x = torch.randn(5, 7, 3)
    u = x / x.norm(dim=-1, keepdim=True)
    pairs = u @ u.mT
    wanted = (pairs.sum((1, 2)) - 7) / 42
    assert float(between_tokens(x)) == pytest.approx(float(wanted.mean()), abs=1e-6)
    assert math.isnan(between_tokens(x[:, :1]))
