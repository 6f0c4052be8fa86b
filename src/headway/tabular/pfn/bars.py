"""The bar ("Riemann") distribution: a histogram over fixed borders whose bars a network weighs.

    density(y) = p_k / (b_{k+1} - b_k)   for y in (b_k, b_{k+1}],   p = softmax(logits)

With full support the first and the last bar become half-normals that start at the inner border and point outward, with half their
mass inside the bar: scale s = width / 0.6745. ("Transformers Can Do Bayesian Inference", 2022, arXiv 2112.10510, section 4.)

All that follows from a density is closed form and differentiable in the logits. Borders of equal prior mass (``from_samples``) make
the uniform distribution over the bars the prior itself. Not for outcomes far outside the borders: tails there are a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF_NORMAL_MEDIAN = 0.6744897501960817
_MEAN = math.sqrt(2 / math.pi)


class BarDistribution(nn.Module):
    """Bars between ``borders``; every method takes logits (..., K) and values that broadcast with logits.shape[:-1].

    Args:
        borders: (K + 1,) finite, strictly increasing.
        full_support: half-normal tails in place of the outermost bars; otherwise nothing lies beyond the borders.

    Raises:
        ValueError: borders that are unsorted, equal, not finite or too few; outcomes beyond a finite support.
    """

    borders: Tensor
    is_regression = True

    def __init__(self, borders: Tensor | Sequence[float], full_support: bool = True) -> None:
        super().__init__()
        b = torch.as_tensor(borders).detach().clone()
        b = b if b.is_floating_point() else b.to(torch.get_default_dtype())
        least = 3 if full_support else 2
        if b.dim() != 1 or len(b) < least:
            raise ValueError(f"borders is one row of at least {least} numbers; it has the shape {tuple(b.shape)}")
        if not bool(b.isfinite().all()):
            raise ValueError("borders must be finite; they hold NaN or infinity")
        if not bool((b.diff() > 0).all()):
            at = int((b.diff() <= 0).nonzero()[0])
            raise ValueError(
                f"borders must increase strictly; number {at + 1} ({float(b[at + 1])}) does not exceed the one before "
                f"it ({float(b[at])}): sort them, remove repeats, or ask for fewer bars"
            )
        self.register_buffer("borders", b)
        self.full_support = full_support

    @classmethod
    def from_samples(cls, y: Tensor, num_bars: int, full_support: bool = True) -> BarDistribution:
        """Bars of equal mass under samples of the prior (100,000 or more): borders halfway between neighbouring order
        statistics, the ends the smallest and the largest sample."""
        y = torch.as_tensor(y).detach().flatten().double().sort().values
        if not len(y) >= 2 * num_bars:
            raise ValueError(
                f"{num_bars} bars need at least {2 * num_bars} samples, far better 100,000; y has {len(y)}"
            )
        cut = torch.arange(1, num_bars) * len(y) // num_bars
        return cls(torch.cat([y[:1], (y[cut - 1] + y[cut]) / 2, y[-1:]]), full_support)

    @property
    def num_outputs(self) -> int:
        """K, the number of bars."""
        return len(self.borders) - 1

    def settings(self) -> dict[str, Any]:
        return {"full_support": self.full_support}

    def affine(self, shift: Tensor | float, scale: Tensor | float) -> BarDistribution:
        """The distribution of shift + scale y, scale > 0, for the same logits."""
        return BarDistribution(self.borders.double() * scale + shift, self.full_support)

    def extra_repr(self) -> str:
        low, high = float(self.borders[0]), float(self.borders[-1])
        return f"{self.num_outputs} bars from {low:.4g} to {high:.4g}, full_support={self.full_support}"

    # densities

    def nll(self, logits: Tensor, y: Tensor) -> Tensor:
        """-log density at y, 0 where y is NaN (a missing outcome costs nothing)."""
        log_p = _wide(logits).log_softmax(-1)
        b = self.borders.to(log_p.dtype)
        shape = torch.broadcast_shapes(log_p.shape[:-1], y.shape)
        missing = y.isnan().expand(shape)
        y = torch.where(missing, b[0], y.to(b.dtype).expand(shape))
        if not self.full_support and not torch.compiler.is_compiling():
            outside = (y < b[0]) | (y > b[-1])
            if bool(outside.any()):
                raise ValueError(
                    f"{float(y[outside][0])} lies outside the borders {float(b[0])} to {float(b[-1])}; "
                    "use full_support=True or wider borders"
                )
        k = self._bar(y)
        own = log_p.expand(*shape, -1).gather(-1, k[..., None])[..., 0]
        inside = -b.diff().log()[k]
        if self.full_support:
            low, high = self._scales(b)
            inside = torch.where(k == 0, _half_normal_log_density(b[1] - y, low), inside)
            inside = torch.where(k == self.num_outputs - 1, _half_normal_log_density(y - b[-2], high), inside)
        return torch.where(missing, 0.0, -(own + inside))

    def cdf(self, logits: Tensor, y: Tensor | float) -> Tensor:
        """P(Y <= y)."""
        p = _wide(logits).softmax(-1)
        b = self.borders.to(p.dtype)
        y = torch.as_tensor(y, dtype=p.dtype, device=p.device)
        shape = torch.broadcast_shapes(p.shape[:-1], y.shape)
        y, p = y.expand(shape), p.expand(*shape, -1)
        k = self._bar(y)
        share = ((y - b[k]) / b.diff()[k]).clamp(0, 1)
        if self.full_support:
            low, high = self._scales(b)
            share = torch.where(k == 0, torch.special.erfc((b[1] - y) / (low * math.sqrt(2))), share)
            share = torch.where(
                k == self.num_outputs - 1, torch.special.erf((y - b[-2]) / (high * math.sqrt(2))), share
            )
        before = (p.cumsum(-1) - p).gather(-1, k[..., None])[..., 0]
        return before + p.gather(-1, k[..., None])[..., 0] * share

    def icdf(self, logits: Tensor, q: Tensor | float) -> Tensor:
        """The quantile at q in [0, 1]; infinite at 0 and 1 where the support is full."""
        p = _wide(logits).softmax(-1)
        q = torch.as_tensor(q, dtype=p.dtype, device=p.device)
        if not bool(((q >= 0) & (q <= 1)).all()):
            raise ValueError("q is a probability between 0 and 1")
        shape = torch.broadcast_shapes(p.shape[:-1], q.shape)
        return self._icdf(p.expand(*shape, -1), q.expand(shape)[..., None])[..., 0]

    def _icdf(self, p: Tensor, q: Tensor) -> Tensor:
        """p (..., K), q (..., any) -> quantiles like q."""
        b = self.borders.to(p.dtype)
        top = torch.cat([p.cumsum(-1)[..., :-1].clamp(max=1), torch.ones_like(p[..., :1])], -1)
        k = torch.searchsorted(top.detach().contiguous(), q.contiguous()).clamp(max=self.num_outputs - 1)
        upper = top.gather(-1, k)
        lower = F.pad(top[..., :-1], (1, 0)).gather(-1, k)
        mass = (upper - lower).clamp(min=torch.finfo(p.dtype).tiny)
        share = ((q - lower) / mass).clamp(0, 1)
        value = b[k] + share * b.diff()[k]
        if self.full_support:
            low, high = self._scales(b)
            # an upper tail of 1 stands for "not in this bar", so that no infinite slope leaks through the choice
            left, right = k == 0, k == self.num_outputs - 1
            rest = ((upper - q) / mass).clamp(0, 1)
            value = torch.where(left, b[1] + low * torch.special.ndtri(torch.where(left, share, 1.0) / 2), value)
            value = torch.where(right, b[-2] - high * torch.special.ndtri(torch.where(right, rest, 1.0) / 2), value)
        return value

    # moments and points

    def mean(self, logits: Tensor) -> Tensor:
        p = _wide(logits).softmax(-1)
        return p @ self._bar_moments(p.dtype)[0]

    def variance(self, logits: Tensor) -> Tensor:
        p = _wide(logits).softmax(-1)
        mean, variance = self._bar_moments(p.dtype)
        # within the bars plus between them: E[y^2] - E[y]^2 would cancel
        return (p * (variance + (mean - (p @ mean)[..., None]).square())).sum(-1)

    def median(self, logits: Tensor) -> Tensor:
        return self.icdf(logits, 0.5)

    def mode(self, logits: Tensor) -> Tensor:
        """Where the DENSITY is highest: the middle of an inner bar, or the inner border of a tail."""
        p = _wide(logits).softmax(-1)
        b = self.borders.to(p.dtype)
        peak, middle = 1 / b.diff(), (b[:-1] + b[1:]) / 2
        if self.full_support:
            low, high = self._scales(b)
            peak = torch.cat([_MEAN / low[None], peak[1:-1], _MEAN / high[None]])
            middle = torch.cat([b[1:2], middle[1:-1], b[-2:-1]])
        return middle[(p * peak).argmax(-1)]

    def entropy(self, logits: Tensor) -> Tensor:
        """The differential entropy in nats."""
        p = _wide(logits).softmax(-1)
        b = self.borders.to(p.dtype)
        inside = b.diff().log()
        if self.full_support:
            tails = torch.stack(self._scales(b)).log() + 0.5 * math.log(math.pi / 2) + 0.5
            inside = torch.cat([tails[:1], inside[1:-1], tails[1:]])
        return torch.special.entr(p).sum(-1) + p @ inside

    def sample(self, logits: Tensor, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """(n, ...) draws."""
        p = _wide(logits).softmax(-1)
        q = torch.rand(*p.shape[:-1], n, dtype=p.dtype, device=p.device, generator=generator)
        # 0 would be minus infinity
        return self._icdf(p, q.clamp(min=torch.finfo(p.dtype).tiny)).movedim(-1, 0)

    # acquisition

    def ei(self, logits: Tensor, best: Tensor | float, maximize: bool = True) -> Tensor:
        """Expected improvement over ``best``: E[(y - best)_+], or E[(best - y)_+] where less is better."""
        if not maximize:
            mirror = BarDistribution(-self.borders.flip(0), self.full_support)
            return mirror.ei(logits.flip(-1), -best)
        p = _wide(logits).softmax(-1)
        f = torch.as_tensor(best, dtype=p.dtype, device=p.device)[..., None]
        b = self.borders.to(p.dtype)
        left, right = b[:-1], b[1:]
        over, under = (right - f).clamp(min=0), (left - f).clamp(min=0)
        # the difference of the squares, without its cancellation far below
        gain = (over - under) * (over + under) / (2 * (right - left))
        if self.full_support:
            low, high = self._scales(b)
            d = (b[1] - f).clamp(min=0)
            left_gain = d * torch.special.erf(d / (low * math.sqrt(2))) + low * _MEAN * torch.expm1(
                -0.5 * (d / low) ** 2
            )
            t, ahead = (f - b[-2]).clamp(min=0), (b[-2] - f).clamp(min=0)
            right_gain = high * _MEAN * torch.exp(-0.5 * (t / high) ** 2) - t * torch.special.erfc(
                t / (high * math.sqrt(2))
            )
            gain = torch.cat([left_gain, gain[..., 1:-1], right_gain + ahead], -1)
        return (p * gain).sum(-1)

    def pi(self, logits: Tensor, best: Tensor | float, maximize: bool = True) -> Tensor:
        """Probability of improvement over ``best``."""
        below = self.cdf(logits, best)
        return 1 - below if maximize else below

    def ucb(self, logits: Tensor, rest: float = 0.1587, maximize: bool = True) -> Tensor:
        """The confidence bound that only ``rest`` of the mass exceeds (one standard deviation of a normal by default)."""
        return self.icdf(logits, 1 - rest if maximize else rest)

    @classmethod
    def mixture(
        cls, heads: Sequence[BarDistribution], logits: Sequence[Tensor], weights: Sequence[float] | None = None
    ) -> tuple[BarDistribution, Tensor]:
        """One distribution for several with other borders: (head, logits) on the union of the borders, whose cdf is the
        weighted average of theirs at every border."""
        if len(heads) != len(logits) or not heads:
            raise ValueError(
                f"a mixture takes as many logits as heads, at least one; got {len(logits)} and {len(heads)}"
            )
        share = [1 / len(heads)] * len(heads) if weights is None else [w / sum(weights) for w in weights]
        borders = torch.cat([head.borders.double() for head in heads]).unique()
        joint = cls(borders, any(head.full_support for head in heads))
        inner = borders[1:-1]
        parts = [w * h.cdf(l.double()[..., None, :], inner) for w, h, l in zip(share, heads, logits, strict=True)]
        mass = F.pad(F.pad(torch.stack(parts).sum(0), (1, 0)), (0, 1), value=1.0).diff(dim=-1)
        return joint, mass.clamp(min=1e-300).log()

    # the bars

    def _bar(self, y: Tensor) -> Tensor:
        borders = self.borders.to(y.dtype)
        return (torch.searchsorted(borders, y.detach().contiguous()) - 1).clamp(0, self.num_outputs - 1)

    def _scales(self, borders: Tensor) -> tuple[Tensor, Tensor]:
        width = borders.diff()
        return width[0] / HALF_NORMAL_MEDIAN, width[-1] / HALF_NORMAL_MEDIAN

    def _bar_moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        b = self.borders.to(dtype)
        mean, variance = (b[:-1] + b[1:]) / 2, b.diff().square() / 12
        if self.full_support:
            scales = torch.stack(self._scales(b))
            tails = scales.square() * (1 - 2 / math.pi)
            mean = torch.cat([b[1:2] - scales[:1] * _MEAN, mean[1:-1], b[-2:-1] + scales[1:] * _MEAN])
            variance = torch.cat([tails[:1], variance[1:-1], tails[1:]])
        return mean, variance


def _half_normal_log_density(distance: Tensor, scale: Tensor) -> Tensor:
    return math.log(_MEAN) - scale.log() - 0.5 * (distance.abs().clamp(min=1e-8) / scale).square()


def _wide(logits: Tensor) -> Tensor:
    """Half precision is too coarse for a log-softmax over hundreds of bars."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
