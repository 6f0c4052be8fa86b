"""Transformers of known families: which weights a norm follows as the model comes, and where Normalize-and-Project puts one.

    family                                       followed by a norm as it comes    a norm is inserted behind
    GPT-2, GPT-NeoX, timm's ViT                  none                              the first MLP map (q and k come out of a joint map)
    OPT, GPT-J, Phi, CLIP, ViT, Whisper, BERT    none                              q, k, the first MLP map
    Llama, Mistral, Qwen 2, Gemma                none                              q, k, the gate
    T5                                           none                              the first MLP map or the gate
    Phi-3                                        none                              nothing (joint maps only)
    Qwen 3                                       q, k                              the gate
    Gemma 2                                      v, o, up, down                    q, k, the gate
    Gemma 3, OLMo 2                              q, k, v, o, up, down              the gate

A norm before a branch (GPT-2, Llama, ViT) is in front of a weight, and the norm after an addition (BERT) sees x + W h: neither frees
a weight's length. A norm on a branch's output does, for the map that writes the branch and for what is linear on the way to it: the
values of attention, the ungated half of a gated MLP. Lyle et al. normalise before the MLP's nonlinearity and, in transformers,
queries and keys (2024, arXiv 2407.01800); each head's are normalised by themselves here, before any rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.anatomy import Sublayer, UnknownFamily, describe

_QUERY, _KEY = ("q_proj", "query", "q"), ("k_proj", "key", "k")
_VALUE, _UP = ("v_proj", "value", "v"), ("up_proj", "wi_1")
_GATE, _JOINT = ("gate_proj", "wi_0"), ("gate_up_proj",)
_OWN_NORMS = {_QUERY: ("q_norm", "q_layernorm"), _KEY: ("k_norm", "k_layernorm")}


class HeadNorm(nn.Module):
    """LayerNorm (or RMSNorm) of every head's part of queries or keys: (..., heads * head_dim) -> the same.

    Args:
        head_dim: channels of one head. rms: leave the mean alone. affine: one gain and offset, shared by the heads.
    """

    def __init__(self, head_dim: int, eps: float = 1e-5, rms: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.head_dim, self.eps, self.rms = head_dim, eps, rms
        self.weight = nn.Parameter(torch.ones(head_dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(head_dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        heads, shape = x.unflatten(-1, (-1, self.head_dim)), (self.head_dim,)
        if not self.rms:
            return F.layer_norm(heads, shape, self.weight, self.bias, self.eps).flatten(-2)
        y = F.rms_norm(heads, shape, self.weight, self.eps)
        return (y if self.bias is None else y + self.bias).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, eps={self.eps}, rms={self.rms}, affine={self.weight is not None}"


@dataclass(frozen=True)
class Place:
    """A linear map behind which a norm belongs; ``head_dim`` where every head is normalised by itself."""

    linear: str
    head_dim: int | None = None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' linear map with its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def followed(model: nn.Module) -> dict[str, str]:
    """{weight: the norm that frees its length} of the known layers of a model, as they stand; {} for unknown families."""
    modules, found = dict(model.named_modules()), {}
    for placement, part in _sublayers(model):
        for kinds, names in _OWN_NORMS.items():
            for reader in _named(part.readers + part.memory_readers, kinds):
                norm = _sibling(modules, reader, names)
                if norm is not None and _bare(modules[reader]):
                    found[f"{reader}.weight"] = norm
        norm = part.norm if placement == "output" else part.output_norm
        if norm is None or part.gain is not None or not _bare(modules[part.writer]):
            continue
        found[f"{part.writer}.weight"] = norm
        for reader in _named(part.readers + part.memory_readers, _VALUE if part.kind != "mlp" else _UP):
            if _bare(modules[reader]):
                found[f"{reader}.weight"] = norm
    return found


def places(model: nn.Module) -> list[Place]:
    """Where the known layers of a model want a norm: before the MLP's nonlinearity, and on queries and keys."""
    modules, found = dict(model.named_modules()), []
    for _, part in _sublayers(model):
        readers = part.readers + part.memory_readers
        if part.kind == "mlp":
            gates = _named(readers, _GATE)
            single = [r for r in readers if _last(r) not in _JOINT] if len(readers) == 1 else []
            found += [Place(name) for name in gates or single]
            continue
        for kinds, names in _OWN_NORMS.items():
            for reader in _named(readers, kinds):
                dim = _head_dim(modules[reader.rpartition(".")[0]])
                if dim and _sibling(modules, reader, names) is None:
                    found.append(Place(reader, dim))
    return [
        place for place in found if isinstance(modules[place.linear], nn.Linear) or is_conv1d(modules[place.linear])
    ]


def _sublayers(model: nn.Module) -> Iterator[tuple[str, Sublayer]]:
    try:
        stacks = describe(model).stacks
    except UnknownFamily:
        return
    for stack in stacks:
        for block in stack.blocks:
            for part in block.sublayers:
                yield block.placement, part


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _named(names: tuple[str, ...], kinds: tuple[str, ...]) -> list[str]:
    return [name for name in names if _last(name) in kinds]


def _sibling(modules: dict[str, nn.Module], reader: str, names: tuple[str, ...]) -> str | None:
    """The attention's own norm of its queries or keys."""
    home = reader.rpartition(".")[0]
    return next((f"{home}.{n}" for n in names if _is_there(modules.get(f"{home}.{n}"))), None)


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _bare(module: nn.Module) -> bool:
    """Whether nothing is added behind the weight: no bias, or one that is kept at zero."""
    return fixed_at_zero(getattr(module, "bias", None))


def fixed_at_zero(bias: Tensor | None) -> bool:
    return bias is None or (not bias.requires_grad and not bool(bias.any()))


def _head_dim(attention: Any) -> int | None:
    # T5 does not divide by the root of the width: its logits of normalised queries and keys would be that much too large
    if type(attention).__name__ == "T5Attention":
        return None
    for name in ("head_dim", "attention_head_size"):
        if isinstance(found := getattr(attention, name, None), int):
            return found
    return None
