"""NoProp-DT: T blocks, each trained by a loss of its own on labels that are noised to its place in the chain.

    loss_t = CE(head(z_T), y) + KL(q(z_0 | y) || N(0, I)) + (T/2) eta (SNR(t) - SNR(t-1)) ||u_t(z_{t-1}, x) - u_y||^2

with the norm summed over the label's coordinates, and z_{t-1}, z_T drawn from q. (The algorithm box of arXiv 2503.24322 draws z_t
where its loss needs z_{t-1}.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.learning.no_prop.labels import Embed, Head, LabelDenoiser
from headway.learning.no_prop.schedules import CosineSchedule, check_increasing, coefficients

_TABLES = ("abar", "a", "b", "c", "snr_steps")


class NoPropDT(LabelDenoiser):
    """A stack of ``T`` blocks that are trained without any gradient between them.

    Args:
        block: called with t = 1..T, returns block t: a module of (z (B, dim), x) -> logits (B, num_classes).
        num_classes, T: classes and blocks.
        embed, dim, head: see :class:`LabelDenoiser`.
        eta: weight of the denoising loss.
        schedule: with ``abar(t)`` increasing in t = 0..T; the cosine unless given.

    Buffers ``abar`` (T+1), ``a``, ``b``, ``c``, ``snr_steps`` (T each, of t = 1..T) are float64 whatever the model is cast to.

    Raises:
        ValueError: a setting out of its range, a schedule that does not increase, labels outside the classes.

    Example:
        >>> model = NoPropDT(lambda t: ConditionalBlock(*dense_encoder(64), embed_dim=10), num_classes=10)
        >>> fit_noprop(model, loader, epochs=30)
        >>> model.eval()(x, samples=5).softmax(1)
    """

    optimizer_class = torch.optim.AdamW
    abar: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    snr_steps: Tensor

    def __init__(
        self,
        block: Callable[[int], nn.Module],
        num_classes: int,
        T: int = 10,
        embed: Embed = "onehot",
        dim: int | None = None,
        eta: float = 0.1,
        schedule: Any = None,
        head: Head = "linear",
    ) -> None:
        if T < 1:
            raise ValueError(f"T is the number of blocks, at least 1; it is {T}")
        super().__init__(num_classes, embed, dim, eta, head)
        schedule = CosineSchedule(T) if schedule is None else schedule
        abar = torch.stack([torch.as_tensor(schedule.abar(t), dtype=torch.float64).detach() for t in range(T + 1)])
        check_increasing(abar, f"give a schedule whose abar(t) increases over t = 0..{T}")
        self.T = T
        self.blocks = nn.ModuleList(block(t) for t in range(1, T + 1))
        step = coefficients(abar[:-1], abar[1:])
        snr = abar / (1 - abar)
        for name, table in zip(_TABLES, (abar, *step, snr[1:] - snr[:-1]), strict=True):
            self.register_buffer(name, table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoPropDT:
        # half precision would round 1 - abar away; only the device may change
        kept = {name: getattr(self, name) for name in _TABLES}
        super()._apply(fn, recurse)
        for name, table in kept.items():
            moved = getattr(self, name)
            if moved.dtype != table.dtype:
                self.register_buffer(name, table.to(moved.device))
        return self

    def local_loss(
        self, x: Tensor, y: Tensor, t: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of block ``t`` (1..T, drawn if None): a scalar whose gradient reaches that block, the head and a learned W.

        Shapes:
            x: (B, ...); y: (B,) of integers. An empty batch gives 0 with gradients of 0.

        Raises:
            ValueError: labels outside [0, num_classes), or no such block.
        """
        if t is None:
            t = int(
                torch.randint(1, self.T + 1, (), generator=generator, device=generator.device if generator else None)
            )
        self._check(x, y, t)
        if not len(x):
            return self.nothing(self.blocks[t - 1])
        # the head's noise is drawn first: it is the same whichever block is trained
        return self.head_loss(y, generator) + self.denoising_loss(x, y, t, generator)

    def _check(self, x: Tensor, y: Tensor, t: int) -> None:
        if not 1 <= t <= self.T:
            raise ValueError(f"blocks are counted from 1 to {self.T}; there is no block {t}")
        self.check_labels(y, len(x))

    def denoising_loss(self, x: Tensor, y: Tensor, t: int, generator: torch.Generator | None = None) -> Tensor:
        """(T/2) eta (SNR(t) - SNR(t-1)) ||u_t - u_y||^2, the part of block ``t``'s loss that no head takes part in."""
        self._check(x, y, t)
        block = self.blocks[t - 1]
        if not len(x):
            return self.nothing(block)
        with self.full():
            u = self.real(self.W)[y]
            before = self.noised(u, t - 1, generator)
        logits = block(before, x)
        with self.full():
            error = (self.label(logits) - u).square().sum(1).mean()
            return 0.5 * self.T * self.eta * self.snr_steps[t - 1].to(error.dtype) * error

    def head_loss(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """CE(head(z_T), y) + KL(q(z_0 | y) || N(0, I)), the part of every block's loss that no block takes part in."""
        self.check_labels(y, len(y))
        if not len(y):
            return self.nothing()
        with self.full():
            u = self.real(self.W)[y]
            last = self.noised(u, self.T, generator)
            return F.cross_entropy(self.scores(last), y) + self.prior(self.abar[0].to(u.dtype), u).mean()

    def noised(self, u: Tensor, t: int, generator: torch.Generator | None = None) -> Tensor:
        """A draw of q(z_t | y) for the labels' vectors u (B, dim)."""
        abar = self.abar[t]
        return abar.sqrt().to(u.dtype) * u + (1 - abar).sqrt().to(u.dtype) * self.noise(len(u), generator)

    def step(self, z: Tensor, u_hat: Tensor, t: int, noise: Tensor) -> Tensor:
        """z_t from z_{t-1} (B, dim)."""
        a, b, c = (table[t - 1].to(z.dtype) for table in (self.a, self.b, self.c))
        return a * u_hat + b * z + c.sqrt() * noise

    def chain(self, x: Tensor, steps: int | None, draw: Any, **how: Any) -> Tensor:
        if steps not in (None, self.T) or how:
            raise ValueError(f"the chain of NoPropDT has its T = {self.T} steps; steps={steps} {how or ''} was given")
        z = draw()
        for t, block in enumerate(self.blocks, 1):
            logits = block(z, x)
            with self.full():
                z = self.step(z, self.label(logits), t, draw())
        return z

    @classmethod
    def of_blocks(cls, blocks: Iterable[nn.Module], num_classes: int, **settings: Any) -> NoPropDT:
        """A stack of blocks that exist; they are used as they are, not copied."""
        listed = list(blocks)
        return cls(lambda t: listed[t - 1], num_classes, len(listed), **settings)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, T={self.T}, embed={self.embed!r}, eta={self.eta}"
