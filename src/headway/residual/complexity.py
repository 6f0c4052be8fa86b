"""Geometric complexity: how steep a network is at the data, ``mean over samples of ||d f(x) / d x||_F^2``.

It falls with the factor on the residual branches (capacity control). Measure: "Why neural networks find simple solutions: the
many regularizers of geometric complexity", 2022, arXiv 2209.13083; used here for "On residual network depth", 2025, arXiv 2510.03470.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def geometric_complexity(
    model: nn.Module, x: Tensor, n_projections: int | None = None, generator: torch.Generator | None = None
) -> float:
    """Mean squared Frobenius norm of the Jacobian of the outputs with respect to the inputs.

    Args:
        model: (B, ...) -> (B, ...), samples independent of one another (evaluation mode for batch norm).
        x: floating-point inputs, (B, ...).
        n_projections: None is exact, one backward pass an output; a number estimates without bias by that many random signs
            (Hutchinson).
        generator: for the random signs.

    Raises:
        ValueError: integer inputs, an empty batch, or ``n_projections`` < 1.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"x must be floating point to be differentiated; {x.dtype} was given, pass the embeddings instead"
        )
    if x.shape[0] == 0:
        raise ValueError("the mean over an empty batch is not defined; give at least one sample")
    if n_projections is not None and n_projections < 1:
        raise ValueError(f"n_projections must be None or at least 1; {n_projections} was given")
    with torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        outputs = model(inputs).flatten(1)
        count = outputs.shape[1] if n_projections is None else n_projections
        total = 0.0
        for j in range(count):
            if n_projections is None:
                direction = torch.zeros_like(outputs)
                direction[:, j] = 1
            else:
                signs = torch.randint(0, 2, outputs.shape, generator=generator, device=outputs.device)
                direction = (2 * signs - 1).to(outputs.dtype)
            (gradient,) = torch.autograd.grad(outputs, inputs, direction, retain_graph=j + 1 < count)
            total += gradient.double().pow(2).sum().item()
    return total / x.shape[0] / (1 if n_projections is None else n_projections)
