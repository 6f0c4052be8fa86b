"""Large-step logistic regression against exact arithmetic, the perceptrons it tends to, and the paper's counts and bounds."""

import math
import warnings
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn

from headway.functional import normalized_logistic_loss
from headway.kernels import large_step
from headway.kernels.large_step import reference
from headway.optim import NormalizedGD, batch_perceptron, large_step_gd, perceptron
from headway.optim.normalized_gd import one_pass, signed, worst_case
from headway.optim.sparse_rows import SparseRows
from headway.tabular import separability

pytestmark = pytest.mark.filterwarnings("ignore:not separated")


def separable(seed, n=40, d=5, gap=0.3):
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(n, d, generator=draw, dtype=torch.float64)
    w = F.normalize(torch.randn(d, generator=draw, dtype=torch.float64), dim=0)
    y = torch.where(A @ w > 0, 1.0, -1.0)
    return A + gap * y[:, None] * w, y


def decimal_trajectory(Z, gamma, normalized, steps):
    getcontext().prec = 50
    Z = [[Decimal(float(x)) for x in row] for row in Z]
    gamma, theta, path = Decimal(gamma), [Decimal(0)] * len(Z[0]), []
    for _ in range(steps):
        sigma = [1 / (1 + sum(a * b for a, b in zip(z, theta, strict=True)).exp()) for z in Z]
        total = sum(sigma) if normalized else len(Z)
        theta = [t + gamma * sum(s * z[j] for s, z in zip(sigma, Z, strict=True)) / total for j, t in enumerate(theta)]
        path.append([float(t) for t in theta])
    return torch.tensor(path, dtype=torch.float64)


def exact_perceptron(Z, normalized, steps):
    Z = [[Fraction(float(x)) for x in row] for row in Z]
    u, path = [Fraction(0)] * len(Z[0]), []
    for t in range(steps):
        chosen = [z for z in Z if sum(a * b for a, b in zip(z, u, strict=True)) <= 0]
        if not chosen:
            break
        by = Fraction(len(chosen) if normalized else len(Z) * (2 if t == 0 else 1))
        u = [v + sum(z[j] for z in chosen) / by for j, v in enumerate(u)]
        path.append([float(v) for v in u])
    return torch.tensor(path, dtype=torch.float64)


# --- oracle 1: trajectories and counts


