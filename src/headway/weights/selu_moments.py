"""What a layer of SELU units does to mean and variance, exactly, for Gaussian pre-activations; and the SELU of any fixed point.

    z ~ N(m, v),  m = mu * omega,  v = nu * tau                    omega = sum of a unit's weights, tau = sum of their squares
    q = P(z < 0),  e1 = E[exp(z); z < 0],  e2 = E[exp(2z); z < 0],  p1 = E[z; z > 0],  p2 = E[z^2; z > 0]
    mean'   = scale * (p1 + alpha * (e1 - q))
    second' = scale^2 * (p2 + alpha^2 * (e2 - 2 * e1 + q)),        var' = second' - mean'^2

``exp(m + v/2) erfc((m + v) / sqrt(2v))`` overflows on one side while it underflows on the other, so it is computed as
``exp(-m^2 / 2v) erfcx((m + v) / sqrt(2v))``. Self-Normalizing Neural Networks (Klambauer et al.), 2017, arXiv 1706.02515.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

ALPHA = 1.6732632423543772848170429916717
SCALE = 1.0507009873554804934193349852946
_SMALLEST, _LARGEST = 1e-6, 1e6
Number = float | Tensor


def _wide(*values: Number) -> list[Tensor]:
    """The numbers as float64 tensors of one shape: float32 has too few digits where the map nearly cancels."""
    tensors = [v.double() if isinstance(v, Tensor) else torch.tensor(float(v), dtype=torch.float64) for v in values]
    return list(torch.broadcast_tensors(*tensors))


def _part_below(m: Tensor, v: Tensor, k: int, gauss: Tensor) -> Tensor:
    """E[exp(k z); z < 0] of z ~ N(m, v); ``gauss`` is exp(-m^2 / 2v)."""
    x = (m + k * v) / torch.sqrt(2 * v)
    right = x > 0
    # the branch that is not taken gets a harmless argument, so that its gradient is no NaN
    scaled = gauss * torch.special.erfcx(torch.where(right, x, 1.0))
    exponent = torch.where(right, -1.0, k * m + k * k * v / 2)
    return 0.5 * torch.where(right, scaled, torch.exp(exponent) * torch.special.erfc(torch.where(right, 1.0, x)))


def _pieces(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p1, p2, F = E[exp(z) - 1; z < 0] and E = E[(exp(z) - 1)^2; z < 0]."""
    v = v.clamp(min=torch.finfo(v.dtype).tiny)
    gauss = torch.exp(-m * m / (2 * v))
    density = torch.sqrt(v / (2 * math.pi)) * gauss
    q, e1, e2 = (_part_below(m, v, k, gauss) for k in (0, 1, 2))
    above = 0.5 * torch.special.erfc(-m / torch.sqrt(2 * v))
    p1 = m * above + density
    p2 = (m * m + v) * above + m * density
    return p1, p2, e1 - q, e2 - 2 * e1 + q


