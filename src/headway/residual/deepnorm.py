"""The start of weights that DeepNorm's scaled residuals are made for.

    Xavier-normal with gain (8 L)^(-1/4) for values, output projections and the MLP; with gain 1 for queries and keys

DeepNorm places norms as ``N(a x + f(x))`` with a = (2 L)^(1/4); without this start its updates are not bounded. Wang et al.:
DeepNet: Scaling Transformers to 1,000 Layers, 2022 (arXiv 2203.00555), constants of encoder-only and decoder-only models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.anatomy import Stack
from headway.anatomy.description import Sublayer
from headway.surgery import Edit, SetParameter

_VALUES, _OTHERS = ("v_proj", "value", "v"), ("q_proj", "k_proj", "query", "key", "q", "k", "q_attn")
# layers that hold queries, keys and values as three equal parts, one after the other
_THIRDS = ("qkv", "c_attn", "self_attn", "multihead_attn")


def starting_weights(model: nn.Module, stack: Stack) -> list[Edit]:
    """The edits that give the branches of ``stack`` new weights; biases stay.

    Raises:
        ValueError: a layer keeps queries, keys and values in one matrix in an order that is not known here.
    """
    gain = (8 * len(stack.blocks)) ** -0.25
    found: list[Edit] = []
    for part in (part for block in stack.blocks for part in block.sublayers):
        for name in dict.fromkeys((*part.readers, *part.memory_readers, part.writer)):
            module = model.get_submodule(name)
            key = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
            old = module._parameters.get(key)
            if old is None:
                raise ValueError(
                    f"{name} keeps queries, keys and values apart in a way that DeepNorm's start does not know"
                )
            fresh = nn.Parameter(_fresh(old, name, part, gain), old.requires_grad)
            found.append(SetParameter(module, key, fresh, name=f"{name}.{key}"))
    return found


def _fresh(old: Tensor, name: str, part: Sublayer, gain: float) -> Tensor:
    new, end = torch.empty_like(old), name.rpartition(".")[2]
    if part.kind == "mlp" or name == part.writer or end in _VALUES:
        return nn.init.xavier_normal_(new, gain)
    if end in _OTHERS:
        return nn.init.xavier_normal_(new)
    wide = 0 if new.shape[0] > new.shape[1] else 1
    # cross-attention that packs keys and values alone (GPT-2) has two parts
    parts = new.shape[wide] // new.shape[1 - wide]
    if end not in _THIRDS or parts * new.shape[1 - wide] != new.shape[wide] or parts not in (2, 3):
        raise ValueError(f"{name} packs queries, keys and values in an order that DeepNorm's start does not know")
    for piece in new.chunk(parts, wide)[:-1]:
        nn.init.xavier_normal_(piece)
    nn.init.xavier_normal_(new.chunk(parts, wide)[-1], gain)
    return new
