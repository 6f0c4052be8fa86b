"""The words in which an architecture is described: who writes to the residual stream, who reads it, and through which norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "cross_attention", "mlp"]


@dataclass(frozen=True)
class Sublayer:
    """One residual branch. All names are qualified names inside the model (``model.get_submodule(name)``).

    Attributes:
        kind: "attention", "cross_attention" or "mlp".
        function: the module that computes the branch, if it is one module (``h.0.attn``); None where the block's own
            forward strings several together.
        norm: the norm that belongs to this branch: its input norm (pre), the norm after the addition (post) or on the branch's
            output (output). Parallel branches may share one.
        output_norm: the norm on the branch's output before the addition where there is an input norm too (peri, Gemma 2), or None.
        readers: linear layers that read the branch's input (q, k, v; the first MLP layers).
        memory_readers: linear layers that read another stack's output (keys and values of cross-attention).
        writer: the linear layer whose output is added to the stream.
        gain: a per-channel gain between ``writer`` and the addition (timm's LayerScale), or None.
        dropouts: dropout modules between ``writer`` and the addition.
        dropout_rates: qualified names of float attributes that hold the rate of a functional dropout there.
    """

    kind: Kind
    function: str | None
    norm: str | None
    readers: tuple[str, ...]
    writer: str
    output_norm: str | None = None
    dropouts: tuple[str, ...] = ()
    memory_readers: tuple[str, ...] = ()
    gain: str | None = None
    dropout_rates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One layer of a stack: its name, its index in that stack, where its norms sit, and its branches in order."""

    name: str
    index: int
    placement: str
    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True)
class Stack:
    """One residual stream, from what is written to it first to the norm and heads that read it last.

    Attributes:
        name: the module that owns the list of layers ("encoder" for "encoder.layers.0").
        family: "gpt2", "llama", "bert", "torch.nn", ...
        hidden_size: width of the stream.
        blocks: the layers, in order; ``len(blocks)`` is the L of this stack.
        embeddings: modules that write to the stream before the first block (token, position, type tables; patch projection).
        parameters: bare parameters that write to the stream (class token, position table), qualified names.
        bent: modules whose output passes a nonlinearity on its way into the stream (Whisper's last convolution), so that
            nothing about their weights holds for what they write.
        embedding_norm: a norm applied to the embedding itself, or None.
        final_norm: the norm after the last block, or None.
        heads: modules that read the stream after the final norm (lm_head, classifier).
        dropouts: dropout modules on the embedding or around the final norm.
        dropout_rates: qualified names of float attributes that hold the rate of a functional dropout there.
    """

    name: str
    family: str
    hidden_size: int
    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    bent: tuple[str, ...] = ()
    embedding_norm: str | None = None
    final_norm: str | None = None
    heads: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    dropout_rates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its residual streams.

    ``stacks`` tells them apart (encoder and decoder, text and vision). What is asked of the anatomy itself is the answer of all
    stacks together: their blocks, embeddings and heads in order; the family, width and norms are those of the first stack.

    Attributes:
        stacks: the residual streams, in order of the model's modules.
        tied: pairs of parameter names that are one tensor (("transformer.wte.weight", "lm_head.weight"),).
    """

    stacks: tuple[Stack, ...]
    tied: tuple[tuple[str, str], ...] = ()

    @property
    def family(self) -> str:
        return self.stacks[0].family

    @property
    def hidden_size(self) -> int:
        return self.stacks[0].hidden_size

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for stack in self.stacks for block in stack.blocks)

    @property
    def embeddings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for stack in self.stacks for name in stack.embeddings))

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for stack in self.stacks for name in stack.parameters))

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for stack in self.stacks for name in stack.heads))

    @property
    def embedding_norm(self) -> str | None:
        return next((stack.embedding_norm for stack in self.stacks if stack.embedding_norm is not None), None)

    @property
    def final_norm(self) -> str | None:
        return self.stacks[0].final_norm
