"""How the variance of the residual stream grows with depth, and which law it follows.

Exponential growth ``Var(h_i) = Var(h_0) r^i`` is the explosion of the 2^n paths, with ``r = 1 + lam^2`` for branches that preserve
variance and are uncorrelated with the stream; linear growth is that of normalised (pre-norm) branches.

Paper: "On residual network depth", 2025, arXiv 2510.03470.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headway.anatomy import UnknownFamily, describe
from headway.residual.depth import Residual
from headway.residual.depth_measures import call


@dataclass(frozen=True)
class DepthReport:
    """Attributes:
    names: the blocks, in order.
    variance: of the stream before the first block and after each, n + 1 numbers.
    law: "linear" or "exponential", whichever fits the variances better.
    slope: variance added a block under the linear fit, in units of the first variance.
    factor: factor of the variance a block under the exponential fit.
    ratio: last variance over first.
    predicted: product of ``1 + lam_i^2`` over the branches, or None where the blocks carry no known factor.
    """

    names: tuple[str, ...]
    variance: tuple[float, ...]
    law: str
    slope: float
    factor: float
    ratio: float
    predicted: float | None


def depth_report(model: nn.Module, x: Any, stack: int = 0) -> DepthReport:
    """Runs ``model(x)`` once and measures the stream at every block (Residual modules, else the layers of a known family).

    Args:
        x: one input, a tuple of them, or a dict of keywords.
        stack: which stream of a known model that has several (encoder and decoder, text and vision).

    Raises:
        UnknownFamily: the model holds neither.
        ValueError: there is no such stack.
    """
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Residual)]
    lams = [float(module.branch_scale) for _, module in blocks]
    if not blocks:
        try:
            stacks = describe(model).stacks
        except UnknownFamily as error:
            raise UnknownFamily(f"depth_report looks for Residual modules or known layers; {error}") from error
        if not 0 <= stack < len(stacks):
            raise ValueError(f"stack must lie in 0 to {len(stacks) - 1}, the streams of this model; {stack} was given")
        blocks = [(block.name, model.get_submodule(block.name)) for block in stacks[stack].blocks]
    seen: list[float] = []

    def variance(value: Any) -> float:
        tensor = value[0] if isinstance(value, tuple) else value
        return tensor.detach().double().var(correction=0).item()

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not seen:
            seen.append(variance(args[0] if args else next(iter(kwargs.values()))))

    handles: list[Any] = [blocks[0][1].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [m.register_forward_hook(lambda _m, _a, out: seen.append(variance(out))) for _, m in blocks]
    try:
        with torch.no_grad():
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    law, slope, factor = _fit(seen)
    predicted = math.exp(min(700.0, sum(math.log1p(lam**2) for lam in lams))) if lams else None
    ratio = seen[-1] / seen[0] if seen[0] else math.inf
    return DepthReport(tuple(name for name, _ in blocks), tuple(seen), law, slope, factor, ratio, predicted)


def _fit(variances: list[float]) -> tuple[str, float, float]:
    """Least squares on the relative variances (linear) and on their logarithms (exponential), judged on the logarithms."""
    first = variances[0]
    if not first > 0 or not all(math.isfinite(v) and v > 0 for v in variances):
        return "exponential", math.nan, math.nan
    relative = torch.tensor([v / first for v in variances], dtype=torch.float64)
    depth = torch.arange(len(relative), dtype=torch.float64)
    rate = (depth @ relative.log() / (depth @ depth)).item()
    slope = (depth @ (relative - 1) / (depth @ depth)).item()
    linear = (1 + slope * depth).clamp_min(1e-300).log()
    off_linear = (linear - relative.log()).pow(2).sum().item()
    off_exponential = (rate * depth - relative.log()).pow(2).sum().item()
    return ("linear" if off_linear < off_exponential else "exponential"), slope, math.exp(min(rate, 700.0))
