"""A linear classifier that separates (nearly) separable data in a few full passes: large-step logistic regression.

The solver is :func:`headway.optim.large_step_gd` (Tyurin, 2024, arXiv 2412.08424): gradient descent on the logistic loss with a
step so large that it is a batch perceptron, normalised by the mean probability of being wrong. Reach for it as a linear probe on
frozen features, or where lbfgs reports that it did not converge because the data are separable and regularisation is weak. Not for
calibrated probabilities: without ``polish`` they are 0 or 1.

More than two classes, one against the rest or all together ("multinomial"), are an extension of ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from headway._features import features_of
from headway.optim.normalized_gd import large_step_gd
from headway.optim.sparse_rows import (
    Rows,
    back,
    is_sparse,
    norms,
    rows_of,
    spectral_norm,
    times_rows,
    with_column,
    zero_rows,
)


class LargeStepLogisticRegression(ClassifierMixin, BaseEstimator):
    """Logistic regression by (Normalized) LR+GD with a large step, with scikit-learn's interface.

    Args:
        gamma: step size; ``math.inf`` is the batch perceptron. normalized: divide by the mean probability of being wrong.
        fit_intercept: append a column of ``intercept_scaling`` (the median column norm over sqrt(n) if None).
        max_iter: steps at most. pocket: where they run out, keep the iterate with the fewest errors.
        polish: steps of plain gradient descent at 1/L after separation, for the margin and for probabilities.
        multi_class: "ovr" or "multinomial". scale: "maxnorm" divides by the largest sample's norm, so that gamma is free of units.
        batch_size: step on so many samples at a time (one against the rest and two classes; an extension of ours).
        random_state: shuffles the batches.

    Attributes:
        coef_ (1 or classes, features), intercept_, classes_, n_iter_ (1 or classes,), separated_, margin_ (smallest margin of the
        training samples over the norm of the coefficients, intercept included).

    Raises:
        ValueError: fewer than two classes, settings out of range, NaN or infinity. Warns ConvergenceWarning when not separated.
    """

    def __init__(
        self,
        gamma: float = 100.0,
        normalized: bool = True,
        fit_intercept: bool = True,
        max_iter: int = 10000,
        polish: int = 0,
        pocket: bool = True,
        multi_class: Literal["ovr", "multinomial"] = "ovr",
        scale: Literal["maxnorm"] | None = None,
        random_state: Any = None,
        intercept_scaling: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.gamma = gamma
        self.normalized = normalized
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.polish = polish
        self.pocket = pocket
        self.multi_class = multi_class
        self.scale = scale
        self.random_state = random_state
        self.intercept_scaling = intercept_scaling
        self.batch_size = batch_size

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: Any) -> LargeStepLogisticRegression:
        """X: (samples, features) finite, dense or a sparse matrix of scipy; y: (samples,) of at least two classes."""
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive (math.inf for the perceptron); it is {self.gamma}")
        if self.multi_class not in ("ovr", "multinomial") or self.scale not in (None, "maxnorm"):
            raise ValueError(
                f'multi_class is "ovr" or "multinomial" and scale None or "maxnorm", not {self.multi_class!r} and {self.scale!r}'
            )
        if self.batch_size is not None and self.multi_class == "multinomial":
            raise ValueError(
                'multi_class="multinomial" steps on all samples at once; leave batch_size out, or use "ovr"'
            )
        X, y = validate_data(self, X, y, dtype=np.float64, accept_sparse="csr")  # type: ignore[misc]
        check_classification_targets(y)
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1)) if self.batch_size else 0
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least two classes; y holds 1 class: {self.classes_[0]!r}")
        A: Rows = rows_of(X) if is_sparse(X) else torch.from_numpy(np.ascontiguousarray(X))
        unit = float(norms(A, 1).max()) if self.scale == "maxnorm" else 1.0
        unit = unit or 1.0
        A = times_rows(A, torch.full((len(A),), 1 / unit, dtype=torch.float64)) if unit != 1.0 else A
        column = self._column(A)
        if column:
            A = with_column(A, column)
        labels = torch.from_numpy(index)
        if len(self.classes_) == 2:
            theta, steps, done = self._two(A, labels == 1)
            self.n_iter_, self.separated_ = np.array([steps]), done
            theta = theta[None]
            margins = torch.where(labels == 1, A @ theta[0], -(A @ theta[0])) / theta.norm().clamp(min=1e-300)
        elif self.multi_class == "ovr":
            found = [self._two(A, labels == c) for c in range(len(self.classes_))]
            theta = torch.stack([f[0] for f in found])
            self.n_iter_, self.separated_ = np.array([f[1] for f in found]), all(f[2] for f in found)
            signs = torch.where(torch.nn.functional.one_hot(labels, len(found)).bool(), 1.0, -1.0)
            margins = (A @ theta.t() * signs / theta.norm(dim=1).clamp(min=1e-300)).amin(1)
        else:
            theta, steps, self.separated_ = self._all(A, labels)
            self.n_iter_ = np.array([steps])
            margins = _lead(A @ theta.t(), labels) / theta.norm().clamp(min=1e-300)
        self.margin_ = float(margins.min())
        theta = theta.numpy()
        self.intercept_ = theta[:, -1] * column if column else np.zeros(len(theta))
        self.coef_ = (theta[:, :-1] if column else theta) / unit
        return self

    def _column(self, A: Rows) -> float:
        if not self.fit_intercept:
            return 0.0
        if self.intercept_scaling is not None:
            return float(self.intercept_scaling)
        return float(norms(A, 0).median()) / math.sqrt(len(A)) or 1.0

    def _two(self, A: Rows, positive: Tensor) -> tuple[Tensor, int, bool]:
        y = positive.double() * 2 - 1
        zero = zero_rows(A)
        if zero.any():
            # no margin of a zero row is ever positive: it is left out, and the data count as not separated
            warnings.warn(
                "not separable: a row of X is zero and there is no intercept", ConvergenceWarning, stacklevel=3
            )
            A, y = A[~zero], y[~zero]
        if len(y.unique()) < 2:
            return torch.zeros(A.shape[1], dtype=torch.float64), 0, False
        more = {"pocket": self.pocket, "batch_size": self.batch_size, "seed": self._seed}
        found = large_step_gd(A, y, self.gamma, self.normalized, self.max_iter, **more)
        theta = found.theta if math.isinf(self.gamma) else found.theta * min(self.gamma, 1e100)
        if self.polish:
            theta = polished(times_rows(A, y), found.theta, self.polish)
        return theta, found.n_iter, found.separated and not bool(zero.any())

    def _all(self, A: Rows, labels: Tensor) -> tuple[Tensor, int, bool]:
        """Softmax regression whose step is divided by the mean of 1 - p_y; an extension of ours."""
        classes = len(self.classes_)
        gamma = min(self.gamma, 1e12)
        W = torch.zeros(classes, A.shape[1], dtype=torch.float64)
        best, hot = (len(A) + 1, math.inf, W), torch.nn.functional.one_hot(labels, classes)
        errors = t = 0
        for t in range(self.max_iter + 1):
            logits = A @ W.t()
            lead = _lead(logits, labels)
            errors = int((lead <= 0).sum())
            if self.pocket and (errors, -float(lead.min())) < best[:2]:
                best = (errors, -float(lead.min()), W.clone())
            if errors == 0 or t == self.max_iter:
                break
            slope = (gamma * logits).softmax(1) - hot
            wrong = float(-slope.gather(1, labels[:, None]).mean()) if self.normalized else 1.0
            W = W - back(A, slope).t() / (len(A) * max(wrong, 1e-300))
        if errors:
            warnings.warn(
                f"not separated after {self.max_iter} steps: {errors} errors", ConvergenceWarning, stacklevel=3
            )
            W = best[2] if self.pocket else W
        return W * min(gamma, 1e12), t, errors == 0

    def decision_function(self, X: Any) -> np.ndarray:
        """(samples,) for two classes, else (samples, classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64, accept_sparse="csr")
        scores = np.asarray(X @ self.coef_.T) + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(samples, classes); 0 or 1 in practice unless ``polish`` was asked for."""
        scores = torch.from_numpy(self.decision_function(X))
        if scores.dim() == 1:
            positive = scores.sigmoid()
            return torch.stack([1 - positive, positive], 1).numpy()
        if self.multi_class == "multinomial":
            return scores.softmax(1).numpy()
        # sigmoids over their sum, in logarithms, so that no row is 0/0
        return torch.nn.functional.logsigmoid(scores).softmax(1).numpy()


def _lead(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -math.inf).amax(1)


def polished(Z: Rows, u: Tensor, steps: int) -> Tensor:
    """``steps`` of plain gradient descent at 1/L, L = lambda_max(Z^T Z) / (4 n), from u scaled to a smallest margin of 1."""
    low = float((Z @ u).abs().min())
    theta = u / (low or float((Z @ u).abs().mean()) or 1.0)
    rate = 4 * len(Z) / max(spectral_norm(Z) ** 2, 1e-300)
    for _ in range(steps):
        theta = theta + rate / len(Z) * back(Z, torch.sigmoid(-(Z @ theta)))
    return theta


@torch.no_grad()
def linear_probe(
    model: nn.Module, loader: Iterable[tuple[Any, Tensor]], device: str | torch.device | None = None, **settings: Any
) -> LargeStepLogisticRegression:
    """A linear classifier on the features of a frozen model, in one call.

    Args:
        model: anything whose output is features (n, d), (n, tokens, d) (averaged over tokens), or a Hugging Face output with
            ``pooler_output`` or ``last_hidden_state``.
        loader: pairs (inputs, labels (n,)); inputs a tensor, or a mapping of keyword arguments.
        **settings: of :class:`LargeStepLogisticRegression`.

    Raises:
        ValueError: the loader is empty, or the output holds no features.
    """
    training = model.training
    model.eval()
    try:
        parts = []
        for inputs, labels in loader:
            if isinstance(inputs, Tensor):
                out = model(inputs if device is None else inputs.to(device))
            else:
                out = model(**{key: value if device is None else value.to(device) for key, value in inputs.items()})
            parts.append((features_of(out).double().cpu(), labels))
    finally:
        model.train(training)
    if not parts:
        raise ValueError("the loader gave no batch")
    features, labels = (torch.cat([part[i] for part in parts]).numpy() for i in range(2))
    return LargeStepLogisticRegression(**settings).fit(features, labels)
