"""Scales the long skips of a UNet: constants that decay towards the inner skips (CS), or a small gate read from the skip (LS).

    decoder block i receives combine(u, s_i x_i),  i = 1 the outermost skip, i = N the innermost
    none  s_i = 1      sqrt2  s_i = 2^(-1/2)      CS  s_i = kappa^(i - 1)
    LS    s_i = sigmoid(A_2 relu(A_1 pool(x_i) + a_1) + a_2)

x_i is what encoder block i has kept, u the running feature of the decoder, combine the network's own rule (a concatenation or a sum).
With every s_i = 1, features, gradients and the answer to noise in the input grow with N; a sum of skips over variance-preserving
blocks gives E|out|^2 / |in|^2 = 1 + sum_i s_i^2, which is N + 1 without scaling and at most 1 + 1 / (1 - kappa^2) under CS, however
deep the network.

Huang et al.: ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection, 2023 (arXiv
2310.13545). Reach for it when training a UNet-like network, above all a deep one, or with a large batch or rate. Do not switch it on
for a trained network without fine-tuning (``init="one"`` begins near the old function), and tune kappa where the inner skips carry
the fine detail. ``hw.probe`` tells the sum of squares of a network that has such skips.
:class:`headway.residual.scale_long.ScaleLong` does it to an existing network; the layers here are for one's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mode = str | Sequence[float]
MODES = ("none", "sqrt2", "cs", "ls")
AXES, ORDERS, INITS = ("token", "channel"), ("outer_first", "inner_first"), ("half", "one")


def skip_scales(n: int, mode: Mode = "cs", kappa: float = 0.7, order: str = "outer_first") -> list[float]:
    """The constants of ``n`` long skips.

    Args:
        n: how many long skips there are.
        mode: "none", "sqrt2", "cs", or the constants themselves, outermost first.
        kappa: of "cs", in (0, 1]; the authors suggest 0.5 to 0.95 and begin with 0.5.
        order: "outer_first" (i = 1 to n) or "inner_first", the order in which a decoder runs.

    Raises:
        ValueError: n < 1, an unknown mode or order, kappa outside (0, 1], or another number of constants than n.
    """
    if n < 1:
        raise ValueError(f"n is the number of long skips, at least 1; {n} was given")
    if order not in ORDERS:
        raise ValueError(f"order is one of {', '.join(ORDERS)}; {order!r} was given")
    if not 0 < kappa <= 1:
        raise ValueError(f"kappa lies in (0, 1], so that inner skips are scaled down; {kappa} was given")
    if isinstance(mode, str):
        if mode not in MODES[:3]:
            raise ValueError(
                f"the constants have mode none, sqrt2, cs, or are a list of {n} numbers; {mode!r} was given"
            )
        base = {"none": [1.0] * n, "sqrt2": [2**-0.5] * n}
        scales = base[mode] if mode in base else [float(kappa) ** i for i in range(n)]
    else:
        scales = [float(value) for value in mode]
        if len(scales) != n or not all(map(math.isfinite, scales)):
            raise ValueError(f"{n} long skips need {n} finite numbers, outermost first; {list(mode)} was given")
    return scales if order == "outer_first" else scales[::-1]


class SkipScale(nn.Module):
    """Multiplies long skip i by its constant. No parameters, the same in training and evaluation.

    The mode and its constants go into the state: weights trained under one scaling are refused by another.

    Args:
        n, mode, kappa: see :func:`skip_scales`.

    Shapes:
        x: any -> the same.

    Raises:
        ValueError: as :func:`skip_scales`; i outside 1 to n; weights of another scaling.

    Source: arXiv 2310.13545.
    """

    def __init__(self, n: int, mode: Mode = "cs", kappa: float = 0.7) -> None:
        super().__init__()
        self.n, self.mode, self.kappa = n, mode if isinstance(mode, str) else "list", kappa
        self.scales = skip_scales(n, mode, kappa)

    def forward(self, x: Tensor, i: int) -> Tensor:
        if not 1 <= i <= self.n:
            raise ValueError(f"long skips are numbered 1 (outermost) to {self.n} (innermost); {i} was given")
        scale = self.scales[i - 1]
        return x if scale == 1 else x * scale

    def rule(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        return {"n": self.n, "mode": self.mode, "scales": self.scales}

    def get_extra_state(self) -> Tensor:
        # letters as bytes, because formats such as safetensors keep only tensors
        return torch.tensor(list(json.dumps(self.rule()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved, mine = json.loads(bytes(state.tolist())), self.rule()
        if saved != mine:
            raise ValueError(
                f"the weights were trained with long skips scaled by {saved} and this network scales them by {mine}; apply the "
                "same mode, kappa and share before loading"
            )

    def extra_repr(self) -> str:
        shown = f", kappa={self.kappa}" if self.mode == "cs" else ""
        return f"{self.n}, mode={self.mode!r}{shown}"


class SkipGate(nn.Module):
    """``x * sigmoid(A_2 relu(A_1 pool(x) + a_1) + a_2)``: a gate for every token, or for every channel, of every sample.

    Pooling and sigmoid are computed in float32 where x has half precision. The gradient goes through x and through its gate. A NaN
    stays in its sample.

    Args:
        features: how many gates: tokens of a sequence (class, time and label tokens included), or channels.
        reduction: r; the hidden width is max(features // r, 1).
        axis: "token" pools (B, T, D) over D, the published form; "channel" pools (B, C, *space) over space, this library's
            extension to convolutional networks, free of the resolution.
        init: "half" keeps the start of ``nn.Linear``, gates near 0.5; "one" starts them near 0.982, for fine-tuning.

    Shapes:
        (B, T, D) -> (B, T, D) with T = features; (B, C, *space) -> the same with C = features.

    Raises:
        ValueError: features or reduction < 1; an unknown axis or init; x of another number of tokens, channels or axes.

    Source: arXiv 2310.13545; ``Attentionlayer`` of the authors' code, whose names of weights are kept.
    """

    def __init__(self, features: int, reduction: int = 16, axis: str = "token", init: str = "half") -> None:
        super().__init__()
        if features < 1 or reduction < 1:
            raise ValueError(f"features and reduction are at least 1; features={features}, reduction={reduction}")
        if axis not in AXES or init not in INITS:
            raise ValueError(f"axis is one of {AXES} and init one of {INITS}; axis={axis!r}, init={init!r} were given")
        self.features, self.reduction, self.axis, self.init = features, reduction, axis, init
        hidden = max(features // reduction, 1)
        self.layer1, self.layer2 = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.layer1.reset_parameters()
        self.layer2.reset_parameters()
        if self.init == "one":
            nn.init.constant_(self.layer2.bias, 4.0)

    def gate(self, x: Tensor) -> Tensor:
        """The gates in (0, 1), of a shape that broadcasts against x."""
        token = self.axis == "token"
        if (x.dim() != 3 if token else x.dim() < 3) or x.shape[1] != self.features:
            wanted = f"(B, {self.features}, {'D)' if token else '*space)'}"
            raise ValueError(
                f"this gate was made for {self.features} {self.axis}s, {wanted}, and the skip has shape {tuple(x.shape)}; "
                + (
                    "token gates are tied to their number: make another, or keep the length fixed"
                    if token
                    else "make one"
                )
                + f" with features={x.shape[1] if x.dim() > 1 else '...'}"
            )
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        pooled = x.mean(tuple(range(2, x.dim())), dtype=wide)
        hidden = F.relu(self.layer1(pooled.to(self.layer1.weight.dtype)))
        s = torch.sigmoid(self.layer2(hidden).to(wide))
        return s.reshape(*s.shape, *[1] * (x.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}, reduction={self.reduction}, axis={self.axis!r}"


class LongSkips(SkipScale):
    """All long skips of one network: ``forward(x, i)`` scales skip i; ``push`` and ``pop`` also keep them, last in, first out.

    >>> skips = LongSkips(3, "cs", kappa=0.7)
    >>> for block in encoder: x = skips.push(block(x))
    >>> for block in decoder: x = block(middle_or_decoder_output, skips.pop())

    ``push`` and ``pop`` hold activations in the module between encoder and decoder: under activation checkpointing of the whole
    network, or ``nn.DataParallel``, use ``forward(x, i)``.

    Args:
        n, kappa: see :func:`skip_scales`.
        mode: its modes, or "ls" for gates.
        share: one gate for all skips of equal ``features``; False gives each skip its own.
        features: of the gates, one number or one a skip, outermost first; needed by "ls" alone.
        reduction, axis, init: see :class:`SkipGate`.

    Raises:
        ValueError: as those; "ls" without ``features``; weights of another scaling.
        RuntimeError: a pop before n pushes, or a push before all were popped. The kept skips are let go of.

    Source: arXiv 2310.13545.
    """

    def __init__(
        self,
        n: int,
        mode: Mode = "cs",
        kappa: float = 0.7,
        share: bool = True,
        features: int | Sequence[int] | None = None,
        reduction: int = 16,
        axis: str = "token",
        init: str = "half",
    ) -> None:
        super().__init__(n, "none" if mode == "ls" else mode, kappa)
        self.share, self.reduction, self.axis, self.init = share, reduction, axis, init
        self.features = [features] * n if isinstance(features, int) else None if features is None else list(features)
        if self.features is not None and len(self.features) != n:
            raise ValueError(f"{n} long skips need one number of features each; {self.features} was given")
        self._kept: list[Tensor] = []
        self._popped = 0
        if mode != "ls":
            return
        if self.features is None:
            raise ValueError(
                'mode="ls" needs features=: how many tokens (axis="token") or channels (axis="channel") the skips have'
            )
        self.mode = "ls"
        sizes = list(dict.fromkeys(self.features)) if share else self.features
        self.gates = nn.ModuleList(SkipGate(size, reduction, axis, init) for size in sizes)
        self._which = [sizes.index(size) if share else i for i, size in enumerate(self.features)]

    def forward(self, x: Tensor, i: int) -> Tensor:
        x = super().forward(x, i)
        return self.gates[self._which[i - 1]](x) if self.mode == "ls" else x

    def rule(self) -> dict[str, Any]:
        if self.mode != "ls":
            return super().rule()
        return {"n": self.n, "mode": "ls", "share": self.share, "features": self.features, "axis": self.axis}

    def push(self, x: Tensor) -> Tensor:
        """Keeps the next skip, the outermost first, and returns it as it is."""
        if self._popped or len(self._kept) == self.n:
            self._refuse(f"a push after {len(self._kept) + self._popped} pushes and {self._popped} pops")
        self._kept.append(x)
        return x

    def pop(self) -> Tensor:
        """The innermost skip not yet taken, scaled."""
        if len(self._kept) + self._popped != self.n:
            self._refuse(f"a pop after {len(self._kept)} pushes")
        i = len(self._kept)
        x = self._kept.pop()
        self._popped = self.n - len(self._kept) if self._kept else 0
        return self(x, i)

    def clear(self) -> None:
        """Lets go of what a forward pass that stopped half way has left."""
        self._kept, self._popped = [], 0

    def _refuse(self, what: str) -> None:
        self.clear()
        raise RuntimeError(
            f"{what}; a forward pass pushes {self.n} long skips and then pops {self.n}. What was kept is gone; if an earlier pass "
            "stopped half way, simply run again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": [], "_popped": 0}  # type: ignore[misc]

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", share={self.share}" if self.mode == "ls" else "")
