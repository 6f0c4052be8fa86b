"""How much of the label is left under the noise at time t: abar(t), growing from nearly 0 to nearly 1.

    CosineSchedule:   abar(t) = cos^2(((1 - t/T) + s) / (1 + s) * pi/2) / cos^2(s / (1 + s) * pi/2), clipped to [clip, 1 - clip]
    LearnedSchedule:  abar(t) = sigmoid(-gamma(t)),  gamma(t) = g0 + (g1 - g0) (1 - gbar(t)),  0 <= t <= 1,
                      gbar(t) = (g(t) - g(0)) / (g(1) - g(0)),  g a two-layer network of positive weights

and SNR(t) = abar / (1 - abar). The paper (2025, arXiv 2503.24322) asks for a cosine without saying which; without the upper clip
SNR(T) is infinite and so is the last block's loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Coefficients(NamedTuple):
    """One step of prediction: z_t = a u_hat + b z_s + sqrt(c) noise."""

    a: Tensor
    b: Tensor
    c: Tensor


def coefficients(abar_s: Tensor, abar_t: Tensor) -> Coefficients:
    """The posterior q(z_t | z_s, u) of going from noise level s to the later, cleaner t."""
    alpha = abar_s / abar_t
    a = abar_t.sqrt() * (1 - alpha) / (1 - abar_s)
    b = alpha.sqrt() * (1 - abar_t) / (1 - abar_s)
    c = (1 - abar_t) * (1 - alpha) / (1 - abar_s)
    return Coefficients(a, b, c)


class CosineSchedule:
    """The fixed schedule over t = 0..T, in float64.

    Args:
        T: blocks; with T = 1 it is a schedule of continuous time. s: offset of the cosine. clip: distance kept from 0 and 1.

    Raises:
        ValueError: T below 1, clip outside (0, 0.5), or so large that neighbouring levels become equal.
    """

    def __init__(self, T: int, s: float = 0.008, clip: float = 1e-3) -> None:
        if T < 1:
            raise ValueError(f"T is the number of blocks, at least 1; it is {T}")
        if not 0 < clip < 0.5 or s < 0:
            raise ValueError(f"clip lies between 0 and 0.5 and s is not negative; they are {clip} and {s}")
        self.T, self.s, self.clip = T, s, clip
        check_increasing(self.abar(torch.arange(T + 1)), "choose a smaller clip")

    def abar(self, t: Tensor | float) -> Tensor:
        """The share of the label's energy at t, from 0 to T."""
        return self._raw(t).clamp(self.clip, 1 - self.clip)

    def snr(self, t: Tensor | float) -> Tensor:
        abar = self.abar(t)
        return abar / (1 - abar)

    def snr_prime(self, t: Tensor | float) -> Tensor:
        """d SNR / dt; 0 where the schedule is clipped."""
        angle, raw = self._angle(t), self._raw(t)
        slope = torch.sin(2 * angle) * (math.pi / 2 / (1 + self.s) / self.T) / self._top()
        inside = (raw > self.clip) & (raw < 1 - self.clip)
        return torch.where(inside, slope / (1 - self.abar(t)) ** 2, torch.zeros_like(raw))

    def coef(self, t: Tensor | float, s: Tensor | float | None = None) -> Coefficients:
        """a, b, c of the step from s (t - 1 unless given) to t."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return coefficients(self.abar(t - 1 if s is None else s), self.abar(t))

    def _angle(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t)
        t = t if t.is_floating_point() and t.dim() else t.double()
        return ((1 - t / self.T) + self.s) / (1 + self.s) * (math.pi / 2)

    def _raw(self, t: Tensor | float) -> Tensor:
        return torch.cos(self._angle(t)).square() / self._top()

    def _top(self) -> float:
        return math.cos(self.s / (1 + self.s) * math.pi / 2) ** 2


class LearnedSchedule(nn.Module):
    """A schedule that is trained with the network; gamma is minus the logarithm of the signal-to-noise ratio and falls with t.

    Args:
        hidden: width of the monotone network.
        low, high: gamma(1) and gamma(0) to begin with. The loss weighs a time by SNR', which spans exp(high - low): -3 and 3 learn
            small data much sooner than the default.

    Shapes:
        t: any shape, in [0, 1]; every answer has its shape.
    """

    def __init__(self, hidden: int = 64, low: float = -7.0, high: float = 7.0) -> None:
        super().__init__()
        if hidden < 1 or not low < high:
            raise ValueError(f"hidden is at least 1 and low below high; they are {hidden}, {low} and {high}")
        self.g0 = nn.Parameter(torch.tensor(float(low)))
        # g1 = g0 + softplus(spread), so that training cannot turn the schedule around
        self.spread = nn.Parameter(torch.tensor(math.log(math.expm1(high - low))))
        steepness = 4.0
        self.weight1 = nn.Parameter(torch.full((hidden,), math.log(math.expm1(steepness))))
        self.bias1 = nn.Parameter(-steepness * (torch.arange(hidden) + 0.5) / hidden)
        self.weight2 = nn.Parameter(torch.zeros(hidden))

    def gamma(self, t: Tensor) -> Tensor:
        return self.g0 + F.softplus(self.spread) * (1 - self._bar(t)[0])

    def gamma_prime(self, t: Tensor) -> Tensor:
        """d gamma / dt, below 0, in closed form and part of the graph."""
        return -F.softplus(self.spread) * self._bar(t)[1]

    def abar(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.gamma(t))

    def snr(self, t: Tensor) -> Tensor:
        return torch.exp(-self.gamma(t))

    def snr_prime(self, t: Tensor) -> Tensor:
        return -self.gamma_prime(t) * torch.exp(-self.gamma(t))

    def coef(self, t: Tensor, s: Tensor) -> Coefficients:
        """a, b, c of the step from s to t."""
        return coefficients(self.abar(s), self.abar(t))

    def _bar(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """gbar(t) and its derivative."""
        first, second = F.softplus(self.weight1), F.softplus(self.weight2)
        ends = t.new_tensor([0.0, 1.0])
        low, high = (torch.sigmoid(ends[:, None] * first + self.bias1) @ second).unbind()
        inner = torch.sigmoid(t[..., None] * first + self.bias1)
        slope = (inner * (1 - inner) * first) @ second
        return (inner @ second - low) / (high - low), slope / (high - low)


def check_increasing(abar: Tensor, advice: str) -> None:
    """ValueError unless 0 < abar_0 < abar_1 < ... < 1."""
    if not bool((abar[1:] > abar[:-1]).all() & (abar[0] > 0) & (abar[-1] < 1)):
        levels = ", ".join(f"{value:.4g}" for value in abar.tolist())
        raise ValueError(f"abar must increase with t and stay between 0 and 1; it is {levels}: {advice}")
