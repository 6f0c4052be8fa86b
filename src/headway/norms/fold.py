"""Folds norms whose statistics are fixed into the linear layers that read them: they cost nothing at inference.

    norm      y = s * x + b,  s = weight / sqrt(running + eps)
    reader    W y + c = (W diag(s)) x + (c + W b)

A norm folds only where ALL that reads it is linear; what else there is (a norm in front of a residual add, a head that shares its
weight with the embedding) becomes a multiplication and an addition with two vectors, and the plan says why. For a model that was
trained with UnifiedNorm (arXiv 2208.01313) or with PowerNorm without groups (arXiv 2003.07845), before it is served, exported or
quantised. Not for a model to be trained further: its norms are gone. What reads which norm is known for the families of
:mod:`headway.anatomy`; any other model is traced with torch.fx. Hidden states that a model returns beside the output of its head
are those before the folded norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.checkpoints import record
from headway.norms.power import PowerNorm
from headway.norms.readers import Reader, readers_of
from headway.norms.unified import UnifiedNorm
from headway.surgery import Edit, SetParameter, Site, Swap, Technique, fused_paths_off, like


class ChannelAffine(nn.Module):
    """``x * weight + bias`` over the last axis: what is left of a norm that could not be folded.

    Shapes:
        input and output: (..., C); weight, bias: (C,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return str(len(self.weight))


@dataclass(frozen=True)
class FoldNorms(Technique):
    """Folds every UnifiedNorm and every PowerNorm without groups into the linear layers that read it.

    Readers are ``nn.Linear``, convolutions of kernel size 1, transformers' ``Conv1D`` and ``nn.MultiheadAttention``. The fold is
    computed in float64. ``hw.plan`` and ``hw.history`` name what was folded into what, and why the rest was not.

    Raises:
        RuntimeError: the model is in training mode, a norm has seen no batch yet, or a PowerNorm scales groups of channels token
            by token.
        ValueError: nothing reads a norm.
    """

    looks_for: ClassVar[str] = "UnifiedNorm layers, and PowerNorm layers without groups"

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        places = {site.name: site for site in sites if isinstance(site.module, UnifiedNorm | PowerNorm)}
        norms = {name: site.module for name, site in places.items()}
        if not norms:
            return []
        for name, norm in norms.items():
            self._check(name, norm)
        found: list[Edit] = []
        # a reader may read several norms only if it is shared, and then it is no reader (see readers_of)
        for name, readers in readers_of(model, norms).items():
            norm: Any = norms[name]
            scale, shift = _scale_shift(norm)
            if isinstance(readers, str):
                kind = _square(norm).dtype if norm.weight is None else norm.weight.dtype
                new: nn.Module = ChannelAffine(scale.to(kind), shift.to(kind))
                found.append(_Replaced(model, name, norm, like(places[name], new), readers))
                continue
            for reader in readers:
                found += _absorb(reader, name, scale, shift, norm.bias is not None)
            names = ", ".join(reader.name for reader in readers)
            found.append(_Replaced(model, name, norm, like(places[name], nn.Identity()), f"folded into {names}"))
        return [*found, *fused_paths_off(model, norms.values()), *record(model, FoldNorms(), sites)]

    def for_loading(self) -> Technique:
        return _FoldedForm()

    def _check(self, name: str, norm: Any) -> None:
        if norm.training:
            raise RuntimeError(f"{name} is in training mode, where its statistics still move; call model.eval() first")
        if int(norm.iters) == 0:
            raise RuntimeError(
                f"{name} has seen no batch, so its statistics mean nothing; train the model before folding"
            )
        _check_groups(name, norm)


class _FoldedForm(FoldNorms):
    """Only the shape that folding gives a model: its weights are loaded next."""

    def _check(self, name: str, norm: Any) -> None:
        _check_groups(name, norm)


class _Replaced(Swap):
    """Swaps a norm for what is left of it, and says in the plan what became of it."""

    def __init__(self, model: nn.Module, name: str, old: nn.Module, new: nn.Module, why: str) -> None:
        super().__init__(model, name, old, new, untie=True)
        self._why = why

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        return {}

    def describe(self) -> tuple[str, str]:
        before, after = super().describe()
        return before, self._why if isinstance(self.new, nn.Identity) else f"{after}: {self._why}"


class _Absorbed(SetParameter):
    """Puts the folded tensor in the place of a weight or bias, and says in the plan which norm it took in."""

    def __init__(self, owner: nn.Module, attribute: str, new: Tensor, name: str, norm: str, wanted: bool) -> None:
        super().__init__(owner, attribute, nn.Parameter(new, wanted), name)
        self._norm = norm

    def describe(self) -> tuple[str, str]:
        before, after = super().describe()
        return before, f"{after} with {self._norm}"


def _check_groups(name: str, norm: Any) -> None:
    if isinstance(norm, PowerNorm) and norm.group_num is not None:
        raise RuntimeError(
            f"{name} divides {norm.group_num} group(s) of channels by their own mean square at every token, which no linear "
            "layer can take in; train with group_num=None, or leave it out with where="
        )


def _square(norm: Any) -> Tensor:
    return norm.running_var if isinstance(norm, UnifiedNorm) else norm.running_phi


@torch.no_grad()
def _scale_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(_square(norm).double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    return scale, torch.zeros_like(scale) if norm.bias is None else norm.bias.double()


@torch.no_grad()
def _absorb(reader: Reader, norm: str, scale: Tensor, shift: Tensor, shifts: bool) -> list[Edit]:
    """Weight and bias of one reader with the norm in them; a bias that was None appears only where the norm has one."""
    module, rows = reader.module, reader.rows
    old: Any = module._parameters[reader.weight]
    weight = old.double()
    shape = [-1 if axis == reader.axis else 1 for axis in range(weight.dim())]
    whole = weight * scale.view(shape)
    added = (weight * shift.view(shape)).sum([axis for axis in range(weight.dim()) if axis != reader.output_axis])
    if rows is not None:  # only these outputs read the norm
        apart = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        apart[:rows] = False
        whole, added = torch.where(apart[:, None], weight, whole), torch.where(apart, 0, added)
    found: list[Edit] = [
        _Absorbed(module, reader.weight, whole.to(old.dtype), f"{reader.name}.{reader.weight}", norm, old.requires_grad)
    ]
    bias: Any = module._parameters.get(reader.bias)
    if bias is not None or shifts:
        new = (added if bias is None else bias.double() + added).to(old.dtype)
        wanted = old.requires_grad if bias is None else bias.requires_grad
        found.append(_Absorbed(module, reader.bias, new, f"{reader.name}.{reader.bias}", norm, wanted))
    return found