def moment_map(
    mu: Number,
    nu: Number,
    omega: Number = 0.0,
    tau: Number = 1.0,
    alpha: float = ALPHA,
    scale: float = SCALE,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a layer's activations from those of its inputs. Vectorised and differentiable.

    Args:
        mu, nu: mean and variance of the inputs.
        omega, tau: sum and sum of squares of a unit's weights (not a standard deviation).
        alpha, scale: of the SELU.

    Returns:
        mean and variance, float64, of the broadcast shape of the arguments.

    Raises:
        ValueError: a variance or sum of squares below 0.
    """
    mu_, nu_, omega_, tau_ = _wide(mu, nu, omega, tau)
    for name, value in (("nu (a variance)", nu_), ("tau (a sum of squares)", tau_)):
        if bool((value.detach() < 0).any()):
            raise ValueError(f"{name} must be at least 0; its smallest value is {float(value.detach().min()):.4g}")
    p1, p2, first, second = _pieces(mu_ * omega_, nu_ * tau_)
    mean = scale * (p1 + alpha * first)
    return mean, (scale * scale * (p2 + alpha * alpha * second) - mean * mean).clamp(min=0)


def jacobian(
    mu: Number, nu: Number, omega: Number = 0.0, tau: Number = 1.0, alpha: float = ALPHA, scale: float = SCALE
) -> Tensor:
    """Derivative of :func:`moment_map` by (mu, nu): (..., 2, 2), row one that of the mean.

    Where its spectral norm is below 1 the map contracts. Raises as :func:`moment_map`.
    """
    mu_, nu_, omega_, tau_ = _wide(mu, nu, omega, tau)
    higher = torch.is_grad_enabled() and any(t.requires_grad for t in (mu_, nu_, omega_, tau_))
    with torch.enable_grad():
        if not higher:
            mu_, nu_ = (t.detach().clone().requires_grad_() for t in (mu_, nu_))
        else:
            mu_, nu_ = (t + torch.zeros_like(t).requires_grad_() for t in (mu_, nu_))
        rows = []
        for value in moment_map(mu_, nu_, omega_, tau_, alpha, scale):
            rows.append(
                torch.stack(torch.autograd.grad(value.sum(), (mu_, nu_), retain_graph=True, create_graph=higher), -1)
            )
    return torch.stack(rows, -2)


def iterate(
    mu: Number,
    nu: Number,
    n: int,
    omega: Number = 0.0,
    tau: Number = 1.0,
    alpha: float = ALPHA,
    scale: float = SCALE,
) -> tuple[Tensor, Tensor]:
    """Mean and variance after ``n`` layers: :func:`moment_map` n times. Raises ValueError for a negative ``n``."""
    if n < 0:
        raise ValueError(f"n is a number of layers, at least 0; it is {n}")
    mean, variance, omega_, tau_ = _wide(mu, nu, omega, tau)
    for _ in range(n):
        mean, variance = moment_map(mean, variance, omega_, tau_, alpha, scale)
    return mean, variance


@cache
def selu_params(mean: float = 0.0, var: float = 1.0) -> tuple[float, float]:
    """(alpha, scale) of the SELU whose moment map has the fixed point (mean, var) for weights of sum 1 and square sum 1.

    For ``mean`` 0 (the published case) sum 0 does as well. Eliminating ``scale`` leaves a quadratic in ``alpha``, so the answer
    is in closed form; it is checked with :func:`moment_map` before it is given.

    Raises:
        ValueError: ``var`` is not positive or outside [1e-6, 1e6], or there is no such SELU.
    """
    m, v = float(mean), float(var)
    if not v > 0 or not math.isfinite(v) or not math.isfinite(m):
        raise ValueError(f"a fixed point needs a finite mean and a variance above 0; ({mean}, {var}) was given")
    if not _SMALLEST <= v <= _LARGEST:
        raise ValueError(f"fixed points are solved for variances in [{_SMALLEST:g}, {_LARGEST:g}]; {var} was given")
    p1, p2, first, second = (float(t) for t in _pieces(*_wide(m, v)))
    square = v + m * m
    divisor = square * first * first - m * m * second
    under_root = square * (first * first * p2 + second * p1 * p1) - m * m * second * p2
    nothing = f"no SELU with alpha > 0 and scale > 0 has the fixed point ({mean}, {var}); a mean nearer to 0 has one"
    if not divisor > 0 or not under_root > 0:
        raise ValueError(nothing)
    root = math.sqrt(under_root)
    alpha = (-square * p1 * first - m * root) / divisor
    below = -p1 * m * second - first * root
    if not alpha > 0 or not below > 0:
        raise ValueError(nothing)
    scale = divisor / below
    reached = moment_map(m, v, 1.0, 1.0, alpha, scale)
    if max(abs(float(reached[0]) - m), abs(float(reached[1]) - v)) > 1e-7 * (1 + abs(m)) * max(v, 1e-2):
        raise ValueError(nothing)
    return alpha, scale
