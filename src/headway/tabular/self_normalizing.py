"""Deep fully connected nets for tables, with scikit-learn's interface: self-normalising nets and all that belongs around them.

Inputs are standardised (categories one-hot first), hidden layers are linear, SELU and alpha dropout with the LeCun start, the output
is linear; training is SGD with momentum on all but a held-out part, which says when to stop. "Self-Normalizing Neural Networks"
(Klambauer et al.), 2017, arXiv 1706.02515. For tables where depth helps; a forest or a boosted tree is the first thing to hold it
against.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from headway.weights.lecun import self_normalizing_init_
from headway.weights.self_normalizing import SELU, AlphaDropout


class SNN(nn.Sequential):
    """A self-normalising net: ``depth`` times linear, SELU and alpha dropout, then a linear layer.

    Args:
        in_features, out_features: sizes of input and output.
        hidden: width of the first hidden layer.
        depth: hidden layers.
        shape: "cylinder" (all hidden layers alike) or "cone" (widths fall geometrically towards ``out_features``).
        dropout: rate of the alpha dropout; 0 leaves it out.

    Shapes:
        (..., in_features) -> (..., out_features).

    Raises:
        ValueError: a size below 1, a negative depth, an unknown shape, or a rate outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 256,
        depth: int = 8,
        shape: Literal["cylinder", "cone"] = "cylinder",
        dropout: float = 0.05,
    ) -> None:
        if min(in_features, out_features, hidden) < 1 or depth < 0:
            raise ValueError(
                f"in_features, out_features and hidden are at least 1, depth at least 0; they are {in_features}, "
                f"{out_features}, {hidden}, {depth}"
            )
        if shape not in ("cylinder", "cone"):
            raise ValueError(f'shape is "cylinder" or "cone", not {shape!r}')
        fall = (out_features / hidden) ** (1 / max(depth, 1)) if shape == "cone" else 1.0
        widths = [in_features, *(max(1, round(hidden * fall**i)) for i in range(depth))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), SELU(), *([AlphaDropout(dropout)] if dropout else [])]
        super().__init__(*layers, nn.Linear(widths[-1], out_features))
        self_normalizing_init_(self)


