"""What else a network may answer than bars: a normal as the baseline, two classes, several classes; and an answer with its head.

A head holds no weights. ``num_outputs`` numbers a query go in; ``nll`` is 0 where the outcome is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tabular.pfn.bars import _wide


class GaussianHead(nn.Module):
    """A normal distribution: outputs (..., 2) are its mean and the softplus-inverse of its variance.

    ``shift`` and ``scale`` carry it to the distribution of shift + scale y.
    """

    is_regression = True
    num_outputs = 2

    def __init__(self, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.shift, self.scale = float(shift), float(scale)

    def settings(self) -> dict[str, Any]:
        return {"shift": self.shift, "scale": self.scale}

    def affine(self, shift: Tensor | float, scale: Tensor | float) -> GaussianHead:
        return GaussianHead(self.shift * float(scale) + float(shift), self.scale * float(scale))

    def mean(self, out: Tensor) -> Tensor:
        return self.shift + self.scale * _wide(out)[..., 0]

    def variance(self, out: Tensor) -> Tensor:
        return self.scale**2 * (F.softplus(_wide(out)[..., 1]) + 1e-6)

    def nll(self, out: Tensor, y: Tensor) -> Tensor:
        """-log density at y."""
        missing, variance = y.isnan(), self.variance(out)
        z = (torch.where(missing, 0.0, y.to(variance.dtype)) - self.mean(out)).square() / variance
        return torch.where(missing, 0.0, 0.5 * (z + variance.log() + math.log(2 * math.pi)))

    def cdf(self, out: Tensor, y: Tensor) -> Tensor:
        return torch.special.ndtr((y - self.mean(out)) / self.variance(out).sqrt())

    def icdf(self, out: Tensor, q: Tensor | float) -> Tensor:
        q = torch.as_tensor(q, dtype=_wide(out).dtype, device=out.device)
        return self.mean(out) + self.variance(out).sqrt() * torch.special.ndtri(q)

    def ei(self, out: Tensor, best: Tensor | float, maximize: bool = True) -> Tensor:
        """Expected improvement over ``best``."""
        std = self.variance(out).sqrt()
        z = (self.mean(out) - best) / std * (1 if maximize else -1)
        return std * (z * torch.special.ndtr(z) + torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi))


class CategoricalHead(nn.Module):
    """Classes 0 ... num_classes - 1, one logit each."""

    is_regression = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is at least 2, not {num_classes}")
        self.num_classes = num_classes

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def settings(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    def nll(self, out: Tensor, y: Tensor) -> Tensor:
        """-log probability of the label y (a class number, or NaN). ValueError for labels outside the classes."""
        missing = y.isnan() if y.is_floating_point() else torch.zeros_like(y, dtype=torch.bool)
        label = torch.where(missing, torch.zeros_like(y), y)
        _check_labels(label, self.num_classes)
        own = self.log_probabilities(out).gather(-1, label.long()[..., None])[..., 0]
        return torch.where(missing, 0.0, -own)

    def log_probabilities(self, out: Tensor) -> Tensor:
        """(..., num_classes)."""
        return _wide(out).log_softmax(-1)


class BernoulliHead(CategoricalHead):
    """Classes 0 and 1 from one logit, that of class 1."""

    def __init__(self) -> None:
        super().__init__(2)

    @property
    def num_outputs(self) -> int:
        return 1

    def settings(self) -> dict[str, Any]:
        return {}

    def log_probabilities(self, out: Tensor) -> Tensor:
        """(..., 2)."""
        return torch.stack([F.logsigmoid(-_wide(out)[..., 0]), F.logsigmoid(_wide(out)[..., 0])], -1)


def _check_labels(labels: Tensor, classes: int) -> None:
    if torch.compiler.is_compiling():
        return
    wrong = (labels < 0) | (labels >= classes) | (labels != labels.floor() if labels.is_floating_point() else False)
    if bool(wrong.any()):
        raise ValueError(f"class labels go from 0 to {classes - 1}; there is {labels[wrong][0].item():g}")


@dataclass(frozen=True)
class Predictive:
    """An answer with the head that reads it: ``.mean``, ``.variance``, and every method of the head without its logits, such as
    ``.cdf(y)``, ``.icdf(0.9)``, ``.nll(y)``, ``.sample(100)``, ``.ei(best)``."""

    head: Any
    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.head.mean(self.logits)

    @property
    def variance(self) -> Tensor:
        return self.head.variance(self.logits)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("head", "logits"):
            raise AttributeError(name)
        return partial(getattr(self.head, name), self.logits)
