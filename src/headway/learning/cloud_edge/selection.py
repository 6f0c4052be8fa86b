"""Which samples an edge device sends to its cloud: those it is unsure of, but not lost with, and not alike.

    keep x  where  E_min < H(x) < E_max(t),    H(x) = -sum_c p_c log p_c,  p = softmax(logits), natural logarithm
    E_max(t) = E_max(0) lambda Ebar_t / Ebar_w                                            from the end of a warm-up on
    q <- 0.9 q + 0.1 mean of the kept p;  drop x where |cos(p, q)| >= margin              (optional)

Ebar_t is the mean entropy of ALL samples seen so far, Ebar_w the same at the end of the warm-up. Confident samples teach nothing, very
unsure ones mislead, and under a strong shift, where entropies are high at first, E_max falls as the model adapts. Both thresholds are
shares of ln C. "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy Distillation", 2024, arXiv
2402.17316. The paper writes E_max(t) as a recursion that equals this for lambda = 1 and shrinks without end below it; this is the
released code's form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """H of the softmax over the last axis in nats, in float32 or wider; logits of -inf count as probability 0.

    Shapes:
        logits: (..., C) -> (...).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = F.log_softmax(logits.clamp(min=torch.finfo(logits.dtype).min), -1)
    return -(log_p.exp() * log_p).sum(-1)


def select_samples(logits: Tensor, e_min: float, e_max: float) -> Tensor:
    """Which samples have an entropy strictly between ``e_min`` and ``e_max`` nats; none whose logits are not finite.

    Shapes:
        logits: (n, C) -> bool (n,).
    """
    h = entropy(logits)
    return torch.isfinite(logits).all(-1) & (h > e_min) & (h < e_max)


class EntropyThreshold:
    """The thresholds of a stream: the lower one is fixed, the upper one follows the mean entropy of all that was seen.

    Args:
        num_classes: C.
        hi, lo: E_max(0) and E_min as shares of ln C.
        coeff: lambda, applied once the warm-up is over.
        warmup: samples after which E_max follows; None keeps it fixed.

    Attributes:
        e_min, e_max0, e_max: thresholds in nats; losses are weighted by ``e_max0``, samples chosen by ``e_max``.

    Raises:
        ValueError: fewer than two classes, or shares that leave nothing between them.
    """

    def __init__(
        self, num_classes: int, hi: float = 0.4, lo: float = 0.02, coeff: float = 1.0, warmup: int | None = 512
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; it is {num_classes}")
        if not 0 <= lo < hi or coeff <= 0 or (warmup is not None and warmup < 1):
            raise ValueError(
                "0 <= lo < hi, coeff > 0 and warmup >= 1 (or None) are needed; they are "
                f"lo={lo}, hi={hi}, coeff={coeff}, warmup={warmup}"
            )
        self.num_classes, self.hi, self.lo, self.coeff, self.warmup = num_classes, hi, lo, coeff, warmup
        self.e_min, self.e_max0 = lo * math.log(num_classes), hi * math.log(num_classes)
        self.seen, self.total, self.warm_mean = 0, 0.0, None

    @property
    def mean(self) -> float:
        """Ebar_t in nats; 0 before the first sample."""
        return self.total / self.seen if self.seen else 0.0

    @property
    def e_max(self) -> float:
        if not self.warm_mean:
            return self.e_max0
        return self.e_max0 * self.coeff * self.mean / self.warm_mean

    def update(self, entropies: Tensor) -> None:
        """Counts the entropies (n,) of a whole batch, before any of it is dropped. What is not finite is not counted."""
        counted = entropies.detach().double()
        total = float(counted.sum())
        if not math.isfinite(total):
            counted = counted[torch.isfinite(counted)]
            total = float(counted.sum())
        self.seen += counted.numel()
        self.total += total
        if self.warmup is not None and self.warm_mean is None and self.seen >= self.warmup:
            self.warm_mean = self.mean

    def mask(self, entropies: Tensor) -> Tensor:
        """Which of the entropies (n,) lie strictly between the thresholds, bool (n,)."""
        return (entropies > self.e_min) & (entropies < self.e_max)

    def state_dict(self) -> dict[str, Any]:
        """Plain data: what :meth:`load_state_dict` goes on from."""
        return {"seen": self.seen, "total": self.total, "warm_mean": self.warm_mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.seen, self.total, self.warm_mean = int(state["seen"]), float(state["total"]), state["warm_mean"]


class RedundancyFilter:
    """Drops samples whose predicted probabilities point where those of the kept ones have pointed on average.

    Args:
        margin: the largest |cosine| that is kept.
        momentum: the share of the average that stays when a batch comes.

    Nothing is dropped from the first batch, which starts the average.
    """

    def __init__(self, margin: float = 0.05, momentum: float = 0.9) -> None:
        if margin <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"margin must be above 0 and momentum from 0 to below 1; they are {margin} and {momentum}")
        self.margin, self.momentum = margin, momentum
        self.average: Tensor | None = None

    @torch.no_grad()
    def mask(self, logits: Tensor) -> Tensor:
        """Which of the samples are kept, and moves the average towards them. (n, C) -> bool (n,)."""
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        if self.average is None:
            kept = torch.ones(len(p), dtype=torch.bool, device=p.device)
            self.average = p.mean(0) if len(p) else None
            return kept
        kept = F.cosine_similarity(self.average[None], p, dim=-1).abs() < self.margin
        if kept.any():
            self.average = self.momentum * self.average + (1 - self.momentum) * p[kept].mean(0)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Plain data: what :meth:`load_state_dict` goes on from."""
        return {"average": None if self.average is None else self.average.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.average = None if state["average"] is None else torch.tensor(state["average"])


class RandomSelection:
    """The control: a random ``share`` of the samples, whatever the model thinks of them; 1 sends everything."""

    def __init__(self, share: float, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie between 0 and 1; it is {share}")
        self.share = share
        self._draw = torch.Generator().manual_seed(seed)

    def mask(self, logits: Tensor) -> Tensor:
        """Which of the samples are kept, bool (n,)."""
        return (torch.rand(len(logits), generator=self._draw) < self.share).to(logits.device)
