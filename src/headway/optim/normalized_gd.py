"""Gradient descent on the logistic loss with a step so large that it is a batch perceptron, and its normalised form.

Data a_i, labels y_i = +-1, z_i = y_i a_i, margins m_i = <z_i, theta>, sigma_i = 1 / (1 + exp(m_i)) (how wrong sample i is):

    LR+GD              theta += gamma 1/n sum_i sigma_i z_i          at most n R^2 / mu^2 steps as gamma grows
    Normalized LR+GD   theta += gamma sum_i omega_i z_i              at most R^2 / mu^2 + 2 log(2n - 1) / (gamma mu^2) steps
                       omega = softmax_i(-softplus(m_i)) = sigma / sum(sigma)

until every margin is positive, with R = max ||a_i|| and mu the best margin of a unit theta. For gamma -> infinity both are batch
perceptrons on S = {m_i <= 0}, divided by n or by |S|. What is kept is u = theta / gamma, which stays bounded, so that gamma may be
1e30 or infinite.

Tyurin: "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes", 2024
(arXiv 2412.08424). To separate (nearly) separable data in few passes without tuning a rate: a linear probe on frozen features, a
first stage before a max-margin solver. Not for probabilities, not for data far from separable, and losses along the way mean
nothing. The classes that treat general networks, minibatches and many classes are extensions of ours without a guarantee.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from headway.kernels import large_step as kernel
from headway.optim.sparse_rows import Rows, SparseRows, all_finite, back, is_sparse, row, rows_of, times_rows, zero_rows


@dataclass(frozen=True)
class Result:
    """Where a run ended.

    Attributes:
        theta: (d,) float64, divided by gamma: its scale carries no meaning.
        n_iter: steps taken before every margin was positive (or until ``max_iter``).
        separated: whether every margin is positive.
        errors: samples whose margin is not positive, of the theta given back.
        history: with ``record``, theta / gamma at every step, (n_iter + 1, d).
        gamma: the step size; ``theta * gamma`` is the iterate of the paper where that is finite.
    """

    theta: Tensor
    n_iter: int
    separated: bool
    errors: int
    history: Tensor | None = None
    gamma: float = field(default=math.inf)


def signed(A: Any, y: Any) -> Rows:
    """z_i = y_i a_i in float64 (n, d), checked; ``A`` may be a sparse matrix of scipy or torch, and stays one.

    Raises:
        ValueError: shapes that do not fit, no sample, labels other than two, values that are not finite, a zero row.
    """
    A, y = rows_of(A) if is_sparse(A) else torch.as_tensor(A), torch.as_tensor(y)
    if len(A.shape) != 2 or y.dim() != 1 or len(A) != len(y) or len(A) == 0:
        raise ValueError(
            f"A is (samples, features) and y (samples,), with at least one sample; they are {tuple(A.shape)} and {tuple(y.shape)}"
        )
    if isinstance(A, Tensor):
        A = A.double()
    if not all_finite(A):
        raise ValueError("A holds NaN or infinity; remove or fill those entries first")
    values = set(y.unique().tolist())
    if not values <= {-1, 1}:
        if len(values) != 2:
            raise ValueError(
                f"labels are -1 and +1, or two values that are taken as those in order; they are {sorted(values)}"
            )
        y = torch.where(y == max(values), 1, -1)
    empty = zero_rows(A)
    if empty.any():
        raise ValueError(f"not separable: row {int(empty.nonzero()[0])} of A is zero; add a column of ones")
    return times_rows(A, y.double())


def one_pass(Z: Rows, u: Tensor, gamma: float, normalized: bool) -> tuple[Tensor, Tensor]:
    """The margins m = Z u and the step Z^T omega in units of gamma, reading Z once (:mod:`headway.kernels.large_step`)."""
    if not isinstance(Z, SparseRows):
        return kernel.margins_and_step(Z, u, gamma, normalized)
    m = Z @ u
    if math.isinf(gamma):
        share = (m <= 0).to(m.dtype)
        return m, back(Z, share) / (float(share.sum()) or len(Z) if normalized else len(Z))
    if normalized:
        return m, back(Z, torch.softmax(F.logsigmoid(-gamma * m), 0))
    return m, back(Z, torch.sigmoid(-gamma * m)) / len(Z)


def large_step_gd(
    A: Any,
    y: Any,
    gamma: float = math.inf,
    normalized: bool = True,
    max_iter: int = 10000,
    theta0: Any = None,
    record: bool = False,
    *,
    lambda_: float = 0.0,
    pocket: bool = True,
    average: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    group: Any = None,
) -> Result:
    """Steps of (Normalized) LR+GD from ``theta0`` (zero by default) until every margin is positive.

    Args:
        A: (n, d), dense, or sparse of scipy or torch; y: (n,), two values, the larger one is +1 (-1 and +1 may also stand alone).
        gamma: step size, possibly infinite: the batch perceptrons.
        normalized: divide by the mean probability of being wrong.
        max_iter: steps at most; data that are not separable end there, with a warning.
        theta0: where to begin, in units of theta (theta / gamma for an infinite gamma).
        record: keep every iterate.
        lambda_: shrink theta by 1 - gamma lambda_ a step (finite gamma).
        pocket: where ``max_iter`` is reached, give back the iterate with the fewest errors, then the smallest violation.
        average: where ``max_iter`` is reached, give back the mean of all iterates after the start instead.
        batch_size: step on so many rows at a time, shuffled anew by ``seed`` every epoch, normalised within the batch; all margins
            are looked at once an epoch. An extension of ours without a bound.
        group: a process group of ``torch.distributed`` whose processes hold parts of the rows, with both labels among each one's
            own or labels -1 and +1; every process returns the same. A step exchanges d + 3 numbers.

    Raises:
        ValueError: bad data (:func:`signed`), ``gamma`` not positive, a ``theta0`` of another shape, ``batch_size`` below 1 or
            together with ``group``.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive (math.inf for the perceptron); it is {gamma}")
    if lambda_ and not 0 <= gamma * lambda_ < 1:
        raise ValueError(f"gamma * lambda_ must lie in [0, 1); it is {gamma * lambda_}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is at least 1, or None for all rows at once; it is {batch_size}")
    if batch_size is not None and group is not None:
        raise ValueError("batch_size and group cannot be given together: processes step on all of their rows")
    Z = signed(A, y)
    # margins and step of the present iterate: of all rows, or of a batch, which says no margins between epochs
    steps = _batches(Z, gamma, normalized, batch_size, seed) if batch_size else _all_rows(Z, gamma, normalized)
    errors, total, t = 0, _sum(len(Z), group), 0
    u = torch.zeros(Z.shape[1], dtype=torch.float64, device=Z.device)
    if theta0 is not None:
        start = torch.as_tensor(theta0, dtype=torch.float64)
        if start.shape != u.shape:
            raise ValueError(
                f"theta0 must have one entry a feature, {tuple(u.shape)}; its shape is {tuple(start.shape)}"
            )
        u = start.clone() if math.isinf(gamma) else start / gamma
    path, best, mean = [u.clone()] if record else [], (total + 1, math.inf, u), torch.zeros_like(u)
    for t in range(max_iter + 1):
        m, step = steps(t, u, t == max_iter)
        if m is not None:
            errors, worst = int((m <= 0).sum()), float(m.min())
            if group is not None:
                errors, worst, step = _shared(m, step, gamma, normalized, group)
            if pocket and (errors, -worst) < best[:2]:
                best = (errors, -worst, u.clone())
            if errors == 0 or t == max_iter:
                break
        if t == 0 and theta0 is None and not normalized and math.isinf(gamma):
            # every sigma is 1/2 at theta = 0, however large gamma
            step = step / 2
        u = (u * (1 - gamma * lambda_) if lambda_ else u) + step
        mean += (u - mean) / (t + 1)
        if record:
            path.append(u.clone())
    separated = errors == 0
    if not separated:
        _warn(max_iter, errors, total)
        if average:
            u, errors = mean, _sum(int((Z @ mean <= 0).sum()), group)
        elif pocket:
            errors, _, u = best
    return Result(u, t, separated, errors, torch.stack(path) if record else None, gamma)


