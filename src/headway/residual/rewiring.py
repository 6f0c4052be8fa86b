"""Puts the norms of an existing layer in another place around its residual branches.

The new layer is an instance of a subclass of the old one's class that shares all its children, so names, parameters and
``isinstance`` stay as they are; only its ``forward`` follows another order. What each family's branches are is told by
:func:`branches`; where a norm goes is told by :func:`headway.residual.placements.residual`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from headway.residual.placements import residual

Branch = tuple[str, nn.Module, Callable[[Tensor], Tensor], nn.Module | None]


def _arguments(module: nn.Module, original: type, args: tuple, kwargs: dict) -> tuple[Tensor, dict[str, Any]]:
    """The stream and everything else the layer was called with, by name."""
    signature = inspect.signature(original.forward)
    bound = signature.bind(module, *args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    x = named.pop(next(iter(named)))
    return x, named


def _no_cross_attention(named: dict[str, Any]) -> dict[str, Any]:
    if named.pop("encoder_hidden_states", None) is not None:
        raise NotImplementedError("cross-attention inside a rewired layer is not supported; rewire decoder-only models")
    named.pop("encoder_attention_mask", None)
    return named


def branches(layer: Any, kind: str, named: dict[str, Any]) -> list[Branch]:
    """(name, norm, function of the stream, dropout after it) for each residual branch of a layer."""
    if kind == "llama":
        return [
            ("attention", layer.input_layernorm, lambda y: layer.self_attn(hidden_states=y, **named)[0], None),
            ("mlp", layer.post_attention_layernorm, layer.mlp, None),
        ]
    if kind == "gpt2":
        named = _no_cross_attention(named)
        return [
            ("attention", layer.ln_1, lambda y: layer.attn(y, **named)[0], None),
            ("mlp", layer.ln_2, layer.mlp, None),
        ]
    if kind == "gpt_neox":
        return [
            (
                "attention",
                layer.input_layernorm,
                lambda y: layer.attention(y, **named)[0],
                layer.post_attention_dropout,
            ),
            ("mlp", layer.post_attention_layernorm, layer.mlp, layer.post_mlp_dropout),
        ]
    if kind == "vit":
        return [
            ("attention", layer.layernorm_before, lambda y: layer.attention(y, **named)[0], layer.dropout),
            ("mlp", layer.layernorm_after, layer.mlp, layer.dropout),
        ]
    if kind == "bert":
        named = _no_cross_attention(named)
        inner, out = layer.attention, layer.output
        return [
            (
                "attention",
                inner.output.LayerNorm,
                lambda y: inner.output.dense(inner.self(y, **named)[0]),
                inner.output.dropout,
            ),
            ("mlp", out.LayerNorm, lambda y: out.dense(layer.intermediate(y)), out.dropout),
        ]
    if kind == "torch.nn encoder":

        def attend(y: Tensor) -> Tensor:
            return layer.self_attn(
                y,
                y,
                y,
                attn_mask=named.get("src_mask"),
                key_padding_mask=named.get("src_key_padding_mask"),
                need_weights=False,
                is_causal=named.get("is_causal", False),
            )[0]

        return [
            ("attention", layer.norm1, attend, layer.dropout1),
            ("mlp", layer.norm2, lambda y: _feed_forward(layer, y), layer.dropout2),
        ]
    memory = named["memory"]

    def attend_self(y: Tensor) -> Tensor:
        mask, padding = named.get("tgt_mask"), named.get("tgt_key_padding_mask")
        causal = named.get("tgt_is_causal", False)
        return layer.self_attn(y, y, y, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=causal)[
            0
        ]

    def attend_memory(y: Tensor) -> Tensor:
        mask, padding = named.get("memory_mask"), named.get("memory_key_padding_mask")
        causal = named.get("memory_is_causal", False)
        return layer.multihead_attn(
            y, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=causal
        )[0]

    return [
        ("attention", layer.norm1, attend_self, layer.dropout1),
        ("cross_attention", layer.norm2, attend_memory, layer.dropout2),
        ("mlp", layer.norm3, lambda y: _feed_forward(layer, y), layer.dropout3),
    ]


def _feed_forward(layer: Any, y: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(y))))


KINDS = {
    "LlamaDecoderLayer": "llama",
    "MistralDecoderLayer": "llama",
    "Qwen2DecoderLayer": "llama",
    "Qwen3DecoderLayer": "llama",
    "GPT2Block": "gpt2",
    "GPTNeoXLayer": "gpt_neox",
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
        original = type(self).original  # type: ignore[attr-defined]
        x, named = _arguments(self, original, args, kwargs)
        for name, norm, function, drop in branches(self, type(self).kind, named):  # type: ignore[attr-defined]
            output_norm = getattr(self, f"{name}_output_norm", None) if self.placement == "peri" else None
            if self.placement == "peri" and output_norm is None:
                raise RuntimeError(f"the layer has lost {name}_output_norm, which its placement 'peri' needs")
            after: Callable[[Tensor], Tensor] = drop if drop is not None else (lambda y: y)
            where = {"placement": self.placement, "index": self.index, "num_layers": self.num_layers}
            if output_norm is not None:
                # dropout comes after the output norm, which would otherwise rescale the dropped vector
                x = residual(x, function, norm, output_norm=lambda y, n=output_norm, a=after: a(n(y)), **where)
            else:
                x = residual(x, lambda y, f=function, a=after: a(f(y)), norm, **where)
        closing = getattr(self, "closing_norm", None)
        return x if closing is None else closing(x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (type(self).original,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


@cache
def _subclass(original: type[nn.Module]) -> type[nn.Module]:
    kind = next(KINDS[base.__name__] for base in original.__mro__ if base.__name__ in KINDS)
    return type(f"Rewired{original.__name__}", (Rewired, original), {"original": original, "kind": kind})


def _revive(original: type[nn.Module]) -> nn.Module:
    kind = _subclass(original)
    return kind.__new__(kind)


def rewire(layer: nn.Module, placement: str, index: int, num_layers: int) -> Any:
    """A layer that shares all children of ``layer`` and places its norms as ``placement`` says."""
    original = getattr(type(layer), "original", type(layer))
    kind = _subclass(original)
    new: Any = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    new.__dict__["_modules"] = dict(layer._modules)
    new.__dict__["_parameters"] = dict(layer._parameters)
    new.__dict__["_buffers"] = dict(layer._buffers)
    new.placement, new.index, new.num_layers = placement, index, num_layers
    return new
