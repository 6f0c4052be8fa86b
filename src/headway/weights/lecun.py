"""Weights of mean 0 and variance 1 / fan_in, biases 0: the start under which SELU keeps mean and variance.

``kaiming_normal_(..., nonlinearity="selu")`` is another start (variance 9/16 of this one), and so is the default of ``nn.Linear``
(variance 1/3 of this one): with either the signal of a deep net dies. "Efficient BackProp" (LeCun et al.), 1998; needed by
"Self-Normalizing Neural Networks" (Klambauer et al.), 2017, arXiv 1706.02515.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TRANSPOSED = nn.modules.conv._ConvTransposeNd
LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


def has_weights(module: nn.Module) -> bool:
    """Whether it is a linear layer or convolution (torch's, or the transposed linear layer of GPT-2, ``Conv1D``)."""
    known = isinstance(module, LINEAR) or type(module).__name__ == "Conv1D"
    return known and isinstance(getattr(module, "weight", None), Tensor)


def fan_in(module: nn.Module) -> int:
    """How many inputs a unit of a linear layer or convolution sums: input channels / groups * kernel area.

    A transposed convolution of stride s sums only 1 / s of them along each axis.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, TRANSPOSED):
        return weight.shape[0] // module.groups * weight[0, 0].numel()
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()


def unit_sums(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of the weights of every output unit: omega and tau, float64, (units,)."""
    w: Tensor = module.weight.detach().double()  # type: ignore[operator, union-attr]
    if isinstance(module, TRANSPOSED):
        g = module.groups
        w = w.reshape(g, w.shape[0] // g, w.shape[1], -1).transpose(1, 2).flatten(2).flatten(0, 1)
    elif type(module).__name__ == "Conv1D":
        w = w.t()
    w = w.reshape(w.shape[0], -1)
    return w.sum(1), w.square().sum(1)


@torch.no_grad()
def lecun_normal_(tensor: Tensor, fan: str | int = "in", generator: torch.Generator | None = None) -> Tensor:
    """Fills a weight with normal numbers of variance 1 / fan, in place.

    Args:
        tensor: (out, in / groups, *kernel); for a transposed convolution (in, out / groups, *kernel).
        fan: "in" (size of axis 1 * kernel area), "out" (size of axis 0 * kernel area: the inputs of a transposed convolution
            without groups), or the number itself.

    Raises:
        ValueError: fewer than two axes with ``fan`` a word, an unknown word, or a number below 1.
        TypeError: not a floating tensor.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"lecun_normal_ fills floating tensors; this one is {tensor.dtype}")
    if isinstance(fan, str):
        if fan not in ("in", "out"):
            raise ValueError(f'fan is "in", "out" or a number of inputs; it is {fan!r}')
        if tensor.dim() < 2:
            raise ValueError(
                f"the fan of a tensor of shape {tuple(tensor.shape)} is not defined; give it as a number, fan=..."
            )
        area = math.prod(tensor.shape[2:])
        fan = tensor.shape[1 if fan == "in" else 0] * area
        if not tensor.numel():
            return tensor
    if fan < 1:
        raise ValueError(f"a unit needs at least one input; fan={fan} was given")
    return tensor.normal_(0.0, 1 / math.sqrt(fan), generator=generator)


@torch.no_grad()
def self_normalizing_init_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Weights N(0, 1 / fan_in) and biases 0 in every linear layer and convolution, in place; returns the model.

    Raises:
        ValueError: there is none.
    """
    found = [module for module in model.modules() if has_weights(module)]
    if not found:
        raise ValueError("self_normalizing_init_ looks for linear layers and convolutions; the model holds none")
    for module in found:
        if module.weight.numel():  # type: ignore[operator, union-attr]
            lecun_normal_(module.weight, fan_in(module), generator)  # type: ignore[arg-type]
        if isinstance(module.bias, Tensor):
            module.bias.zero_()
    return model
