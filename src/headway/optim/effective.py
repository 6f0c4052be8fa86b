"""How fast a step turns a weight whose size the network does not feel.

A weight W in front of a normalisation layer acts through its direction alone. A step of plain gradient descent turns it by
eta / ||W||^2 (the gradient itself shrinks with 1 / ||W||), a step that does not depend on the gradient's size, such as Adam's, by
eta / ||W||. Growing norms are therefore a hidden decay of the learning rate. van Laarhoven, 2017 (arXiv 1706.05350).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.optim.sharded import is_spread


def follows_gradient_size(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is proportional to the gradient (SGD and its kin), rather than free of its size (Adam and its kin)."""
    return isinstance(optimizer, torch.optim.SGD) or getattr(optimizer, "follows_gradient_size", False)


def effective_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """{name of a parameter: eta / ||W||^2 for SGD and its kin, eta / ||W|| for the others}, for every matrix or convolution of
    ``model`` that ``optimizer`` holds. Meaningful where the weight is followed by a normalisation. Waits for the device.
    """
    return effective_rates(optimizer, {name: p for name, p in model.named_parameters() if p.dim() > 1 and p.numel()})


@torch.no_grad()
def effective_rates(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, float]:
    """The same for named parameters; those that ``optimizer`` does not hold are left out."""
    power = 2 if follows_gradient_size(optimizer) else 1
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] / max(_norm(p), 1e-30) ** power for name, p in params.items() if id(p) in rates}


def _norm(p: Tensor) -> float:
    norm: Any = torch.linalg.vector_norm(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
    return float(norm.full_tensor() if is_spread(norm) else norm)