class _Estimator(BaseEstimator):
    """What the classifier and the regressor share: preparing columns, training with early stopping, applying the net."""

    def __init__(
        self,
        hidden: int = 128,
        depth: int = 8,
        shape: str = "cylinder",
        dropout: float = 0.05,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        batch_size: int = 32,
        max_epochs: int = 100,
        patience: int = 15,
        validation_fraction: float = 0.15,
        categorical: Any = None,
        random_state: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.hidden, self.depth, self.shape, self.dropout = hidden, depth, shape, dropout
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.batch_size, self.max_epochs, self.patience = batch_size, max_epochs, patience
        self.validation_fraction, self.categorical = validation_fraction, categorical
        self.random_state, self.device = random_state, device

    def _prepare(self, X: Any, y: Any, **checks: Any) -> tuple[np.ndarray, np.ndarray]:
        """Standardised features of the training data, categories one-hot; remembers how."""
        if self.batch_size < 1 or self.max_epochs < 1 or not 0 <= self.validation_fraction < 1:
            raise ValueError(
                "batch_size and max_epochs are at least 1 and validation_fraction lies in [0, 1); they are "
                f"{self.batch_size}, {self.max_epochs}, {self.validation_fraction}"
            )
        self._columns = self._categories(X)
        if not self._columns:
            X, y = validate_data(self, X, y, dtype=np.float64, **checks)
            self._scale: Any = StandardScaler().fit(X)
        else:
            _, y = validate_data(self, X, y, dtype=None, ensure_all_finite=False, **checks)
            encode = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
            columns = ColumnTransformer([("categories", encode, self._columns)], remainder="passthrough")
            # the ones and zeros of categories are standardised too: the theory asks for it
            self._scale = make_pipeline(columns, StandardScaler()).fit(X)
        return np.asarray(self._scale.transform(X), np.float32), y

    def _categories(self, X: Any) -> list[Any]:
        if self.categorical is not None:
            return list(self.categorical)
        kinds = getattr(X, "dtypes", None)
        if kinds is None or not hasattr(X, "columns"):
            return []
        return [c for c, kind in zip(X.columns, kinds, strict=True) if getattr(kind, "kind", "O") not in "buif"]

    def _features(self, X: Any) -> Tensor:
        check_is_fitted(self, "net_")
        if self._columns:
            validate_data(self, X, dtype=None, ensure_all_finite=False, reset=False)
        else:
            X = validate_data(self, X, dtype=np.float64, reset=False)
        return torch.from_numpy(np.asarray(self._scale.transform(X), np.float64))

    def _train(self, features: np.ndarray, target: Tensor, weights: Tensor, outputs: int, stratify: Any) -> None:
        """SGD; keeps the weights of the best epoch on the held-out part (all rows where nothing is held out)."""
        seed = int(np.random.randint(2**31)) if self.random_state is None else int(self.random_state)
        random = torch.Generator().manual_seed(seed)
        x = torch.from_numpy(features)
        places, held = np.arange(len(x)), np.arange(0)
        # a held-out part of fewer than one row a class would say nothing
        if self.validation_fraction and self.validation_fraction * len(x) >= 2:
            try:
                places, held = train_test_split(
                    places, test_size=self.validation_fraction, random_state=seed, stratify=stratify
                )
            except ValueError:  # a class with a single row cannot be split
                places, held = train_test_split(places, test_size=self.validation_fraction, random_state=seed)
        rows, held_rows = torch.from_numpy(places), torch.from_numpy(held)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SNN(x.shape[1], outputs, self.hidden, self.depth, self.shape, self.dropout).to(self.device)  # type: ignore[arg-type]
            optimizer = torch.optim.SGD(
                net.parameters(), self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
            best, waited, kept = float("inf"), 0, copy.deepcopy(net.state_dict())
            self.history_: list[float] = []
            for _ in range(self.max_epochs):
                net.train()
                for part in rows[torch.randperm(len(rows), generator=random)].split(self.batch_size):
                    loss = self._loss(net(x[part].to(self.device)).cpu(), target[part], weights[part])
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(net.parameters(), 10.0)
                    optimizer.step()
                net.eval()
                watched = held_rows if len(held_rows) else rows
                with torch.no_grad():
                    now = float(self._loss(net(x[watched].to(self.device)).cpu(), target[watched], weights[watched]))
                self.history_.append(now)
                if now < best:
                    best, waited, kept = now, 0, copy.deepcopy(net.state_dict())
                elif (waited := waited + 1) >= self.patience:
                    break
        net.load_state_dict(kept)
        # in float64 a row's answer does not depend on the rows beside it
        self.net_, self.n_iter_ = net.eval().double(), len(self.history_)

    def _loss(self, out: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply_net(self, X: Any) -> Tensor:
        features = self._features(X)
        with torch.no_grad():
            return torch.cat([self.net_(part.to(self.device)).cpu() for part in features.split(4096)])


def _with_settings_of(base: type) -> Callable[[Any], Any]:
    """Gives a constructor the signature of ``base``'s, its own settings last: scikit-learn and readers find all settings there."""

    def sign(init: Any) -> Any:
        shared = inspect.signature(base.__init__).parameters.values()
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
        init.__signature__ = inspect.Signature([*shared, *own])
        return init

    return sign


class SNNClassifier(ClassifierMixin, _Estimator):
    """A self-normalising net as a scikit-learn classifier.

    Args:
        hidden, depth, shape, dropout: of the :class:`SNN`.
        learning_rate, momentum, weight_decay, batch_size: of SGD. max_epochs: at most.
        patience: epochs without a better held-out loss before it stops. validation_fraction: held out for that (0: nothing is).
        categorical: columns to encode one-hot (names or indices); by default those of a DataFrame that hold no numbers.
        random_state: a whole number makes a fit repeatable. device: where it trains.
        class_weight: None, "balanced", or {class: weight}.

    Attributes:
        classes_, net_ (the trained :class:`SNN`), n_iter_ (epochs), history_ (held-out loss of each epoch).

    Raises:
        ValueError: NaN or infinity, one class only, settings out of range.
    """

    @_with_settings_of(_Estimator)
    def __init__(self, *shared: Any, class_weight: Any = None, **settings: Any) -> None:
        super().__init__(*shared, **settings)
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SNNClassifier:
        """Trains on (rows, columns) and one class a row."""
        features, y = self._prepare(X, y)
        check_classification_targets(y)
        self.classes_, places = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least two classes; y holds one class, {self.classes_[0]}")
        given = _check_sample_weight(sample_weight, features, dtype=np.float32)
        if self.class_weight is not None:
            given = given * compute_class_weight(self.class_weight, classes=self.classes_, y=y)[places]
        weights = torch.as_tensor(np.asarray(given, np.float32))
        self._train(features, torch.from_numpy(places), weights, len(self.classes_), places)
        return self

    def _loss(self, out: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        each = F.cross_entropy(out, target, reduction="none")
        return (each * weights).sum() / weights.sum().clamp(min=1e-12)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(rows, classes), in the order of ``classes_``."""
        return self._apply_net(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most likely class of each row."""
        places = self.predict_proba(X).argmax(1)
        return self.classes_[places]


class SNNRegressor(RegressorMixin, _Estimator):
    """A self-normalising net as a scikit-learn regressor: mean squared error on standardised targets.

    Arguments and attributes as :class:`SNNClassifier`, without classes.

    Raises:
        ValueError: NaN or infinity, settings out of range.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SNNRegressor:
        """Trains on (rows, columns) and one number a row."""
        features, y = self._prepare(X, y, y_numeric=True)
        y = np.asarray(y, np.float64)
        self._mean, spread = y.mean(), y.std()
        self._spread = spread if spread > 0 else 1.0
        target = torch.from_numpy((y - self._mean) / self._spread).float()
        weights = torch.from_numpy(_check_sample_weight(sample_weight, features, dtype=np.float32))
        self._train(features, target, weights, 1, None)
        return self

    def _loss(self, out: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        return (weights * (out[:, 0] - target).square()).sum() / weights.sum().clamp(min=1e-12)

    def predict(self, X: Any) -> np.ndarray:
        """One number a row."""
        return self._apply_net(X)[:, 0].numpy() * self._spread + self._mean
