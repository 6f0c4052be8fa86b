"""Whether a net meets the conditions of self-normalisation: inputs, weights, and the moments of every layer beside what the exact
map predicts from the layer's own inputs and weights.

"Self-Normalizing Neural Networks" (Klambauer et al.), 2017, arXiv 1706.02515: inputs of mean 0 and variance 1; for every unit
omega (the sum of its weights) near 0 and tau (the sum of their squares) near 1; SELU, alpha dropout, no skip connections. Training
with large rates or weight decay moves omega and tau away; run the check again on the trained net.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headway.weights.lecun import has_weights, unit_sums
from headway.weights.self_normalizing import ACTIVATIONS, SELU, outside_theory
from headway.weights.selu_moments import ALPHA, SCALE, moment_map

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class LayerMoments:
    """One linear layer or convolution, and the SELU behind it where there is one.

    Attributes:
        name: of the layer.
        omega, tau: sum and sum of squares of the weights of each unit.
        bias: root mean square of the biases.
        mean, variance: measured behind the SELU (None where there is none).
        expected_mean, expected_variance: by :func:`moment_map` from the moments of the layer's inputs, omega, tau and biases.
    """

    name: str
    omega: tuple[float, ...]
    tau: tuple[float, ...]
    bias: float
    mean: float | None = None
    variance: float | None = None
    expected_mean: float | None = None
    expected_variance: float | None = None


@dataclass(frozen=True)
class SelfNormalizingReport:
    """What :func:`check_self_normalizing` saw.

    Attributes:
        input_mean, input_variance: over all entries of the input.
        feature_mean: root mean square of the means of the single features.
        layers: one entry a linear layer or convolution, in order of execution.
        violations: what is wrong, one sentence each; empty where all conditions are met.
    """

    input_mean: float
    input_variance: float
    feature_mean: float
    layers: tuple[LayerMoments, ...]
    violations: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.violations

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"input: mean {self.input_mean:.3f}, variance {self.input_variance:.3f}"]
        for layer in self.layers:
            tau = sum(layer.tau) / max(1, len(layer.tau))
            text = f"{layer.name or '(the model)'}: mean tau {tau:.3f}"
            if layer.mean is not None:
                text += (
                    f"; behind SELU mean {layer.mean:.3f} (expected {layer.expected_mean:.3f}), "
                    f"variance {layer.variance:.3f} (expected {layer.expected_variance:.3f})"
                )
            lines.append(text)
        return "\n".join([*lines, *(f"violation: {text}" for text in self.violations)])


@torch.no_grad()
def check_self_normalizing(model: nn.Module, x: Any) -> SelfNormalizingReport:
    """Runs ``model(x)`` once in evaluation mode and compares every layer with the theory. Warns where something is violated.

    Args:
        model: a feed-forward net.
        x: a batch as the model takes it; features lie on axis 1.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: ``x`` is empty, or the model runs no linear layer and no convolution.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"the check takes a floating tensor as the model's input, not {getattr(x, 'dtype', type(x))}")
    if not x.numel():
        raise ValueError(f"the check needs at least one sample; the input has shape {tuple(x.shape)}")
    layers, outside = _run(model, x)
    if not layers:
        raise ValueError("the check looks for linear layers and convolutions that run; the model has none")
    mean, variance, feature = _input(x)
    violations = _of_input(mean, variance, feature, len(x))
    for layer in layers:
        violations += _of_layer(layer)
    violations += [*_of_modules(model), *outside, *outside_theory(model)]
    report = SelfNormalizingReport(mean, variance, feature, tuple(layers), tuple(violations))
    if violations:
        warnings.warn(f"{len(violations)} condition(s) of self-normalisation violated: {violations[0]}", stacklevel=3)
    return report


def _moments(x: Tensor) -> tuple[float, float]:
    wide = x.detach().double()
    return wide.mean().item(), wide.var(correction=0).item()


def _input(x: Tensor) -> tuple[float, float, float]:
    mean, variance = _moments(x)
    if x.dim() < 2 or len(x) < 2:
        return mean, variance, abs(mean)
    means = x.double().transpose(0, 1).flatten(1).mean(1)
    return mean, variance, means.square().mean().sqrt().item()


