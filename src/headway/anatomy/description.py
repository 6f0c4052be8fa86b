"""The words in which an architecture is described: who writes to the residual stream, who reads it, and through which norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["attention", "cross_attention", "mlp"]


@dataclass(frozen=True)
class Sublayer:
    """One residual branch. All names are qualified names inside the model (``model.get_submodule(name)``).

    Attributes:
        kind: "attention", "cross_attention" or "mlp".
        function: the module that computes the branch, if it is one module (``h.0.attn``); None where the block's own
            forward strings several together.
        norm: the norm that belongs to this branch: its input norm (pre) or the norm after the addition (post).
        output_norm: the norm on the branch's output before the addition (peri, Gemma 2), or None.
        readers: linear layers that read the branch's input (q, k, v; the first MLP layers).
        writer: the linear layer whose output is added to the stream.
        dropouts: dropout modules between ``writer`` and the addition.
    """

    kind: Kind
    function: str | None
    norm: str | None
    readers: tuple[str, ...]
    writer: str
    output_norm: str | None = None
    dropouts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One layer of the stack: its name, its global index, where its norms sit, and its branches in order."""

    name: str
    index: int
    placement: str
    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its residual stream.

    Attributes:
        family: "gpt2", "llama", "bert", "torch.nn", ...
        hidden_size: width of the stream.
        embeddings: modules that write to the stream before the first block (token, position, type tables; patch projection).
        parameters: bare parameters that write to the stream (class token, position table), qualified names.
        embedding_norm: a norm applied to the embedding itself, or None.
        blocks: the layers, in order.
        final_norm: the norm after the last block, or None.
        heads: modules that read the stream after the final norm (lm_head, classifier).
        tied: pairs of parameter names that are one tensor (("transformer.wte.weight", "lm_head.weight"),).
    """

    family: str
    hidden_size: int
    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    embedding_norm: str | None = None
    final_norm: str | None = None
    heads: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = field(default=())
