"""How one kind of layer is built: its branches, and what stands around the stack of them; all names relative to the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway.anatomy.description import Kind, Sublayer


@dataclass(frozen=True)
class Pattern:
    """One kind of layer.

    Attributes:
        family: the family's name.
        placement: where its norms sit ("pre", "post", "peri", "output"); "norm_first" and "do_layer_norm_before" read the
            layer's own switch of that name, "own" its ``placement`` attribute, "parallel" two branches off one stream.
        sublayers: its branches in order, all names relative to the layer. A branch whose writer the layer lacks is left out
            (cross-attention in a plain decoder); one branch of every other kind must be there.
        embeddings, parameters, bent, embedding_norm, heads, dropouts: names of what stands around the stack, searched for in
            the model as the last parts of a qualified name; the first that exists counts for the norm. ``"part:name"`` holds
            only for a stack inside a module called ``part``.
        final_norm: the first of these that exists, relative to the module that owns the list of layers; ".." is one above it.
        dropout_rates: float attributes of that owner that hold the rate of a functional dropout on the embedding.
        parts: all names the children and parameters of a layer may have, for class names that unrelated projects use too.
    """

    family: str
    placement: str
    sublayers: tuple[Sublayer, ...]
    embeddings: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    embedding_norm: tuple[str, ...] = ()
    final_norm: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("lm_head", "classifier", "score")
    bent: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    dropout_rates: tuple[str, ...] = ()
    parts: tuple[str, ...] | None = None


def attention(function, norm, readers, writer, dropouts=(), output_norm=None, **more: Any) -> Sublayer:
    return Sublayer("attention", function, norm, tuple(readers), writer, output_norm, tuple(dropouts), **more)


def cross(function, norm, readers, memory_readers, writer, dropouts=(), **more: Any) -> Sublayer:
    readers, memory = tuple(readers), tuple(memory_readers)
    kind: Kind = "cross_attention"
    return Sublayer(kind, function, norm, readers, writer, None, tuple(dropouts), memory_readers=memory, **more)


def mlp(function, norm, readers, writer, dropouts=(), output_norm=None, **more: Any) -> Sublayer:
    return Sublayer("mlp", function, norm, tuple(readers), writer, output_norm, tuple(dropouts), **more)
