"""What trains of a model, in hand: names, counts, parameters, and a ``with`` block after which everything may train again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headway.learning.batchnorm_only.choose import Kinds
from headway.learning.batchnorm_only.sparse import Some
from headway.learning.batchnorm_only.technique import BatchNormOnly, GammaInit, RandomParametersOnly
from headway.surgery import Technique, apply, undo


class NormOnly:
    """The parameters of a model that train. A context manager: on leaving it every ``requires_grad`` and every layer is as it was
    before, and what has been learned stays.

    Attributes:
        model: the changed model.
        names: qualified names of what trains.
        n_trainable: how many numbers that are.
        fraction: their share of all parameters.
    """

    def __init__(self, model: nn.Module, technique: Technique) -> None:
        self._total = sum(p.numel() for p in model.parameters())
        self.model = apply(model, technique)
        self._open = True

    @property
    def names(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def n_trainable(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def fraction(self) -> float:
        return self.n_trainable / max(1, self._total)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What to build an optimiser from."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def release(self) -> None:
        """Ends it: what leaving the ``with`` block does.

        Raises:
            ValueError: the model was changed by another call of ``hw.apply`` since, or was released already.
        """
        from headway.surgery import history

        if not self._open or not history(self.model):
            raise ValueError("this selection was released already; train_only_norm makes a new one")
        learned = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        whole = {name: _whole(m) for name, m in self.model.named_modules() if isinstance(m, Some)}
        undo(self.model)
        self._open = False
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in learned and learned[name] is not p:
                    p.copy_(learned[name])
            for name, weight in whole.items():
                layer: Any = self.model.get_submodule(name)
                layer.weight.copy_(weight)

    def __enter__(self) -> NormOnly:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.release()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n_trainable:,} of {self._total:,} parameters, {self.fraction:.2%})"


class RandomControl(NormOnly):
    """The same for a control of random weights.

    Attributes:
        masks: {name of a weight: bool tensor of its shape, True where it trains}.
    """

    @property
    def masks(self) -> dict[str, Tensor]:
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Some):
                layer: Any = module
                mask = torch.zeros(layer.fixed.shape, dtype=torch.bool, device=layer.fixed.device).flatten(1)
                found[f"{name}.weight" if name else "weight"] = mask.scatter(1, layer.places, True).view(
                    layer.fixed.shape
                )
        return found


def _whole(module: Any) -> Tensor:
    return module.weight.detach().clone()


def train_only_norm(
    model: nn.Module,
    *,
    include_output: bool | str = False,
    kinds: Kinds = None,
    gamma_init: GammaInit | None = None,
    freeze_stats: bool = False,
    memory_saving: bool = True,
) -> NormOnly:
    """:class:`BatchNormOnly` applied in place, with what trains in hand.

    >>> with train_only_norm(model) as part:
    ...     optimizer = torch.optim.SGD(part.parameters(), 0.1, momentum=0.9)
    """
    return NormOnly(model, BatchNormOnly(include_output, kinds, gamma_init, freeze_stats, memory_saving))


def random_parameter_control(model: nn.Module, per_channel: int = 2, seed: int = 0) -> RandomControl:
    """:class:`RandomParametersOnly` applied in place, with what trains and its masks in hand."""
    return RandomControl(model, RandomParametersOnly(per_channel, seed))