@pytest.mark.parametrize("gamma", ["0.1", "1", "10", "100", "1000"])
@pytest.mark.parametrize("normalized", [False, True])
def test_fifteen_steps_equal_fifty_digit_arithmetic(gamma, normalized):
    A, y = worst_case(100) if normalized else separable(3, 12, 3, 0.01)
    found = large_step_gd(A, y, float(gamma), normalized, max_iter=15, record=True)
    path = found.history[1:] * float(gamma)
    wanted = decimal_trajectory(signed(A, y), gamma, normalized, len(path))
    torch.testing.assert_close(path, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
def test_an_infinite_step_equals_the_perceptrons_in_exact_arithmetic(normalized):
    for A, y in (worst_case(64), separable(1, 20, 3, 0.05)):
        found = batch_perceptron(A, y, normalized, record=True)
        wanted = exact_perceptron(signed(A, y), normalized, 1000)
        assert found.separated and found.n_iter == len(wanted)
        torch.testing.assert_close(found.history[1:], wanted, rtol=1e-9, atol=1e-12)


def test_the_counts_of_the_paper_on_the_worst_case_set():
    A, y = worst_case(1000)
    assert [large_step_gd(A, y, gamma).n_iter for gamma in (100, 10, 1, 0.1)] == [2, 2, 16, 157]
    assert [large_step_gd(A, y, gamma, False).n_iter for gamma in (100, 10)] == [308, 729]


def test_plain_steps_grow_with_n_and_normalised_ones_do_not():
    counts = [large_step_gd(*worst_case(n), 100, False).n_iter for n in (100, 1000, 2000)]
    assert counts == [31, 308, 616]
    assert [large_step_gd(*worst_case(n), 100).n_iter for n in (100, 1000, 5000)] == [2, 2, 2]


# --- oracle 2: the limit


def test_a_huge_step_over_gamma_is_the_batch_perceptron():
    A, y = worst_case(100)
    huge = large_step_gd(A, y, 1e6, False, max_iter=31, record=True)
    limit = batch_perceptron(A, y, record=True)
    assert huge.n_iter == limit.n_iter == 31
    torch.testing.assert_close(huge.history, limit.history, rtol=1e-12, atol=1e-12)


def test_the_infinite_step_equals_both_perceptrons_bit_for_bit():
    A, y = worst_case(64)
    Z = signed(A, y)
    for normalized in (False, True):
        u, t = torch.zeros(2, dtype=torch.float64), 0
        while (wrong := Z @ u <= 0).any():
            by = int(wrong.sum()) if normalized else len(Z) * (2 if t == 0 else 1)
            u, t = u + Z[wrong].sum(0) / by, t + 1
        found = batch_perceptron(A, y, normalized)
        assert found.n_iter == t and torch.equal(found.theta, u)


# --- oracle 3: the softmax form


@pytest.mark.parametrize("gamma", [0.1, 1.0, 30.0])
def test_the_normalised_step_is_the_direct_form_and_no_longer_than_gamma_times_the_largest_sample(gamma):
    Z = signed(*separable(2))
    for seed in range(5):
        u = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        m, step = one_pass(Z, u, gamma, True)
        sigma = torch.sigmoid(-gamma * m)
        beta = len(Z) / sigma.sum()
        assert beta >= 1 and step.norm() <= Z.norm(dim=1).max() + 1e-12
        torch.testing.assert_close(step, beta * (Z.t() @ sigma) / len(Z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1e4, 1e30, 1e300, math.inf])
def test_steps_stay_finite_where_every_probability_underflows(gamma):
    Z = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    for u in (torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])):
        m, step = one_pass(Z, u.double(), gamma, True)
        assert torch.isfinite(m).all() and torch.isfinite(step).all()
    assert large_step_gd(*separable(4), gamma).separated


