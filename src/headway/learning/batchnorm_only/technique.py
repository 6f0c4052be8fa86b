"""What of a model trains, as a change of it: the normalisers' gains and shifts, the output layer, or as many random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from warnings import warn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headway.checkpoints import record
from headway.learning.batchnorm_only.choose import (
    GAMMA_INITS,
    Affine,
    affine_normalisers,
    fresh_gain,
    kind_names,
    output_layer,
    quantised,
    without_affine,
)
from headway.learning.batchnorm_only.joined import norms_before_relu
from headway.learning.batchnorm_only.layers import Become, Joined, Still, Trained, is_batch_norm, lighter
from headway.learning.batchnorm_only.sparse import train_some
from headway.surgery import Edit, SetParameter, Site, Technique

GammaInit = Literal["uniform", "ones", "signed"]
_Held = list[tuple[torch.optim.Optimizer, dict[str, Any], int, nn.Parameter, Any]]
_TAKEN_OUT: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


class Trains(Edit):
    """Says of a module's own parameters which of them ask for a gradient; gradients that others still hold are dropped."""

    def __init__(self, model: nn.Module, name: str, module: nn.Module, wanted: dict[str, bool]) -> None:
        self.model, self.name, self.module, self.wanted = model, name, module, wanted
        self._before: list[tuple[nn.Parameter, bool, Tensor | None]] = []

    def do(self) -> None:
        self._before = []
        for key, wanted in self.wanted.items():
            parameter: Any = self.module._parameters[key]
            self._before.append((parameter, parameter.requires_grad, parameter.grad))
            parameter.requires_grad_(wanted)
            if not wanted:
                parameter.grad = None

    def undo(self) -> None:
        put_back(self.model)
        for parameter, wanted, grad in self._before:
            parameter.requires_grad_(wanted)
            if grad is not None:
                parameter.grad = grad

    def describe(self) -> tuple[str, str]:
        before = {key: p.requires_grad for key, p in self.module._parameters.items() if p is not None}
        before |= dict(zip(self.wanted, (was for _, was, _ in self._before), strict=False))
        return _words({key: before[key] for key in self.wanted}), _words(self.wanted)


class _SetFresh(SetParameter):
    """Puts a new gain or shift in the place of the old one, and says in the plan how it was made."""

    def __init__(self, owner: nn.Module, attribute: str, new: nn.Parameter, name: str, words: str) -> None:
        super().__init__(owner, attribute, new, name)
        self.words = words

    def describe(self) -> tuple[str, str]:
        return "as it was", self.words


def _words(trained: dict[str, bool]) -> str:
    on = [key for key, value in trained.items() if value]
    return f"trains {', '.join(on)}" if on else "at rest"


