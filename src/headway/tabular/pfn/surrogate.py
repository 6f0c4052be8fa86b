"""A surrogate for Bayesian optimisation, shaped like BoTorch's models, with expected improvement in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.tabular.pfn.heads import Predictive
from headway.tabular.pfn.network import PFN


@dataclass(frozen=True)
class Posterior:
    """Mean and variance (..., q, 1) of the points asked for."""

    predictive: Predictive

    @property
    def mean(self) -> Tensor:
        return self.predictive.mean[..., None]

    @property
    def variance(self) -> Tensor:
        return self.predictive.variance[..., None]

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws (*sample_shape, ..., q, 1): points are independent of each other given the data."""
        draws = self.predictive.sample(torch.Size(sample_shape).numel())[..., None]
        return draws.reshape(*sample_shape, *draws.shape[1:])


class PFNSurrogate:
    """The posterior of a trained regression :class:`PFN` given train_X (n, d), train_Y (n, 1) or (n,).

    Gradients reach the points asked for, so that an acquisition can be climbed. Points of one question are answered each by itself.
    """

    num_outputs = 1

    def __init__(self, model: PFN, train_X: Tensor, train_Y: Tensor) -> None:
        if train_X.dim() != 2 or train_Y.numel() != len(train_X):
            raise ValueError(
                f"train_X is (n, d) and train_Y (n, 1); got {tuple(train_X.shape)} and {tuple(train_Y.shape)}"
            )
        if not model.head.is_regression:
            raise ValueError(f"a surrogate answers with numbers; the model's head is {type(model.head).__name__}")
        self.model = model
        with torch.no_grad():
            self.context = model.encode_context(train_X[None], train_Y.reshape(1, -1))

    def posterior(self, X: Tensor) -> Posterior:
        """X (..., q, d)."""
        out = self.model.query(self.context, X.reshape(1, -1, X.shape[-1]))[0].unflatten(0, X.shape[:-1])
        return Posterior(
            Predictive(self.model.head.affine(self.context.y_shift.item(), self.context.y_scale.item()), out)
        )

    def expected_improvement(self, X: Tensor, best: float, maximize: bool = True) -> Tensor:
        """(...,) for X (..., 1, d), or (..., q) for more points at once; exact and differentiable in X."""
        gain = self.posterior(X).predictive.ei(best, maximize)
        return gain[..., 0] if X.shape[-2] == 1 else gain