@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 3), (300, 7), (65, 1000), (40, 2048)])
def test_one_pass_is_two_products_whichever_body_or_matrix_makes_it(monkeypatch, n, d):
    draw = torch.Generator().manual_seed(n)
    Z, u = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((n, d), (d,)))
    for gamma, normalized in (
        (3.0, True),
        (3.0, False),
        (math.inf, True),
        (math.inf, False),
        (1e6, True),
        (1e300, True),
    ):
        m = Z @ u
        share = (m <= 0).double() if math.isinf(gamma) else torch.sigmoid(-gamma * m)
        if normalized and not math.isinf(gamma):
            share = torch.softmax(F.logsigmoid(-gamma * m), 0)
        step = Z.t() @ share / ((share.sum() or n) if normalized else n)
        monkeypatch.setattr(reference, "BLOCK_BYTES", 1000)
        sparse = SparseRows(scipy.sparse.csr_matrix(Z.numpy()))
        bodies = one_pass(Z, u, gamma, normalized), reference.margins_and_step(Z, u, gamma, normalized)
        for found in (*bodies, one_pass(sparse, u, gamma, normalized)):
            torch.testing.assert_close(found[0], m, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(found[1], step, rtol=1e-10, atol=1e-12)


def test_the_operator_passes_opcheck_and_keeps_nan():
    Z, u = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.library.opcheck(large_step.margins_and_step, (Z, u, 3.0, True), test_utils=("test_schema", "test_faketensor"))
    Z[3, 1] = math.nan
    m, step = large_step.margins_and_step(Z, u, 3.0, False)
    assert m.isnan().nonzero().tolist() == [[3]] and step.isnan().all()


@pytest.mark.parametrize("kind", ["scipy", "torch"])
def test_a_sparse_matrix_takes_the_steps_of_a_dense_one(kind):
    A, y = separable(3, 60, 9)
    A = torch.where(torch.rand(A.shape, generator=torch.Generator().manual_seed(0)) < 0.4, A, 0.0)
    A[:, 0] = 1.0
    sparse = scipy.sparse.csr_matrix(A.numpy()) if kind == "scipy" else A.to_sparse_csr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for gamma, normalized in ((5.0, True), (5.0, False), (math.inf, True)):
            dense, other = (large_step_gd(a, y, gamma, normalized, 40, record=True) for a in (A, sparse))
            torch.testing.assert_close(other.history, dense.history, rtol=1e-9, atol=1e-11)
        assert perceptron(sparse, y, max_iter=50).n_iter == perceptron(A, y, max_iter=50).n_iter
    assert separability(sparse, y, max_iter=200).distance == pytest.approx(
        separability(A, y, max_iter=200).distance, rel=1e-6
    )
    with pytest.raises(ValueError, match="row 1 of A is zero"):
        large_step_gd(scipy.sparse.csr_matrix([[1.0], [0.0]]), [1, -1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        large_step_gd(scipy.sparse.csr_matrix([[1.0], [math.nan]]), [1, -1])


def test_minibatches_separate_too_and_one_batch_of_all_rows_is_the_full_step():
    A, y = separable(4, 120, 5)
    whole = large_step_gd(A, y, 10.0, record=True)
    once = large_step_gd(A, y, 10.0, record=True, batch_size=len(A))
    torch.testing.assert_close(once.history, whole.history, rtol=1e-9, atol=1e-11)
    for gamma in (10.0, math.inf):
        small = large_step_gd(A, y, gamma, batch_size=16)
        assert small.separated and small.errors == 0 and (signed(A, y) @ small.theta).min() > 0
        assert torch.equal(small.theta, large_step_gd(A, y, gamma, batch_size=16).theta)
    with pytest.raises(ValueError, match="batch_size is at least 1"):
        large_step_gd(A, y, batch_size=0)


# --- oracle 4: small steps are ordinary gradient descent


def test_small_steps_descend_and_match_sgd_on_the_logistic_loss():
    A, y = separable(6, gap=0.0)
    A[0] = -A[1]
    y[0] = y[1]
    rate = 1.9 * 4 * len(A) / float(torch.linalg.matrix_norm(A, 2)) ** 2
    found = large_step_gd(A, y, rate, False, max_iter=50, record=True)
    losses = [float(F.softplus(-signed(A, y) @ u * rate).mean()) for u in found.history]
    assert losses == sorted(losses, reverse=True)
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], rate)
    for _ in range(found.n_iter if found.separated else 50):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(A @ w, (y + 1) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(found.history[-1] * rate, w.detach(), rtol=1e-12, atol=1e-12)


def test_the_direction_of_long_descent_tends_to_the_hard_margin_separator():
    from sklearn.svm import SVC

    from headway.tabular.large_step import polished

    A, y = separable(9, 30, 2, 1.0)
    svm = torch.from_numpy(SVC(kernel="linear", C=1e6).fit(torch.cat([A, -A]), torch.cat([y, -y])).coef_[0])
    Z = signed(A, y)
    angles = []
    for steps in (10, 1000, 100_000):
        theta = polished(Z, torch.zeros(2, dtype=torch.float64), steps)
        angles.append(math.degrees(math.acos(float(F.cosine_similarity(theta, svm, dim=0).clamp(max=1)))))
    assert angles[0] >= angles[1] >= angles[2] and angles[2] < 10


# --- oracle 5: two samples


def test_the_two_sample_set_of_the_paper():
    A, y = torch.tensor([[1.0, -1.0], [1.0, 4.0]], dtype=torch.float64), torch.ones(2)
    for gamma in (1e3, 1e6):
        found = large_step_gd(A, y, gamma, False, record=True)
        torch.testing.assert_close(found.history[1], torch.tensor([0.5, 0.75], dtype=torch.float64))
        torch.testing.assert_close(
            found.history[2], torch.tensor([1.0, 0.25], dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
        loss = [float(F.softplus(-gamma * (A @ u)).mean()) for u in found.history]
        assert loss[1] == pytest.approx(gamma / 8, rel=1e-6) and loss[2] < 1e-6 and found.n_iter == 2


# --- oracle 6: the bounds


def test_no_more_steps_than_the_bound_on_two_hundred_random_sets():
    for seed in range(200):
        A, y = separable(seed, 15 + seed % 30, 2 + seed % 4, 0.2)
        # the certified distance is at least mu, so the bound is only tightened
        radius, mu = float(A.norm(dim=1).max()), separability(A, y, gap=0.05).distance
        for gamma in (1.0, 100.0, math.inf):
            extra = 0 if math.isinf(gamma) else 2 * math.log(2 * len(A) - 1) / (gamma * mu**2)
            assert large_step_gd(A, y, gamma).n_iter <= (radius / mu) ** 2 + extra
        assert large_step_gd(A, y, math.inf, False).n_iter <= len(A) * (radius / mu) ** 2
        assert perceptron(A, y, "random").n_iter <= (radius / mu) ** 2


# --- oracle 7: invariances and the loss


@pytest.mark.parametrize("normalized", [False, True])
def test_permuting_rotating_and_scaling_change_nothing_but_the_coordinates(normalized):
    A, y = separable(8, gap=0.1)
    base = large_step_gd(A, y, 5.0, normalized)
    order = torch.randperm(len(A), generator=torch.Generator().manual_seed(0))
    moved = large_step_gd(A[order], y[order], 5.0, normalized)
    assert moved.n_iter == base.n_iter
    torch.testing.assert_close(moved.theta, base.theta)
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    torch.testing.assert_close(large_step_gd(A @ Q, y, 5.0, normalized).theta, base.theta @ Q)
    scaled = large_step_gd(3 * A, y, 5.0 / 9, normalized)
    assert scaled.n_iter == base.n_iter
    torch.testing.assert_close(scaled.theta, 3 * base.theta)


def test_the_gradient_of_the_normalised_loss_is_that_of_the_loss_over_the_mean_wrong_probability():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 2, (9,), generator=draw)
    m = torch.where(target > 0, logits, -logits)
    wrong = torch.sigmoid(-m).mean().detach()
    plain = F.softplus(-m).mean() / wrong
    loss = normalized_logistic_loss(logits, target)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, plain)))
    # numerically, with the weights held where they are
    fixed = torch.softmax(-F.softplus(m.detach()), 0)
    linear = lambda x: normalized_logistic_loss(x, target) * 0 - (fixed * torch.where(target > 0, x, -x)).sum()  # noqa: E731
    (numeric,) = torch.autograd.functional.jacobian(linear, (logits.detach(),))
    torch.testing.assert_close(torch.autograd.grad(normalized_logistic_loss(logits, target), logits)[0], numeric)


