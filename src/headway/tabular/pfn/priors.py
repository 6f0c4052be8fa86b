"""Priors over data sets, as samplers: ``prior(batch, N, F, generator) -> x (batch, N, F), y (batch, N)``.

Gaussian processes with a fixed kernel or with hyper-priors, and any function of yours. What has a closed form also says it
(:meth:`GPPrior.posterior`), so that a trained network can be held against the truth.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kernel = Literal["rbf", "matern52"]


def kernel_matrix(kind: Kernel, a: Tensor, b: Tensor, length: Tensor | float) -> Tensor:
    """Correlations (..., n, m) between rows a (..., n, F) and b (..., m, F); ``length`` divides the features."""
    if kind not in ("rbf", "matern52"):
        raise ValueError(f'the kernel is "rbf" or "matern52", not {kind!r}')
    square = (a / length).unsqueeze(-2).sub((b / length).unsqueeze(-3)).square().sum(-1)
    if kind == "rbf":
        return torch.exp(-0.5 * square)
    # the slope of the root at 0 is infinite
    r = math.sqrt(5) * square.clamp(min=1e-30).sqrt()
    return (1 + r + r.square() / 3) * torch.exp(-r)


def cholesky(K: Tensor, jitter: float = 1e-6, doublings: int = 5) -> Tensor:
    """Batched Cholesky factor; where it fails, a growing number is added to the diagonal.

    Raises:
        ValueError: it still fails after the last doubling.
    """
    factor, info = torch.linalg.cholesky_ex(K)
    for attempt in range(doublings + 1):
        if not bool(info.any()):
            return factor
        added = jitter * 2**attempt * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
        scale = K.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1.0)[..., None, None]
        factor, info = torch.linalg.cholesky_ex(K + torch.where((info > 0)[..., None, None], scale * added, 0.0))
    if bool(info.any()):
        raise ValueError("a covariance matrix is not positive definite even with jitter; give the prior more noise")
    return factor


@dataclass(frozen=True)
class GPPrior:
    """A Gaussian process with a fixed kernel on the unit cube: K = amplitude k(x, x') + noise I, x uniform."""

    kernel: Kernel = "rbf"
    length_scale: float = 0.6
    amplitude: float = 1.0
    noise: float = 1e-4

    def __call__(self, batch: int, N: int, F: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x = torch.rand(batch, N, F, dtype=torch.float64, generator=generator)
        z = torch.randn(batch, N, 1, dtype=torch.float64, generator=generator)
        return x.float(), (cholesky(self._covariance(x)) @ z)[..., 0].float()

    def _covariance(self, x: Tensor) -> Tensor:
        eye = torch.eye(x.shape[-2], dtype=x.dtype)
        return self.amplitude * kernel_matrix(self.kernel, x, x, self.length_scale) + self.noise * eye

    def posterior(self, x: Tensor, y: Tensor, x_q: Tensor) -> tuple[Tensor, Tensor]:
        """The exact predictive mean and variance (noise included) (B, m) given x (B, n, F), y (B, n); O(n^3)."""
        x, y, x_q = x.double(), y.double(), x_q.double()
        factor = cholesky(self._covariance(x))
        cross = self.amplitude * kernel_matrix(self.kernel, x, x_q, self.length_scale)
        solved = torch.linalg.solve_triangular(factor, cross, upper=False)
        weights = torch.linalg.solve_triangular(factor, y[..., None], upper=False)
        variance = self.amplitude + self.noise - solved.square().sum(-2)
        return (solved.mT @ weights)[..., 0], variance.clamp(min=1e-12)


@dataclass(frozen=True)
class GPHyperPrior:
    """A Gaussian process whose kernel is drawn for every data set: Matern 5/2 by default; each pair is (shape, rate) of a Gamma.

    ``ard`` draws one length for every feature.
    """

    kernel: Kernel = "matern52"
    length_scale: tuple[float, float] = (3.0, 6.0)
    output_scale: tuple[float, float] = (2.0, 0.15)
    noise: tuple[float, float] = (1e-4, 1.0)
    ard: bool = False

    def __call__(self, batch: int, N: int, F: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x = torch.rand(batch, N, F, dtype=torch.float64, generator=generator)
        length = _gamma(self.length_scale, (batch, 1, F if self.ard else 1), generator).clamp(min=1e-3)
        scale = _gamma(self.output_scale, (batch, 1, 1), generator)
        noise = _gamma(self.noise, (batch, 1, 1), generator)
        K = scale * kernel_matrix(self.kernel, x, x, length) + noise * torch.eye(N, dtype=x.dtype)
        z = torch.randn(batch, N, 1, dtype=torch.float64, generator=generator)
        return x.float(), (cholesky(K) @ z)[..., 0].float()


def _gamma(shape_rate: tuple[float, float], size: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    shape, rate = shape_rate
    return torch._standard_gamma(torch.full(size, shape, dtype=torch.float64), generator=generator) / rate


class FunctionPrior:
    """Your own prior: ``fn(batch, N, F, generator) -> x, y`` for a whole batch, or one data set a call as scikit-learn's
    generators make it, ``fn(n_samples=, n_features=, random_state=, **settings) -> X, y``.

    Raises:
        ValueError: x or y of another shape than (batch, N, up to F) and (batch, N).
    """

    def __init__(self, fn: Callable[..., Any], **settings: Any) -> None:
        self.fn, self.settings = fn, settings
        self.one_by_one = "n_samples" in inspect.signature(fn).parameters

    def __call__(self, batch: int, N: int, F: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        if self.one_by_one:
            seeds = torch.randint(2**31 - 1, (batch,), generator=generator).tolist()
            drawn = [self.fn(n_samples=N, n_features=F, random_state=seed, **self.settings) for seed in seeds]
            x, y = (torch.from_numpy(np.stack([part[i] for part in drawn])).float() for i in range(2))
        else:
            x, y = self.fn(batch, N, F, generator, **self.settings)
        if x.dim() != 3 or x.shape[:2] != (batch, N) or not 1 <= x.shape[2] <= F or y.shape != (batch, N):
            raise ValueError(
                f"the prior gave x {tuple(x.shape)} and y {tuple(y.shape)}; "
                f"expected ({batch}, {N}, up to {F}) and ({batch}, {N})"
            )
        return x, y
