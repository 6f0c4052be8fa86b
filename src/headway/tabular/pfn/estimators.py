"""scikit-learn's interface: ``fit`` is the pass over the context, ``predict`` runs the queries against its kept keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from headway.tabular.pfn.heads import Predictive
from headway.tabular.pfn.network import PFN

_ROWS = 8192


class _Fitted(BaseEstimator):
    """What both estimators share: the model, the context, and queries in pieces."""

    model: Any

    def _load(self, regression: bool) -> PFN:
        model = self.model
        if isinstance(model, str | Path):
            model = PFN.from_pretrained(model)
        if not isinstance(model, PFN):
            raise ValueError(
                f"model is a trained PFN or the folder of one, not {model!r}; hw.tabular.train_pfn makes one"
            )
        if model.head.is_regression != regression:
            other = "PFNClassifier" if regression else "PFNRegressor"
            raise ValueError(f"the model's head is {type(model.head).__name__}; use {other}")
        return model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = getattr(self.model, "impute", None) == "zero"
        # how good it is depends on the model and its prior alone
        for part in (tags.classifier_tags, tags.regressor_tags):
            if part is not None:
                part.poor_score = True
        return tags

    @torch.no_grad()
    def _encode(self, model: PFN, X: np.ndarray, y: np.ndarray) -> None:
        device = model.enc_x.weight.device
        rows, outcomes = (torch.from_numpy(np.ascontiguousarray(part)).to(device)[None] for part in (X, y))
        self.model_ = model
        self.context_ = model.encode_context(rows, outcomes)

    @torch.no_grad()
    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite=_finite(self.model_))
        rows = torch.from_numpy(np.ascontiguousarray(X)).to(self.model_.enc_x.weight.device)[None]
        return torch.cat([self.model_.query(self.context_, part) for part in rows.split(_ROWS, 1)], 1)[0]


def _finite(model: PFN) -> Any:
    return "allow-nan" if model.impute == "zero" else True


class PFNRegressor(RegressorMixin, _Fitted):
    """The posterior predictive of a trained :class:`PFN` given (X, y).

    Args:
        model: a trained PFN with a :class:`BarDistribution` or :class:`GaussianHead`, or the folder it was saved to.

    Attributes:
        model_, context_: the network, and the context's keys and values.

    Raises:
        ValueError: no model, one for classes, NaN, more features or rows than it was made for.
    """

    def __init__(self, model: PFN | str | Path | None = None) -> None:
        self.model = model

    def fit(self, X: Any, y: Any) -> PFNRegressor:
        """X (n, F), y (n,): one pass, no training."""
        model = self._load(True)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_all_finite=_finite(model))  # type: ignore[misc]
        self._encode(model, X, np.asarray(y, np.float64))
        return self

    def predict_dist(self, X: Any) -> Predictive:
        """The predictive distributions of X (m, F), in the units of y: ``.mean``, ``.variance``, ``.icdf(q)``, ``.nll(y)`` ..."""
        out = self._outputs(X)
        shift, scale = float(self.context_.y_shift), float(self.context_.y_scale)
        head = self.model_.head if (shift, scale) == (0.0, 1.0) else self.model_.head.affine(shift, scale)
        return Predictive(head, out)

    def predict(self, X: Any, return_std: bool = False, quantiles: Sequence[float] | None = None) -> Any:
        """The mean (m,); with ``return_std`` also the standard deviation; with ``quantiles`` also those (len(quantiles), m)."""
        answer = self.predict_dist(X)
        parts = [answer.mean]
        if return_std:
            parts.append(answer.variance.sqrt())
        if quantiles is not None:
            parts.append(torch.stack([answer.icdf(q) for q in quantiles]))
        arrays = [part.double().cpu().numpy() for part in parts]
        return arrays[0] if len(arrays) == 1 else tuple(arrays)


class PFNClassifier(ClassifierMixin, _Fitted):
    """Class probabilities of a trained :class:`PFN` given (X, y).

    Args:
        model: a trained PFN with a :class:`BernoulliHead` or :class:`CategoricalHead`, or the folder it was saved to.

    Attributes:
        classes_, model_, context_.

    Raises:
        ValueError: no model, one for numbers, more classes than it knows, one class only, NaN, too many features or rows.
    """

    def __init__(self, model: PFN | str | Path | None = None) -> None:
        self.model = model

    def fit(self, X: Any, y: Any) -> PFNClassifier:
        """X (n, F), y (n,): one pass, no training."""
        model = self._load(False)
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_all_finite=_finite(model))  # type: ignore[misc]
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least two classes; y holds 1 class: {self.classes_[0]!r}")
        if len(self.classes_) > model.head.num_classes:
            raise ValueError(f"the model knows {model.head.num_classes} classes; y holds {len(self.classes_)}")
        self._encode(model, X, index.astype(np.float64))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """(m, classes); classes the model knows but y did not hold are left out and the rest scaled to 1."""
        out = self._outputs(X)
        log_p = self.model_.head.log_probabilities(out)
        return log_p[..., : len(self.classes_)].double().softmax(-1).cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        head = getattr(self.model, "head", None)
        tags.classifier_tags.multi_class = getattr(head, "num_classes", 3) > 2
        return tags