class _Only(Technique):
    """What these techniques share: everything but the chosen parameters is put to rest, in the model and in the optimiser."""

    def _rest(self, model: nn.Module, sites: Sequence[Site], chosen: set[int]) -> list[Edit]:
        found: list[Edit] = []
        for site in sites:
            own = {key: p for key, p in site.module._parameters.items() if p is not None}
            wanted = {key: id(p) in chosen for key, p in own.items() if id(p) in chosen or p.requires_grad}
            if wanted:
                found.append(Trains(model, site.name, site.module, wanted))
        return found

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Takes the parameters at rest out of the optimiser: a gradient of zeros would leave them to its weight decay."""
        mine = {id(p) for p in model.parameters() if not p.requires_grad}
        held = _TAKEN_OUT.setdefault(model, [])
        for group in optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                if id(parameter) in mine:
                    held.append((optimizer, group, place, parameter, optimizer.state.pop(parameter, None)))
            group["params"] = [p for p in group["params"] if id(p) not in mine]
        return optimizer


def put_back(model: nn.Module) -> None:
    """Gives optimisers the parameters again that :class:`BatchNormOnly` and its kin took out of them."""
    for optimizer, group, place, parameter, state in _TAKEN_OUT.pop(model, []):
        group["params"].insert(place, parameter)
        if state is not None:
            optimizer.state[parameter] = state


def _refuse_quantised(model: nn.Module) -> None:
    if packed := quantised(model):
        raise ValueError(
            f"{len(packed)} modules are quantised ({', '.join(packed[:3])}), and no gradient flows through packed integers; "
            "apply it to the floating model and quantise afterwards"
        )


@dataclass(frozen=True)
class BatchNormOnly(_Only):
    """Trains the normalisers' gains and shifts and puts everything else to rest.

    Args:
        include_output: also train the output layer, which is told by itself or by its name ("fc"). False is the paper's setting.
        kinds: which normalisers: globs on class names ("BatchNorm*"), or classes; all of them by default.
        gamma_init: None keeps the gains (for pre-trained models); "uniform" draws them from U(0, 1) with shifts of 0, as the paper
            does for random networks, "signed" from U(-1, 1), "ones" sets them to 1.
        freeze_stats: batch norms use their running statistics in training too, for fine-tuning with small batches.
        memory_saving: convolutions at rest keep no input and ReLU modules one bit an entry; batch norms run fused, in training
            together with a ReLU module that alone reads them, whose output theirs is then.

    ``where=`` of ``hw.apply`` leaves everything outside it as it was.

    Raises:
        NothingToChange: no normaliser has a gain or a shift.
        ValueError: normalisers without (listed), quantised modules, an output layer that cannot be told, an unknown
            ``gamma_init``, ``freeze_stats`` where a batch norm has no running statistics.

    Source: "Training BatchNorm and Only BatchNorm", 2020, arXiv 2003.00152.
    """

    include_output: bool | str = False
    kinds: Any = None
    gamma_init: GammaInit | None = None
    freeze_stats: bool = False
    memory_saving: bool = True

    looks_for: ClassVar[str] = "normalisation layers with a gain or a shift"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", kind_names(self.kinds))
        if self.gamma_init is not None and self.gamma_init not in GAMMA_INITS:
            raise ValueError(f"gamma_init is one of {', '.join(GAMMA_INITS)} or None; it is {self.gamma_init!r}")

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        _refuse_quantised(model)
        allowed = {id(site.module) for site in sites}
        norms = [norm for norm in affine_normalisers(model, self.kinds) if id(norm.module) in allowed]
        if not norms:
            return []
        names = {name for name, module in model.named_modules() if id(module) in allowed}
        if bare := [name for name in without_affine(model, self.kinds) if name in names]:
            raise ValueError(
                f"{len(bare)} normalisers have no gain and no shift to train ({', '.join(bare[:5])}); build them with affine "
                "parameters, or leave them out with where="
            )
        chosen = {id(norm.module._parameters[key]) for norm in norms for key in (norm.gain, norm.shift) if key}
        if self.include_output:
            given = self.include_output if isinstance(self.include_output, str) else None
            chosen |= {id(p) for p in output_layer(model, given)[1].parameters()}
        found = self._rest(model, sites, chosen)
        found += self._fresh(norms)
        found += self._lighter(model, sites, chosen)
        return [*found, *record(model, self, sites)]

    def _fresh(self, norms: Sequence[Affine]) -> list[Edit]:
        found: list[Edit] = []
        for norm in norms if self.gamma_init else ():
            for key, is_gain in ((norm.gain, True), (norm.shift, False)):
                if key is None:
                    continue
                old: Any = norm.module._parameters[key]
                new = fresh_gain(norm.module, old, str(self.gamma_init)) if is_gain else torch.zeros_like(old)
                name = f"{norm.name}.{key}" if norm.name else key
                words = f"drawn anew ({self.gamma_init})" if is_gain else "0"
                found.append(_SetFresh(norm.module, key, nn.Parameter(new.detach()), name, words))
        return found

    def _lighter(self, model: nn.Module, sites: Sequence[Site], chosen: set[int]) -> list[Edit]:
        found: list[Edit] = []
        joined = norms_before_relu(model) if self.memory_saving and not self.freeze_stats else set()
        for site in sites:
            module: Any = site.module
            if is_batch_norm(module):
                if self.freeze_stats:
                    _check_statistics(site.name, module)
                if self.freeze_stats or self.memory_saving:
                    kind = Still if self.freeze_stats else Joined if id(module) in joined else Trained
                    found.append(Become(module, kind, site.name))
                continue
            mixin = lighter(module) if self.memory_saving else None
            if mixin is not None and not any(id(p) in chosen for p in module.parameters(recurse=False)):
                found.append(Become(module, mixin, site.name))
        return found


def _check_statistics(name: str, norm: Any) -> None:
    if norm.running_mean is None:
        raise ValueError(
            f"freeze_stats=True needs running statistics, and {name} keeps none (track_running_stats=False); leave it False"
        )
    if norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0:
        warn(f"{name} has seen no batch: freeze_stats=True holds statistics that say nothing of the data", stacklevel=5)


@dataclass(frozen=True)
class OutputOnly(_Only):
    """Trains the output layer and puts everything else to rest: the linear probe that norms are compared with.

    Args:
        output: its name, where it cannot be told.

    Raises:
        ValueError: quantised modules, or an output layer that cannot be told.
    """

    output: str | None = None

    looks_for: ClassVar[str] = "an output layer"

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        _refuse_quantised(model)
        chosen = {id(p) for p in output_layer(model, self.output)[1].parameters()}
        return [*self._rest(model, sites, chosen), *record(model, self, sites)]


@dataclass(frozen=True)
class RandomParametersOnly(_Only):
    """Trains as many random weights as norms have parameters: of every output channel of every convolution the same number,
    at places drawn once; everything else is at rest, gains and shifts at their start.

    Args:
        per_channel: weights of an output channel; 2 are as many as the gain and the shift behind it.
        seed: of the places.

    Of a model without convolutions the linear layers take their place, without the output layer. Each such layer's weight is put
    together from what is fixed and the few that train, so that no optimiser's momentum or decay can reach the others; the state
    dict therefore has ``fixed``, ``places`` and ``some`` in place of ``weight``.

    Raises:
        NothingToChange: no convolution and no linear layer.
        ValueError: fewer weights a channel than ``per_channel``, or fewer than one.
    """

    per_channel: int = 2
    seed: int = 0

    looks_for: ClassVar[str] = "convolutions, or linear layers where there is none"

    def __post_init__(self) -> None:
        if self.per_channel < 1:
            raise ValueError(f"per_channel must be at least 1; it is {self.per_channel}")

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        _refuse_quantised(model)
        found = train_some(model, sites, self.per_channel, self.seed)
        return [*self._rest(model, sites, set()), *found, *record(model, self, sites)] if found else []
