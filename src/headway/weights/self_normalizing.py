"""SELU, alpha dropout and the start that go together: activations pull themselves to mean 0 and variance 1, layer after layer.

    selu(x) = scale * x  for x > 0,   scale * alpha * (exp(x) - 1)  for x <= 0        alpha = 1.67326..., scale = 1.05070...
    alpha dropout    y = a * (x * d + a' * (1 - d)) + b,   d ~ Bernoulli(q),  a' = -scale * alpha,  q = 1 - p
                     a = sqrt(v / (q * ((1 - q) * (a' - m)^2 + v))),   b = m - a * (q * m + (1 - q) * a')
    weights          N(0, 1 / fan_in), biases 0

(m, v) = (0, 1) is a fixed point of the map from the mean and variance of a layer's inputs to those of its outputs, and that map
contracts there (spectral norm 0.788); :func:`moment_map` is the map, :func:`selu_params` gives the two constants for any other
fixed point. "Self-Normalizing Neural Networks" (Klambauer, Unterthiner, Mayr, Hochreiter), NeurIPS 2017, arXiv 1706.02515.

For deep fully connected nets on tables, small batches, or one sample at a time: inputs must be standardised, the output layer is
linear. Not for nets with skip connections, recurrence or attention, not behind a BatchNorm: there the theory does not hold.
:func:`check_self_normalizing` tells whether a net meets the conditions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.checkpoints import record
from headway.kernels.selu import alpha_dropout as _alpha_dropout
from headway.kernels.selu import selu as _selu
from headway.surgery import Edit, SetParameter, Site, Swap, Technique
from headway.weights.lecun import fan_in, has_weights, lecun_normal_
from headway.weights.selu_moments import ALPHA, SCALE, selu_params

Moments = tuple[float, float]


def selu(x: Tensor, alpha: float = ALPHA, scale: float = SCALE, inplace: bool = False) -> Tensor:
    """``scale * x`` above 0, ``scale * alpha * (exp(x) - 1)`` elsewhere; the backward needs the output alone.

    Args:
        x: any shape, floating. NaN stays NaN, -inf becomes ``-scale * alpha``.
        alpha, scale: above 0; :func:`selu_params` has them for other fixed points than (0, 1).
        inplace: overwrite ``x``.

    Raises:
        TypeError: not a floating tensor. ValueError: ``alpha`` or ``scale`` is not above 0.
    """
    _floating(x, "selu")
    if not (alpha > 0 and scale > 0):
        raise ValueError(f"alpha and scale of a SELU must lie above 0; they are {alpha} and {scale}")
    return _selu(x, float(alpha), float(scale), inplace)


def alpha_dropout(
    x: Tensor,
    p: float = 0.05,
    training: bool = True,
    fixed_point: Moments = (0.0, 1.0),
    mask: Tensor | None = None,
) -> Tensor:
    """Sets entries to the lowest value of a SELU and rescales, so that mean and variance stay ``fixed_point``.

    Args:
        x: any shape, floating.
        p: probability of falling out, in [0, 1).
        training: False returns ``x`` itself, as ``p`` = 0 does.
        fixed_point: mean and variance that ``x`` has and keeps.
        mask: bool, True where an entry stays, instead of a random one; broadcasts to the shape of ``x``.

    Raises:
        ValueError: ``p`` outside [0, 1), or a mask that is not bool or does not fit. TypeError: not a floating tensor.
    """
    _floating(x, "alpha dropout")
    _probability(p)
    if not training or (p == 0 and mask is None):
        return x
    if mask is not None and (mask.dtype != torch.bool or not _fits(mask, x)):
        raise ValueError(
            f"mask must be a bool tensor that broadcasts to {tuple(x.shape)}, True where an entry stays; "
            f"it is {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return _alpha_dropout(x, float(p), *dropout_constants(p, fixed_point), mask)


def feature_alpha_dropout(
    x: Tensor, p: float = 0.05, training: bool = True, fixed_point: Moments = (0.0, 1.0)
) -> Tensor:
    """:func:`alpha_dropout` of whole channels of (N, C, ...). Raises ValueError for fewer than two axes as well."""
    _floating(x, "alpha dropout")
    _probability(p)
    if x.dim() < 2:
        raise ValueError(f"feature alpha dropout takes (batch, channels, ...); the input has shape {tuple(x.shape)}")
    if not training or p == 0:
        return x
    kept = torch.rand((*x.shape[:2], *[1] * (x.dim() - 2)), device=x.device) >= p
    return alpha_dropout(x, p, True, fixed_point, kept)


def dropout_constants(p: float, fixed_point: Moments = (0.0, 1.0)) -> tuple[float, float, float]:
    """(a, b, a'): the gain, the shift and the value of what falls out."""
    alpha, scale = _constants(fixed_point)
    m, v = fixed_point
    q, low = 1 - p, -scale * alpha
    gain = math.sqrt(v / (q * ((1 - q) * (low - m) ** 2 + v)))
    return gain, m - gain * (q * m + (1 - q) * low), low


def _constants(fixed_point: Moments) -> Moments:
    mean, var = fixed_point
    return (ALPHA, SCALE) if (mean, var) == (0.0, 1.0) else selu_params(float(mean), float(var))


def _floating(x: Tensor, what: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{what} takes a floating tensor, not {x.dtype}; convert it with x.float()")


def _probability(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"p is the probability of falling out, in [0, 1); it is {p}")


def _fits(mask: Tensor, x: Tensor) -> bool:
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    return mask.dim() <= x.dim() and all(size in (1, wanted) for size, wanted in sizes)


class SELU(nn.Module):
    """:func:`selu` as a layer.

    Args:
        fixed_point: mean and variance that the layer keeps; alpha and scale are solved from them.
        inplace: overwrite the input.

    Shapes:
        any -> the same.

    Raises:
        ValueError: no SELU has this fixed point, or its variance is not positive.
    """

    def __init__(self, fixed_point: Moments = (0.0, 1.0), inplace: bool = False) -> None:
        super().__init__()
        self.fixed_point, self.inplace = _moments(fixed_point), inplace
        self.alpha, self.scale = _constants(self.fixed_point)

    def forward(self, x: Tensor) -> Tensor:
        return selu(x, self.alpha, self.scale, self.inplace)

    def extra_repr(self) -> str:
        shown = "" if self.fixed_point == (0.0, 1.0) else f"fixed_point={self.fixed_point}"
        return ", ".join(part for part in (shown, "inplace=True" if self.inplace else "") if part)


class AlphaDropout(nn.Module):
    """:func:`alpha_dropout` as a layer; goes behind a SELU. The paper uses p = 0.05 and 0.1.

    Args:
        p: probability of falling out.
        fixed_point: mean and variance that are kept, as of the SELU in front.

    Shapes:
        any -> the same.

    Raises:
        ValueError: ``p`` outside [0, 1), or no SELU has this fixed point.
    """

    def __init__(self, p: float = 0.05, fixed_point: Moments = (0.0, 1.0)) -> None:
        super().__init__()
        _probability(p)
        self.p, self.fixed_point = float(p), _moments(fixed_point)
        dropout_constants(self.p, self.fixed_point)

    def forward(self, x: Tensor) -> Tensor:
        return alpha_dropout(x, self.p, self.training, self.fixed_point)

    def extra_repr(self) -> str:
        return f"p={self.p}" + ("" if self.fixed_point == (0.0, 1.0) else f", fixed_point={self.fixed_point}")


class FeatureAlphaDropout(AlphaDropout):
    """:func:`feature_alpha_dropout` as a layer: whole channels of (N, C, ...) fall out. Arguments as :class:`AlphaDropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return feature_alpha_dropout(x, self.p, self.training, self.fixed_point)


def _moments(fixed_point: Any) -> Moments:
    mean, var = (float(value) for value in fixed_point)
    return mean, var


ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.SELU,
)
_DROPOUTS = (nn.Dropout, nn.AlphaDropout)
_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer."""
    return isinstance(module, NORMS) or type(module).__name__.endswith("Norm")


@dataclass(frozen=True)
class SelfNormalizing(Technique):
    """Makes a plain feed-forward net self-normalising: ReLU and its kin become SELU, dropout becomes alpha dropout, norms between
    a linear layer and its activation go, and weights start anew as N(0, 1 / fan_in) with biases 0.

    Args:
        initialise: draw new weights; without it a trained model keeps its own, and the signal is not kept.
        max_dropout: higher rates of dropout are lowered to this one, with a warning.
        remove_norms: take out norms between a linear layer or convolution and an activation.
        fixed_point: mean and variance to be kept.

    Warns where the model has skip connections, attention or recurrence, or keeps a norm: the theory does not cover them.

    Raises:
        NothingToChange: no activation module was found (``F.relu`` is a function, which cannot be exchanged).
        ValueError: ``max_dropout`` outside [0, 1), or no SELU has this fixed point.
    """

    initialise: bool = True
    max_dropout: float = 0.1
    remove_norms: bool = True
    fixed_point: Moments = (0.0, 1.0)

    looks_for: ClassVar[str] = "activation modules (nn.ReLU and its kin) or nn.SELU"

    def __post_init__(self) -> None:
        _probability(self.max_dropout)
        object.__setattr__(self, "fixed_point", _moments(self.fixed_point))
        _constants(self.fixed_point)

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        if not any(isinstance(site.module, (*ACTIVATIONS, SELU)) for site in sites):
            return []
        between = _between(model) if self.remove_norms else set()
        found: list[Edit] = []
        capped: list[float] = []
        fresh: dict[int, nn.Parameter] = {}
        for site in sites:
            new = self._instead(site.module, id(site.module) in between, capped)
            if new is not None:
                found.append(Swap(model, site.name, site.module, new.train(site.module.training)))
            elif self.initialise and has_weights(site.module):
                found += self._start(site, fresh)
        if capped:
            warnings.warn(
                f"dropout of {max(capped):g} was lowered to alpha dropout of {self.max_dropout:g}, which self-normalising nets "
                "need less of; max_dropout= sets the limit",
                stacklevel=4,
            )
        if reasons := outside_theory(model, between):
            warnings.warn(f"self-normalisation is not to be expected here: {'; '.join(reasons)}", stacklevel=4)
        return [*found, *record(model, self, sites)] if found else []

    def _instead(self, module: nn.Module, between: bool, capped: list[float]) -> nn.Module | None:
        if isinstance(module, ACTIVATIONS):
            return SELU(self.fixed_point, bool(getattr(module, "inplace", False)))
        for kinds, layer in ((_CHANNEL_DROPOUTS, FeatureAlphaDropout), (_DROPOUTS, AlphaDropout)):
            if isinstance(module, kinds):
                if module.p > self.max_dropout:
                    capped.append(module.p)
                return layer(min(module.p, self.max_dropout), self.fixed_point)
        return nn.Identity() if between else None

    def _start(self, site: Site, fresh: dict[int, nn.Parameter]) -> list[Edit]:
        made: list[Edit] = []
        for key in ("weight", "bias"):
            old = site.module._parameters.get(key)
            if old is None:
                continue
            if id(old) not in fresh:  # a tied weight starts once
                new = torch.zeros_like(old)
                if key == "weight" and old.numel():
                    lecun_normal_(new, fan_in(site.module))
                fresh[id(old)] = nn.Parameter(new, old.requires_grad)
            made.append(SetParameter(site.module, key, fresh[id(old)], f"{site.name}.{key}".lstrip(".")))
        return made


def _between(model: nn.Module) -> set[int]:
    """Ids of the norms that stand between a linear layer or convolution and an activation, in order of definition."""
    known = [
        module
        for module in model.modules()
        if has_weights(module) or is_norm(module) or isinstance(module, (*ACTIVATIONS, SELU))
    ]
    return {
        id(norm)
        for before, norm, after in zip(known, known[1:], known[2:], strict=False)
        if is_norm(norm) and has_weights(before) and isinstance(after, (*ACTIVATIONS, SELU))
    }


def outside_theory(model: nn.Module, leaving: set[int] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Why the theory does not cover a model: norms (but those of the ids ``leaving``), attention, recurrence, skip connections."""
    from headway.residual.additions import find_additions

    reasons = []
    for what, kinds in (("attention", nn.MultiheadAttention), ("recurrence", (nn.RNNBase, nn.RNNCellBase))):
        if any(isinstance(module, kinds) for module in model.modules()):
            reasons.append(f"it has {what}")
    norms = [name for name, module in model.named_modules() if is_norm(module) and id(module) not in leaving]
    if norms:
        reasons.append(f"it keeps {len(norms)} norm(s), the first at {norms[0] or 'the top'}")
    additions = find_additions(model)
    if additions:
        reasons.append(f"it has {len(additions)} residual addition(s), the first at {additions[0].name}")
    return reasons