def test_the_multinomial_loss_of_two_classes_is_the_binary_one_and_never_overflows():
    draw = torch.Generator().manual_seed(0)
    pair = torch.randn(6, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 2, (6,), generator=draw)
    two, one = normalized_logistic_loss(pair, target), normalized_logistic_loss(pair[:, 1] - pair[:, 0], target)
    torch.testing.assert_close(two, one)
    torch.testing.assert_close(torch.autograd.grad(two, pair, retain_graph=True)[0], torch.autograd.grad(one, pair)[0])
    for size in (1e4, -1e4):
        far = (torch.tensor([size, 2 * size], dtype=torch.float64)).requires_grad_()
        loss = normalized_logistic_loss(far, torch.ones(2))
        (slope,) = torch.autograd.grad(loss, far)
        assert torch.isfinite(loss) and torch.isfinite(slope).all()
        torch.testing.assert_close(slope.sum(), torch.tensor(-1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="logits are"):
        normalized_logistic_loss(torch.zeros(2, 3), torch.zeros(3))


# --- the interface


def test_the_optimiser_takes_the_same_steps():
    A, y = worst_case(100)
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = NormalizedGD([w], lr=1.0)

    def closure():
        optimizer.zero_grad()
        m = A @ w
        loss = F.softplus(-m).mean()
        loss.backward()
        return loss, torch.sigmoid(-m).mean()

    found = large_step_gd(A, y, 1.0, record=True)
    for t in range(found.n_iter):
        optimizer.step(closure)
        torch.testing.assert_close(w.detach(), found.history[t + 1], rtol=1e-11, atol=1e-12)
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(TypeError, match="must return"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="lr must be positive"):
        NormalizedGD([w], lr=0)


def test_one_sample_separates_in_one_step_and_a_good_start_in_none():
    assert large_step_gd([[2.0, 1.0]], [1]).n_iter == 1
    assert large_step_gd([[2.0, 1.0]], [-1], 10.0).n_iter == 1
    A, y = separable(0)
    good = large_step_gd(A, y).theta
    assert large_step_gd(A, y, theta0=good).n_iter == 0


def test_data_that_cannot_be_separated_end_with_a_warning_and_the_best_iterate():
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    from sklearn.exceptions import ConvergenceWarning

    with pytest.warns(ConvergenceWarning, match="not separated after 20 steps"):
        found = large_step_gd(A, [1, -1, 1], max_iter=20)
    assert not found.separated and found.errors == 1 and found.n_iter == 20
    certificate = separability(A, [1, -1, 1])
    assert certificate.separable is False and certificate.distance < 1e-8
    torch.testing.assert_close(certificate.weights.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_the_mean_of_the_iterates_is_one_more_answer_where_nothing_separates():
    A, y = separable(6, gap=0.0)
    A, y = torch.cat([A, A[:1]]), torch.cat([y, -y[:1]])
    found = large_step_gd(A, y, 10.0, max_iter=30, average=True, record=True)
    torch.testing.assert_close(found.theta, found.history[1:].mean(0))
    assert found.errors == int((signed(A, y) @ found.theta <= 0).sum()) >= 1


def _part(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        A, y = separable(3, 60, 5, 0.05)
        rows = slice(0, 20) if rank == 0 else slice(20, None)
        group, found = torch.distributed.group.WORLD, []
        for gamma in (0.5, 1e5, math.inf):
            for normalized in (False, True):
                found.append(large_step_gd(A[rows], y[rows], gamma, normalized, 200, group=group))
        torch.save([(f.theta, f.n_iter, f.separated, f.errors) for f in found], f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_hold_parts_of_the_rows_take_the_steps_of_one_that_holds_all(tmp_path):
    torch.multiprocessing.spawn(_part, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    A, y = separable(3, 60, 5, 0.05)
    cases = [(gamma, normalized) for gamma in (0.5, 1e5, math.inf) for normalized in (False, True)]
    for i, (gamma, normalized) in enumerate(cases):
        whole = large_step_gd(A, y, gamma, normalized, 200)
        for theta, *told in (rank[i] for rank in ranks):
            torch.testing.assert_close(theta, whole.theta, rtol=1e-8, atol=1e-10)
            assert told == [whole.n_iter, whole.separated, whole.errors]


def test_a_certified_margin_is_the_best_one():
    from sklearn.svm import LinearSVC

    A, y = separable(11, 50, 3, 0.4)
    found = separability(A, y)
    w = LinearSVC(C=1e7, loss="hinge", fit_intercept=False, max_iter=200000, tol=1e-8).fit(A, y).coef_[0]
    best = float((signed(A, y) @ torch.from_numpy(w)).min()) / float(torch.from_numpy(w).norm())
    assert found.separable and found.margin == pytest.approx(best, rel=5e-3) and found.margin <= found.distance
    combined = signed(A, y).t() @ found.weights
    torch.testing.assert_close(combined, found.theta, rtol=1e-8, atol=1e-8)


def test_bad_data_are_one_sentence():
    A, y = torch.ones(3, 2), torch.tensor([1, -1, 1])
    for a, b, word in ((A, y[:2], "at least one sample"), (A[:0], y[:0], "at least one sample"), (A[0], y, "samples, features"),
                       (A * float("nan"), y, "NaN or infinity"), (A, torch.tensor([0, 1, 2]), "labels are -1"),
                       (A * torch.tensor([[1], [0], [1]]), y, "row 1 of A is zero")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            large_step_gd(a, b)
    with pytest.raises(ValueError, match="gamma must be positive"):
        large_step_gd(A, y, 0)
    with pytest.raises(ValueError, match="theta0"):
        large_step_gd(A, y, theta0=torch.zeros(3))
    with pytest.raises(ValueError, match='"first", "random" or "worst"'):
        perceptron(A, y, "last")
