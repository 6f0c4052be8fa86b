"""Puts the norms of an existing layer in another place around its residual branches.

The new layer is an instance of a subclass of the old one's class that shares all its children, so names, parameters and
``isinstance`` stay as they are; only its ``forward`` follows another order. What each family's branches are is told by
:func:`branches`; where a norm goes is told by :func:`headway.residual.placements.residual`. Layers that have a ``placement`` of
their own (headway's) keep their class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from headway.residual.seams import Branch, run

Part = tuple[str, nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]


def branches(layer: Any, kind: str, named: dict[str, Any]) -> list[Part]:
    """(name, norm, function of the stream, dropout after it) for each residual branch of a layer called with ``named``."""
    if kind == "llama":
        return [
            (
                "attention",
                layer.input_layernorm,
                lambda y: layer.self_attn(hidden_states=y, **named)[0],
                getattr(layer, "resid_attn_dropout", None),
            ),
            ("mlp", layer.post_attention_layernorm, layer.mlp, getattr(layer, "resid_mlp_dropout", None)),
        ]
    if kind == "gpt2":
        memory, memory_mask = named.pop("encoder_hidden_states", None), named.pop("encoder_attention_mask", None)
        found: list[Part] = [("attention", layer.ln_1, lambda y: layer.attn(y, **named)[0], None)]
        if memory is not None:
            seen = {key: named.get(key) for key in ("past_key_values", "attention_mask")}
            seen |= {"encoder_hidden_states": memory, "encoder_attention_mask": memory_mask}
            found.append(("cross_attention", layer.ln_cross_attn, lambda y: layer.crossattention(y, **seen)[0], None))
        return [*found, ("mlp", layer.ln_2, layer.mlp, None)]
    if kind == "gpt_neox":
        attention = layer.attention
        return [
            ("attention", layer.input_layernorm, lambda y: attention(y, **named)[0], layer.post_attention_dropout),
            ("mlp", layer.post_attention_layernorm, layer.mlp, layer.post_mlp_dropout),
        ]
    if kind == "opt":

        def drop(y: Tensor) -> Tensor:
            return F.dropout(y, layer.dropout, layer.training)

        attend, feed = layer.self_attn, lambda y: layer.fc2(layer.activation_fn(layer.fc1(y)))
        return [
            ("attention", layer.self_attn_layer_norm, lambda y: attend(hidden_states=y, **named)[0], drop),
            ("mlp", layer.final_layer_norm, feed, drop),
        ]
    if kind == "clip":
        return [
            ("attention", layer.layer_norm1, lambda y: layer.self_attn(hidden_states=y, **named)[0], None),
            ("mlp", layer.layer_norm2, layer.mlp, None),
        ]
    if kind == "vit":
        return [
            ("attention", layer.layernorm_before, lambda y: layer.attention(y, **named)[0], layer.dropout),
            ("mlp", layer.layernorm_after, layer.mlp, layer.dropout),
        ]
    if kind == "bert":
        return _bert(layer, named)
    return _torch(layer, kind, named)


def _bert(layer: Any, named: dict[str, Any]) -> list[Part]:
    memory, memory_mask = named.pop("encoder_hidden_states", None), named.pop("encoder_attention_mask", None)

    def attention(name: str, module: Any, arguments: dict[str, Any]) -> Part:
        out = module.output
        return name, out.LayerNorm, lambda y: out.dense(module.self(y, **arguments)[0]), out.dropout

    found = [attention("attention", layer.attention, named)]
    if memory is not None:
        seen = {**named, "encoder_hidden_states": memory, "attention_mask": memory_mask}
        found.append(attention("cross_attention", layer.crossattention, seen))
    out = layer.output
    return [*found, ("mlp", out.LayerNorm, lambda y: out.dense(layer.intermediate(y)), out.dropout)]


def _torch(layer: Any, kind: str, named: dict[str, Any]) -> list[Part]:
    stream, memory = ("src", None) if kind == "torch.nn encoder" else ("tgt", named["memory"])
    causal = "is_causal" if memory is None else "tgt_is_causal"

    def attend(module: Any, side: str, is_causal: str, y: Tensor, keys: Tensor) -> Tensor:
        mask, padding = named.get(f"{side}_mask"), named.get(f"{side}_key_padding_mask")
        hint = named.get(is_causal, False)
        return module(y, keys, keys, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=hint)[0]

    found: list[Part] = [
        ("attention", layer.norm1, lambda y: attend(layer.self_attn, stream, causal, y, y), layer.dropout1)
    ]
    if memory is not None:
        across = layer.multihead_attn
        found.append(
            (
                "cross_attention",
                layer.norm2,
                lambda y: attend(across, "memory", "memory_is_causal", y, memory),
                layer.dropout2,
            )
        )
    norm, drop = (layer.norm2, layer.dropout2) if memory is None else (layer.norm3, layer.dropout3)
    return [*found, ("mlp", norm, lambda y: layer.linear2(layer.dropout(layer.activation(layer.linear1(y)))), drop)]


KINDS = {
    "LlamaDecoderLayer": "llama",
    "MistralDecoderLayer": "llama",
    "Qwen2DecoderLayer": "llama",
    "Qwen3DecoderLayer": "llama",
    "GemmaDecoderLayer": "llama",
    "Phi3DecoderLayer": "llama",
    "GPT2Block": "gpt2",
    "GPTNeoXLayer": "gpt_neox",
    "OPTDecoderLayer": "opt",
    "CLIPEncoderLayer": "clip",
    "ViTLayer": "vit",
    "BertLayer": "bert",
    "RobertaLayer": "bert",
    "TransformerEncoderLayer": "torch.nn encoder",
    "TransformerDecoderLayer": "torch.nn decoder",
}


class Rewired(nn.Module):
    """What every rewired layer has: its placement, its global place in the stack, and the forward that follows them."""

    placement: str
    index: int
    num_layers: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        kind: Any = type(self)
        named = {**dict(zip(kind.arguments, args, strict=False)), **kwargs}
        x = named.pop(kind.arguments[0])
        placed = []
        for name, norm, function, drop in branches(self, kind.kind, named):
            output_norm = getattr(self, f"{name}_output_norm", None) if self.placement == "peri" else None
            if self.placement == "peri" and output_norm is None:
                raise RuntimeError(f"the layer has lost {name}_output_norm, which its placement 'peri' needs")
            placed.append(Branch(norm, function, output_norm, drop))
        x = run(x, placed, self.placement, self.index, self.num_layers)
        closing = getattr(self, "closing_norm", None)
        return x if closing is None else closing(x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (type(self).original,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


@cache
def _subclass(original: type[nn.Module]) -> type[nn.Module]:
    kind = next(KINDS[base.__name__] for base in original.__mro__ if base.__name__ in KINDS)
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    more = {"original": original, "kind": kind, "arguments": tuple(p.name for p in parameters if p.kind in plain)}
    return type(f"Rewired{original.__name__}", (Rewired, original), more)


def _revive(original: type[nn.Module]) -> nn.Module:
    kind = _subclass(original)
    return kind.__new__(kind)


def _original(layer: nn.Module) -> Any:
    return getattr(type(layer), "original", type(layer))


def places_itself(layer: nn.Module) -> bool:
    """Whether the layer's own forward follows a ``placement`` attribute."""
    return bool(getattr(_original(layer), "places_itself", False))


def can_rewire(layer: nn.Module) -> bool:
    """Whether it is known how the layer strings its branches together."""
    return places_itself(layer) or any(base.__name__ in KINDS for base in _original(layer).__mro__)


def rewire(layer: nn.Module, placement: str, index: int, num_layers: int) -> Any:
    """A layer that shares all children of ``layer`` and places its norms as ``placement`` says."""
    kind = type(layer) if places_itself(layer) else _subclass(_original(layer))
    new: Any = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    new.__dict__["_modules"] = dict(layer._modules)
    new.__dict__["_parameters"] = dict(layer._parameters)
    new.__dict__["_buffers"] = dict(layer._buffers)
    new.placement, new.index, new.num_layers = placement, index, num_layers
    return new