_Steps = Callable[[int, Tensor, bool], tuple[Tensor | None, Tensor]]


def _all_rows(Z: Rows, gamma: float, normalized: bool) -> _Steps:
    return lambda t, u, last: one_pass(Z, u, gamma, normalized)


def _batches(Z: Rows, gamma: float, normalized: bool, size: int, seed: int) -> _Steps:
    draw, queue = torch.Generator().manual_seed(seed), []

    def step(t: int, u: Tensor, last: bool) -> tuple[Tensor | None, Tensor]:
        margins = None if queue and not last else Z @ u
        if not queue:
            queue.extend(torch.randperm(len(Z), generator=draw).split(size))
        return margins, one_pass(Z[queue.pop()], u, gamma, normalized)[1]

    return step


def _sum(number: int, group: Any) -> int:
    """A whole number added up over the processes of a group."""
    if group is None:
        return number
    found = torch.tensor(number, dtype=torch.int64)
    torch.distributed.all_reduce(found, group=group)
    return int(found)


def _shared(m: Tensor, step: Tensor, gamma: float, normalized: bool, group: Any) -> tuple[int, float, Tensor]:
    """Errors, smallest margin and step of all rows, from the margins and the step of this process's rows."""
    wrong = m <= 0
    # what the step of these rows was divided by, as a logarithm: sum(sigma) underflows
    if not normalized:
        weight = m.new_tensor(len(m)).log()
    else:
        weight = wrong.sum().to(m.dtype).log() if math.isinf(gamma) else F.logsigmoid(-gamma * m).logsumexp(0)
    highest = torch.stack([weight, -m.min()])
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    top, worst = highest.unbind()
    share = (weight - top).exp() if bool(top.isfinite()) else torch.zeros_like(top)
    sums = torch.cat([share * step, torch.stack([share, wrong.sum().to(m.dtype)])])
    torch.distributed.all_reduce(sums, group=group)
    return int(sums[-1]), -float(worst), sums[:-2] / sums[-2].clamp(min=torch.finfo(m.dtype).tiny)


