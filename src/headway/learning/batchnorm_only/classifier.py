"""A deep random convolutional network whose norms alone are trained, with scikit-learn's interface (arXiv 2003.00152, 2020)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from headway.learning.batchnorm_only.resnets import CIFARResNet
from headway.learning.batchnorm_only.technique import BatchNormOnly, OutputOnly, RandomParametersOnly
from headway.learning.no_prop.classifier import ShuffledBatches
from headway.surgery import apply

Trains = Literal["norm", "norm+output", "output", "random", "all"]
_ARMS: dict[str, Any] = {
    "norm": BatchNormOnly,
    "norm+output": lambda: BatchNormOnly(include_output=True),
    "output": OutputOnly,
    "random": RandomParametersOnly,
}


class RandomFeatureCNNClassifier(ClassifierMixin, BaseEstimator):
    """A residual network of random convolutions; SGD with momentum 0.9, the rate divided by ten at 1/2 and 3/4 of the epochs.

    Args:
        depth: residual blocks of each of two stages. width: channels of the first stage.
        trains: "norm" (gains and shifts alone), "norm+output", "output", "random" (as many random weights) or "all".
        gain: how gains start: "uniform" (U(0, 1)), "ones" or "signed" (U(-1, 1)).
        epochs, batch_size, learning_rate, weight_decay: of training.
        image_shape: (channels, height, width) of the rows of a table; without it a row is an image of height 1.

    Attributes:
        classes_, model_ (in evaluation mode), losses_ (mean loss of each epoch), n_trainable_.
    """

    def __init__(
        self,
        depth: int = 2,
        width: int = 16,
        epochs: int = 30,
        trains: Trains = "norm",
        gain: Literal["uniform", "ones", "signed"] = "uniform",
        batch_size: int = 128,
        learning_rate: float = 0.1,
        weight_decay: float = 1e-4,
        image_shape: tuple[int, int, int] | None = None,
        random_state: Any = None,
    ) -> None:
        self.depth = depth
        self.width = width
        self.epochs = epochs
        self.trains = trains
        self.gain = gain
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.image_shape = image_shape
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> RandomFeatureCNNClassifier:
        """X: (samples, features) or (samples, channels, height, width), finite; y: (samples,) of at least two classes."""
        if self.trains not in (*_ARMS, "all"):
            raise ValueError(f"trains is one of {', '.join([*_ARMS, 'all'])}; it is {self.trains!r}")
        X, y = validate_data(self, X, y, dtype=np.float32, allow_nd=True)  # type: ignore[misc]
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"at least two classes are needed; y has one class, {self.classes_[0]!r}")
        self.shape_ = X.shape[1:]
        self.mean_, self.scale_ = float(X.mean()), float(X.std()) or 1.0
        images, labels = self._images(X), torch.from_numpy(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
            gain: Any = self.gain
            model = CIFARResNet(self.depth, self.width, images.shape[1], len(self.classes_), 2, gain)
            if self.trains != "all":
                apply(model, _ARMS[self.trains]())
            self.losses_ = self._train(model, ShuffledBatches(images, labels, self.batch_size))
        self.n_trainable_ = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.model_ = model.eval()
        return self

    def _train(self, model: nn.Module, batches: ShuffledBatches) -> list[float]:
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(chosen, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        steps = [self.epochs // 2, 3 * self.epochs // 4] if self.epochs >= 4 else []
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps)
        losses = []
        for _ in range(self.epochs):
            total = 0.0
            for x, y in batches:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(x)
            schedule.step()
            losses.append(total / len(batches.inputs))
        return losses

    def _images(self, X: np.ndarray) -> torch.Tensor:
        if X.ndim not in (2, 4):
            raise ValueError(f"X is (n, features) or (n, channels, height, width); it has shape {X.shape}")
        if X.ndim == 2:
            shape = self.image_shape or (1, 1, X.shape[1])
            if len(shape) != 3 or np.prod(shape) != X.shape[1]:
                raise ValueError(f"image_shape={shape} does not hold the {X.shape[1]} features of a row")
            X = X.reshape(len(X), *shape)
        return torch.from_numpy(np.ascontiguousarray((X - self.mean_) / self.scale_, np.float32))

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """(samples, classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float32, allow_nd=True)
        if X.shape[1:] != self.shape_:
            raise ValueError(f"X was fitted with samples of shape {self.shape_}; these have {X.shape[1:]}")
        return self.model_(self._images(X)).double().softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]
