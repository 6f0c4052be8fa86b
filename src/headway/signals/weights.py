"""The weights of the probed modules: their norms, those of their gradients, and how fast a step turns them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headway.optim.effective import follows_gradient_size
from headway.signals.calls import norm
from headway.signals.row import NAN


class Weights:
    """Of every module the parameters of its own: those with two axes or more, or all where there is none."""

    def __init__(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.optimizer = optimizer
        self._own: dict[int, list[nn.Parameter]] = {}
        self._gradients: dict[int, Tensor] = {}

    def of(self, module: nn.Module) -> list[nn.Parameter]:
        """The module's own weights, to be asked about later."""
        own = [p for p in module.parameters(recurse=False) if not isinstance(p, nn.UninitializedParameter)]
        own = [p for p in own if p.dim() > 1] or own
        self._own[id(module)] = own
        return own

    def on_gradient(self, parameter: nn.Parameter) -> None:
        """Keeps the norm of a parameter's gradient, as soon as it is there."""
        if parameter.grad is not None:
            grad = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
            with torch.no_grad():
                self._gradients[id(parameter)] = norm(grad)

    def numbers(self, modules: Iterable[nn.Module], scale: float) -> dict[int, tuple[float, float, float]]:
        """id(module) -> norm of its weights, norm of their gradient, effective learning rate; NaN for what there is not."""
        mine = {id(module): self._own.get(id(module), []) for module in modules}
        unique = {id(parameter): parameter for own in mine.values() for parameter in own}
        with torch.no_grad():
            norms = _numbers({key: norm(parameter) for key, parameter in unique.items()})
        grads = _numbers({key: self._gradients[key] for key in unique if key in self._gradients})
        found = {}
        for key, own in mine.items():
            length = math.hypot(*(norms[id(p)] for p in own)) if own else NAN
            graded = [grads[id(p)] for p in own if id(p) in grads]
            found[key] = length, math.hypot(*graded) / scale if graded else NAN, self._rate(own, length)
        return found

    def _rate(self, own: list[nn.Parameter], length: float) -> float:
        if self.optimizer is None or not length > 0:
            return NAN
        mine = {id(parameter) for parameter in own}
        for group in self.optimizer.param_groups:
            if any(id(parameter) in mine for parameter in group["params"]):
                if follows_gradient_size(self.optimizer):
                    return float(group["lr"]) / length**2
                return float(group["lr"]) / (length / math.sqrt(sum(parameter.numel() for parameter in own)))
        return NAN


def _numbers(tensors: dict[int, Tensor]) -> dict[int, float]:
    """All the scalars in one transfer from each device."""
    found: dict[int, float] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        here = {key: tensor for key, tensor in tensors.items() if tensor.device == device}
        found.update(zip(here, torch.stack([t.double() for t in here.values()]).tolist(), strict=True))
    return found