def _warn(max_iter: int, errors: int, n: int) -> None:
    from sklearn.exceptions import ConvergenceWarning

    warnings.warn(
        f"not separated after {max_iter} steps: {errors} of {n} samples are on the wrong side; raise max_iter, or the data cannot be "
        "separated by a hyperplane",
        ConvergenceWarning,
        stacklevel=3,
    )


def batch_perceptron(A: Any, y: Any, normalized: bool = False, max_iter: int = 10000, record: bool = False) -> Result:
    """The limit of LR+GD for an infinite step: theta += 1/n (or 1/|S|) sum of z_i over S = {m_i <= 0}; the first step of the
    one divided by n is half as long."""
    return large_step_gd(A, y, math.inf, normalized, max_iter, record=record)


def perceptron(
    A: Any, y: Any, order: Literal["first", "random", "worst"] = "first", max_iter: int = 100000, seed: int = 0
) -> Result:
    """The classical perceptron: one misclassified sample a step, at most R^2 / mu^2 of them.

    Raises:
        ValueError: bad data, or another ``order``.
    """
    if order not in ("first", "random", "worst"):
        raise ValueError(f'order is "first", "random" or "worst", not {order!r}')
    Z, draw = signed(A, y), torch.Generator().manual_seed(seed)
    u, wrong, t = torch.zeros(Z.shape[1], dtype=torch.float64), torch.zeros(0), 0
    for t in range(max_iter + 1):
        m = Z @ u
        wrong = (m <= 0).nonzero().flatten()
        if not len(wrong) or t == max_iter:
            break
        pick = {
            "first": 0,
            "random": int(torch.randint(len(wrong), (), generator=draw)),
            "worst": int(m[wrong].argmin()),
        }
        u = u + row(Z, int(wrong[pick[order]]))
    if len(wrong):
        _warn(max_iter, len(wrong), len(Z))
    return Result(u, t, not len(wrong), len(wrong))