def _run(model: nn.Module, x: Tensor) -> tuple[list[LayerMoments], list[str]]:
    """The layers in order of execution, and the SELUs that stand where none should."""
    names = {module: name for name, module in model.named_modules()}
    layers: list[LayerMoments] = []
    last: list[tuple[nn.Module, float, float] | None] = [None]
    kinds: list[str] = []

    def after_layer(module: nn.Module, args: tuple, _: Any) -> None:
        omega, tau = unit_sums(module)
        bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros(1)
        rms = bias.double().square().mean().sqrt().item() if bias.numel() else 0.0
        layers.append(LayerMoments(names[module], tuple(omega.tolist()), tuple(tau.tolist()), rms))
        last[0] = (module, *_moments(args[0]))
        kinds.append("layer")

    def after_selu(module: nn.Module, _: tuple, out: Tensor) -> None:
        kinds.append("selu")
        if last[0] is None:
            return
        layer, mu, nu = last[0]
        omega, tau = unit_sums(layer)
        shift = layer.bias.double() if isinstance(layer.bias, Tensor) else 0.0
        alpha, scale = getattr(module, "alpha", ALPHA), getattr(module, "scale", SCALE)
        means, variances = moment_map(mu * omega + shift, nu * tau, 1.0, 1.0, alpha, scale)
        mean, variance = _moments(out)
        expected = means.mean().item(), (variances.mean() + means.var(correction=0)).item()
        layers[-1] = LayerMoments(*_first_four(layers[-1]), mean, variance, *expected)
        last[0] = None

    handles = [m.register_forward_hook(after_layer) for m in model.modules() if has_weights(m)]
    handles += [m.register_forward_hook(after_selu) for m in model.modules() if isinstance(m, SELU | nn.SELU)]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    outside = ["a SELU is the last to act: the output layer must be linear"] if kinds and kinds[-1] == "selu" else []
    if layers and "selu" not in kinds:
        outside.append("no SELU module acts")
    return layers, outside


def _first_four(layer: LayerMoments) -> tuple[str, tuple[float, ...], tuple[float, ...], float]:
    return layer.name, layer.omega, layer.tau, layer.bias


def _of_input(mean: float, variance: float, feature: float, samples: int) -> list[str]:
    found = []
    room = 3 / math.sqrt(samples)  # how far the mean of so few samples may be off
    if abs(mean) > 0.1 + room * 0.2 or not 0.5 <= variance <= 2:
        found.append(
            f"the input is not standardised: mean {mean:.3g}, variance {variance:.3g}; subtract each feature's mean and "
            "divide by its standard deviation"
        )
    elif feature > 0.5 + room:
        found.append(
            f"the features are not standardised one by one: their means have the root mean square {feature:.3g}"
        )
    return found


def _of_layer(layer: LayerMoments) -> list[str]:
    """The weights are judged by means over the units, which a start with the right variance meets whatever the width."""
    found = []
    units = len(layer.tau)
    if not units:
        return found
    tau, omega = sum(layer.tau) / units, sum(layer.omega) / units
    spread = math.sqrt(sum((t - tau) ** 2 for t in layer.tau) / units)
    if abs(tau - 1) > 0.2 + 3 * spread / math.sqrt(units):
        hint = ""
        for factor, name in (
            (1 / 3, "PyTorch's default start"),
            (9 / 16, 'nonlinearity="selu"'),
            (2.0, "the He start"),
        ):
            if abs(tau / factor - 1) < 0.1:
                hint = f" (that of {name})"
        found.append(
            f"{layer.name}: the squares of a unit's weights sum to {tau:.3g} on average{hint}; they should sum to 1"
        )
    if abs(omega) > 0.1 + 4 / math.sqrt(units):
        found.append(f"{layer.name}: a unit's weights sum to {omega:.3g} on average; they should sum to 0")
    if layer.bias > 0.25:
        found.append(f"{layer.name}: biases of root mean square {layer.bias:.3g}; they start at 0")
    measured = layer.mean is not None and layer.variance is not None
    if measured and (abs(layer.mean) > 0.25 or not 0.5 <= layer.variance <= 2):  # type: ignore[arg-type, operator]
        found.append(
            f"{layer.name}: behind its SELU mean {layer.mean:.3g} and variance {layer.variance:.3g}, "
            f"expected {layer.expected_mean:.3g} and {layer.expected_variance:.3g}"
        )
    return found


def _of_modules(model: nn.Module) -> list[str]:
    found = []
    for what, kinds, advice in (
        ("dropout", _DROPOUTS, "use AlphaDropout"),
        ("activation", tuple(set(ACTIVATIONS) - {nn.SELU}), "use SELU"),
    ):
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, kinds) and getattr(module, "p", 1.0) != 0
        ]
        if names:
            found.append(f"{len(names)} {what} module(s) of another kind, the first at {names[0]}; {advice}")
    return found
