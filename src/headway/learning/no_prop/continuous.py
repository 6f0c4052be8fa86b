"""NoProp-CT and NoProp-FM: one network of continuous time, trained at random times and run in many small steps.

    CT:  loss = CE(head(z_1), y) + KL(q(z_0 | y) || N(0, I)) + (eta/2) SNR'(t) ||u(z_t, x, t) - u_y||^2,   t ~ U(0, 1)
         prediction: the steps of NoProp-DT on a uniform grid ("sde"), or dz/dt = (-gamma'/2) (sqrt(abar) u - abar z) ("ode")
    FM:  z_t = t z_1 + (1 - t) z_0 + sigma noise,  z_1 = u_y,  z_0 ~ N(0, I);  loss = ||v(z_t, x, t) - (z_1 - z_0)||^2
         prediction: dz/dt = v, Euler

The drift of the sde without its noise is not the ode: it has (1 + abar)/2 where the ode has abar. arXiv 2503.24322, 2025.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.learning.no_prop.labels import Embed, Head, LabelDenoiser
from headway.learning.no_prop.schedules import LearnedSchedule


class _Continuous(LabelDenoiser):
    """One network of (z (B, dim), x, t (B,)) -> logits. If it has ``encode(x)`` and ``decode(features, z, t)``, prediction encodes
    the input once."""

    def __init__(
        self, net: nn.Module, num_classes: int, embed: Embed, dim: int | None, eta: float, head: Head, steps: int
    ) -> None:
        super().__init__(num_classes, embed, dim, eta, head)
        if steps < 1:
            raise ValueError(f"steps of the chain are at least 1; they are {steps}")
        self.net, self.steps = net, steps

    def times(self, rows: int, t: Tensor | float | None, generator: torch.Generator | None) -> Tensor:
        """(rows,) times: those given, or uniform draws."""
        like = self.real(self.W)
        if t is None:
            return torch.rand(rows, generator=generator, device=like.device, dtype=like.dtype)
        given = torch.as_tensor(t, device=like.device, dtype=like.dtype)
        if not torch.compiler.is_compiling() and given.numel() and not bool(((given >= 0) & (given <= 1)).all()):
            raise ValueError(f"times go from 0 to 1; they go from {float(given.min())} to {float(given.max())}")
        return given.expand(rows)

    def at(self, x: Tensor) -> Any:
        """The network on one input, as a function of z and of a time that all rows share."""
        if not self.training and hasattr(self.net, "encode"):
            features = self.net.encode(x)  # type: ignore[operator]
            return lambda z, t: self.net.decode(features, z, t.expand(len(z)))  # type: ignore[operator]
        return lambda z, t: self.net(z, x, t.expand(len(z)))

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, steps={self.steps}, embed={self.embed!r}"


class NoPropCT(_Continuous):
    """Diffusion of labels in continuous time, with a schedule of noise that is learned.

    Args:
        net: (z (B, dim), x, t (B,)) -> logits (B, num_classes), such as ``ConditionalBlock(..., norm="none", timed=True)``; the paper
            uses no batch normalisation here.
        num_classes, embed, dim, head: see :class:`LabelDenoiser`. eta: weight of the denoising loss.
        schedule: a :class:`LearnedSchedule`, or anything with its ``abar``, ``snr_prime`` and ``coef`` over [0, 1].
        steps: of the chain at prediction. ``forward(x, method="ode")`` follows the probability flow instead.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        embed: Embed = "onehot",
        dim: int | None = None,
        eta: float = 1.0,
        schedule: Any = None,
        head: Head = "linear",
        steps: int = 1000,
    ) -> None:
        super().__init__(net, num_classes, embed, dim, eta, head, steps)
        self.schedule = LearnedSchedule() if schedule is None else schedule

    def local_loss(
        self, x: Tensor, y: Tensor, t: Tensor | float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, a scalar. ``t`` are times (B,) in [0, 1], or one for all, drawn if None; see :meth:`NoPropDT.local_loss`."""
        self.check_labels(y, len(x))
        if not len(x):
            return self.nothing(*(part for part in (self.net, self.schedule) if isinstance(part, nn.Module)))
        with self.full():
            times = self.times(len(x), t, generator)
            u = self.real(self.W)[y]
            ends = times.new_tensor([0.0, 1.0])
            abar, (first, end) = self.schedule.abar(times).to(u.dtype)[:, None], self.schedule.abar(ends).to(u.dtype)
            z = abar.sqrt() * u + (1 - abar).sqrt() * self.noise(len(u), generator)
            last = end.sqrt() * u + (1 - end).sqrt() * self.noise(len(u), generator)
        logits = self.net(z, x, times)
        with self.full():
            error = (self.label(logits) - u).square().sum(1)
            denoising = (self.eta / 2) * (self.schedule.snr_prime(times).to(u.dtype) * error).mean()
            return F.cross_entropy(self.scores(last), y) + self.prior(first, u).mean() + denoising

    def chain(
        self, x: Tensor, steps: int | None, draw: Any, method: Literal["sde", "ode"] = "sde", **how: Any
    ) -> Tensor:
        if method not in ("sde", "ode") or how:
            raise ValueError(f'method is "sde" or "ode", not {method!r} {how or ""}')
        count, z, net = steps or self.steps, draw(), self.at(x)
        grid = torch.linspace(0, 1, count + 1, device=z.device, dtype=z.dtype)
        with self.full():
            abars = self.schedule.abar(grid).to(z.dtype)
            table = [part.to(z.dtype) for part in self.schedule.coef(grid[1:], grid[:-1])]
            # -gamma' = abar' / (abar (1 - abar)) = SNR' (1 - abar) / abar
            slope = self.schedule.snr_prime(grid).to(z.dtype) * (1 - abars) / abars
        for i in range(count):
            logits = net(z, grid[i])
            with self.full():
                u = self.label(logits)
                if method == "ode":
                    z = z + slope[i] / (2 * count) * (abars[i].sqrt() * u - abars[i] * z)
                else:
                    a, b, c = (part[i] for part in table)
                    z = a * u + b * z + c.sqrt() * draw()
        return z


class NoPropFM(_Continuous):
    """A flow in straight lines from noise to the label's vector.

    Args:
        net: as for :class:`NoPropCT`; its logits weigh the class vectors without a softmax: v = logits W.
        num_classes, embed, dim, head: see :class:`LabelDenoiser`. sigma: width of the path.
        steps: of Euler's rule at prediction.

    With a fixed W no head is trained, and a prediction is the nearest class vector. With a learned one the cross entropy of
    head(z_t + (1 - t) v) keeps W from collapsing.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        embed: Embed = "onehot",
        dim: int | None = None,
        sigma: float = 0.0,
        head: Head = "linear",
        steps: int = 1000,
    ) -> None:
        super().__init__(net, num_classes, embed, dim, 1.0, head, steps)
        if sigma < 0:
            raise ValueError(f"sigma is the width of the path, not negative; it is {sigma}")
        self.sigma = sigma

    def local_loss(
        self, x: Tensor, y: Tensor, t: Tensor | float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, a scalar; see :meth:`NoPropCT.local_loss`."""
        self.check_labels(y, len(x))
        if not len(x):
            return self.nothing(self.net)
        with self.full():
            times = self.times(len(x), t, generator)
            along = times[:, None]
            u = self.real(self.W)[y]
            start = self.noise(len(u), generator)
            z = along * u + (1 - along) * start
            if self.sigma:
                z = z + self.sigma * self.noise(len(u), generator)
        logits = self.net(z, x, times)
        with self.full():
            v = self.velocity(logits)
            loss = (v - (u - start)).square().sum(1).mean()
            return loss + F.cross_entropy(self.scores(z + (1 - along) * v), y) if self.learned else loss

    def velocity(self, logits: Tensor) -> Tensor:
        """v (B, dim)."""
        return self.real(logits) @ self.real(self.W)

    def chain(self, x: Tensor, steps: int | None, draw: Any, **how: Any) -> Tensor:
        if how:
            raise ValueError(f"NoPropFM has no {', '.join(how)}; it takes steps and samples")
        count, z, net = steps or self.steps, draw(), self.at(x)
        for i in range(count):
            logits = net(z, z.new_tensor(i / count))
            with self.full():
                z = z + self.velocity(logits) / count
        return z

    def read(self, z: Tensor) -> Tensor:
        return self.scores(z) if self.learned else -self.distances(z) / 2

    def shared_parameters(self) -> list[nn.Parameter]:
        """W and the head where W is learned; nothing otherwise."""
        return super().shared_parameters() if self.learned else []