def worst_case(n: int) -> tuple[Tensor, Tensor]:
    """A set of n samples in the plane on which LR+GD takes a number of steps proportional to n, whatever its step size, and the
    normalised form a constant number: z = (1/2, -1) once, (1/2, 1) n - 1 times. Returns (A, y)."""
    A = torch.tensor([[0.5, 1.0]], dtype=torch.float64).repeat(n, 1)
    A[0, 1] = -1.0
    return A, torch.ones(n)


def normalized_logistic_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The mean logistic loss whose gradient is divided by the mean probability of being wrong (which is held constant).

    Args:
        logits: (n,) with targets 0 or 1 (or -1 and +1), or (n, classes) with targets (n,) of class numbers; the latter is an
            extension of ours that agrees with the former for two classes and theta their difference.

    Returns:
        A scalar: loss / mean(1 - p_y).

    Raises:
        ValueError: other shapes.
    """
    if logits.dim() == 1 and target.shape == logits.shape:
        m = torch.where(target > 0, logits, -logits)
    elif logits.dim() == 2 and target.shape == logits.shape[:1]:
        own = logits.gather(1, target[:, None])[:, 0]
        m = own - logits.masked_fill(F.one_hot(target, logits.shape[1]).bool(), -math.inf).logsumexp(1)
    else:
        raise ValueError(
            f"logits are (n,) or (n, classes) with targets (n,); they are {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    fixed = m.detach()
    log_wrong = F.logsigmoid(-fixed)
    # log softplus(-m), which is -m itself where the loss underflows
    log_loss = torch.where(fixed > 30, -fixed, (-F.logsigmoid(fixed)).clamp(min=torch.finfo(m.dtype).tiny).log())
    value = (log_loss.logsumexp(0) - log_wrong.logsumexp(0)).exp()
    return value - (torch.softmax(log_wrong, 0) * (m - fixed)).sum()


class NormalizedGD(Optimizer):
    """Gradient descent on any logistic-type loss, its gradient divided by the mean probability of being wrong.

    For a linear model and the full batch this is Normalized LR+GD; for other networks the paper leaves it open, and nothing is
    guaranteed. The closure returns (loss, mean probability of being wrong), e.g. ``(loss, (1 - p_y).mean())``.

    Args:
        lr: the step size gamma.
        full_batch: say that every closure sees all samples; False normalises within a batch (an extension of ours).

    Raises:
        ValueError: ``lr`` not positive. TypeError: a step without a closure, or whose closure does not give the pair.
    """

    follows_gradient_size = True

    def __init__(self, params: Any, lr: float = 100.0, full_batch: bool = True) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive; it is {lr}")
        super().__init__(params, {"lr": lr, "full_batch": full_batch})

    @torch.no_grad()
    def step(self, closure: Callable[[], tuple[Tensor, Any]] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the loss. A mean probability of zero means that nothing is wrong: the step is left out."""
        if closure is None:
            raise TypeError("NormalizedGD needs a closure that returns (loss, mean probability of being wrong)")
        with torch.enable_grad():
            found = closure()
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                f"the closure must return (loss, mean probability of being wrong), not {type(found).__name__}"
            )
        loss, wrong = found
        wrong = torch.as_tensor(wrong).detach().double()
        scale = torch.where(wrong > 0, 1 / wrong, 0.0)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (group["lr"] * scale).to(p.device, p.dtype))
        return loss
