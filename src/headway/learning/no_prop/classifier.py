"""NoProp with scikit-learn's interface (arXiv 2503.24322, 2025), for tables (n, features) and images (n, channels, height, width)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from headway.learning.no_prop.blocks import ConditionalBlock, Norm, conv_encoder, dense_encoder
from headway.learning.no_prop.continuous import NoPropCT, NoPropFM
from headway.learning.no_prop.discrete import NoPropDT
from headway.learning.no_prop.fit import fit_noprop
from headway.learning.no_prop.labels import Embed, LabelDenoiser
from headway.learning.no_prop.schedules import LearnedSchedule


class NoPropClassifier(ClassifierMixin, BaseEstimator):
    """A classifier whose blocks are trained without gradients between them.

    Args:
        variant: "dt" (T blocks), "ct" or "fm" (one network of continuous time).
        T: blocks of "dt". steps: of the chain of "ct" and "fm". hidden: width of a block. embed, dim: see :class:`NoPropDT`.
        eta: weight of the denoising loss; the paper's 0.1 ("dt") or 1 ("ct") unless given. norm: of the blocks of "dt".
        epochs, batch_size, learning_rate, weight_decay: of training. workers: processes for the blocks of "dt".
        samples: draws of the noise averaged in a prediction; all rows meet the same noise, drawn from ``random_state``, so that
            predictions can be repeated and do not depend on the rows around them.

    Attributes:
        classes_, model_ (the NoProp model, float64, eval mode), losses_ (mean loss of each epoch).
    """

    def __init__(
        self,
        variant: Literal["dt", "ct", "fm"] = "dt",
        T: int = 10,
        hidden: int = 128,
        epochs: int = 30,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-3,
        embed: Embed = "onehot",
        dim: int | None = None,
        eta: float | None = None,
        norm: Norm = "batch",
        samples: int = 5,
        steps: int = 100,
        workers: int = 1,
        random_state: Any = None,
    ) -> None:
        self.variant = variant
        self.T = T
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.embed = embed
        self.dim = dim
        self.eta = eta
        self.norm = norm
        self.samples = samples
        self.steps = steps
        self.workers = workers
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> NoPropClassifier:
        """X: (samples, features) or (samples, channels, height, width), finite; y: (samples,) of at least two classes."""
        if self.variant not in ("dt", "ct", "fm"):
            raise ValueError(f'variant is "dt", "ct" or "fm", not {self.variant!r}')
        X, y = validate_data(self, X, y, dtype=np.float32, allow_nd=True)  # type: ignore[misc]
        check_classification_targets(y)
        if X.ndim not in (2, 4):
            raise ValueError(f"X is (n, features) or (n, channels, height, width); it has shape {X.shape}")
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"at least two classes are needed; y has one class, {self.classes_[0]!r}")
        self.shape_ = X.shape[1:]
        self.mean_, self.scale_ = float(X.mean()), float(X.std()) or 1.0
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.seed_ = seed
        inputs, labels = self._inputs(X, torch.float32), torch.from_numpy(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._build(X.shape[1:])
            if self.embed == "prototype":
                model.place_prototypes(inputs, labels)
        loader = ShuffledBatches(inputs, labels, self.batch_size)
        settings = _Optimizer(model.optimizer_class, self.learning_rate, self.weight_decay)
        fit = fit_noprop(model, loader, self.epochs, settings, self.workers, seed=seed)
        self.losses_ = fit.losses
        self.model_ = model.eval().double()
        return self

    def _build(self, shape: tuple[int, ...]) -> LabelDenoiser:
        m, timed = len(self.classes_), self.variant != "dt"
        norm: Any = "none" if timed else self.norm
        dim = int(np.prod(shape)) if self.embed == "prototype" else self.dim

        def block(t: int = 0) -> nn.Module:
            encoder = (
                conv_encoder(shape[0], shape[1:])  # type: ignore[arg-type]
                if len(shape) == 3
                else dense_encoder(shape[0], self.hidden, norm)
            )
            z_path: Any = {}
            if (
                self.embed == "prototype" and len(shape) == 3
            ):  # a label is an image here, and goes through convolutions like one
                convolutions, width = conv_encoder(shape[0], shape[1:])  # type: ignore[arg-type]
                z_path = {"z_encoder": nn.Sequential(nn.Unflatten(1, shape), convolutions), "z_dim": width}
            return ConditionalBlock(*encoder, dim or m, self.hidden, norm, m, timed, **z_path)

        embed: Any = self.embed
        eta: Any = {} if self.eta is None else {"eta": self.eta}
        if self.variant == "dt":
            return NoPropDT(block, m, self.T, embed, dim, **eta)
        if self.variant == "fm":
            return NoPropFM(block(), m, embed, dim, steps=self.steps)
        # narrower than the default: on small data the weights of late times would drown the early ones
        schedule = LearnedSchedule(low=-3.0, high=3.0)
        return NoPropCT(block(), m, embed, dim, schedule=schedule, steps=self.steps, **eta)

    def _inputs(self, X: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy((X - self.mean_) / self.scale_).to(dtype)

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """(samples, classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64, allow_nd=True)
        if X.shape[1:] != self.shape_:
            raise ValueError(f"X was fitted with samples of shape {self.shape_}; these have {X.shape[1:]}")
        generator = torch.Generator().manual_seed(self.seed_)
        inputs = self._inputs(X, torch.float64)
        logits = self.model_(inputs, samples=self.samples, generator=generator, shared_noise=True)
        return logits.softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]


class ShuffledBatches:
    """Batches of tensors in a new order each time, drawn from torch's generator; a last batch of one joins the one before it."""

    def __init__(self, inputs: Tensor, labels: Tensor, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1; it is {batch_size}")
        self.inputs, self.labels, self.batch_size = inputs, labels, batch_size

    def __iter__(self) -> Any:
        parts = list(torch.randperm(len(self.inputs)).split(self.batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return ((self.inputs[rows], self.labels[rows]) for rows in parts)


class _Optimizer:
    def __init__(self, kind: Any, lr: float, weight_decay: float) -> None:
        self.kind, self.lr, self.weight_decay = kind, lr, weight_decay

    def __call__(self, params: Any) -> torch.optim.Optimizer:
        return self.kind(params, lr=self.lr, weight_decay=self.weight_decay)
