"""A plain decoder-only transformer whose blocks can carry their norms in any place.

One block, with ``N`` a layer norm or an RMS norm, and the branches ``Attention`` and ``MLP`` placed as
:mod:`headway.residual.placements` lists. It is small and readable, meant for experiments and as the model of the text task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.anatomy import describe
from headway.norms.layer import LayerNorm
from headway.norms.rms import RMSNorm
from headway.residual.deepnorm import starting_weights
from headway.residual.placement_record import PlacementMismatchWarning
from headway.residual.placements import SCHEMES, resolve
from headway.residual.seams import Branch, run


def make_norm(norm: str | Callable[[int], nn.Module], dim: int, eps: float | None = None) -> nn.Module:
    """A norm over ``dim`` from "layernorm", "rmsnorm" or a callable; eps 1e-5 and 1e-6 unless given."""
    if callable(norm):
        return norm(dim)
    if norm == "layernorm":
        return LayerNorm(dim, eps=1e-5 if eps is None else eps)
    if norm == "rmsnorm":
        return RMSNorm(dim, eps=1e-6 if eps is None else eps)
    raise ValueError(f"norm must be 'layernorm', 'rmsnorm' or a callable; {norm!r} was given")


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, dim) -> (B, T, dim)."""

    def __init__(self, dim: int, heads: int, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads; dim={dim} and heads={heads} were given")
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        y = self.qkv(x)
        # the stream may be narrower than the heads together (Pre-CRMSNorm)
        size = y.shape[-1] // (3 * self.heads)
        q, k, v = y.view(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=self.causal and length > 1)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """``down(gelu(up(x)))``: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each a residual branch with its norm placed as ``placement`` says.

    Args:
        dim, heads: width of the stream and number of attention heads.
        placement: one of "pre", "post", "peri", "output", "deepnorm", "layernorm_scaling"; fixed at construction.
        norm: "layernorm", "rmsnorm" or a callable ``dim -> module``.
        index, num_layers: the block's global place in the stack.
        output_gain: start of the output norms' gain under "peri": a branch adds about its square to the variance.
        dropout: on attention weights and on every branch, after its output norm.

    Shapes:
        (B, T, dim) -> (B, T, dim)
    """

    places_itself = True
    attention_norm: Any
    attention_output_norm: Any
    mlp_norm: Any
    mlp_output_norm: Any

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        placement: str = "peri",
        norm: str | Callable[[int], nn.Module] = "layernorm",
        causal: bool = True,
        hidden: int | None = None,
        dropout: float = 0.0,
        eps: float | None = None,
        output_gain: float = 1.0,
        index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        if placement not in SCHEMES:
            raise ValueError(f"unknown placement {placement!r}; choose one of {', '.join(SCHEMES)}")
        self.placement = placement
        self.index = index
        self.num_layers = num_layers
        self.attention_norm = make_norm(norm, dim, eps)
        self.attention = Attention(dim, heads, causal, dropout)
        self.mlp_norm = make_norm(norm, dim, eps)
        self.mlp = MLP(dim, hidden or 4 * dim)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        if placement == "peri":
            self.add_output_norms(norm, dim, eps, output_gain)

    def add_output_norms(
        self, norm: str | Callable[[int], nn.Module], dim: int, eps: float | None = None, gain: float = 1.0
    ) -> None:
        """Gives both branches an output norm of their own, with gains started at ``gain``."""
        for name in ("attention_output_norm", "mlp_output_norm"):
            module = make_norm(norm, dim, eps)
            if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
                nn.init.constant_(weight, gain)
            setattr(self, name, module)

    def get_extra_state(self) -> Tensor:
        # letters as bytes, because formats such as safetensors keep only tensors
        return torch.tensor(list(self.placement.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        trained = bytes(state.tolist()).decode()
        if trained != self.placement:
            warnings.warn(
                f"the weights of block {self.index} were trained with the norms placed {trained!r}, "
                f"this model has {self.placement!r}: the same numbers now mean another function",
                PlacementMismatchWarning,
                stacklevel=2,
            )

    def forward(self, x: Tensor) -> Tensor:
        outer = (self.attention_output_norm, self.mlp_output_norm) if self.placement == "peri" else (None, None)
        branches = (
            Branch(self.attention_norm, self.attention, outer[0], self.drop),
            Branch(self.mlp_norm, self.mlp, outer[1], self.drop),
        )
        return run(x, branches, self.placement, self.index, self.num_layers)

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


class TransformerDecoder(nn.Module):
    """Token and position embedding, a stack of blocks, a final norm, a linear head.

    Args:
        vocab_size, dim, depth, heads: the usual sizes.
        placement: a scheme's name ("pre", "peri", "mix", ...) or a list with one placement a block.
        alpha: the share of Post-LN blocks under "mix".
        norm: "layernorm", "rmsnorm" or a callable ``dim -> module``.
        max_length: longest sequence, the size of the position table.
        tied: the head shares the token table.
        embedding_std: spread of the embedding's start; linear weights start with ``fan_in ** -0.5``.

    Shapes:
        tokens (B, T) int64 -> logits (B, T, vocab_size)

    Raises:
        ValueError: T is longer than ``max_length``, or a placement is unknown.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        heads: int,
        placement: str | Sequence[str] = "pre",
        norm: str | Callable[[int], nn.Module] = "layernorm",
        alpha: float = 0.25,
        max_length: int = 256,
        dropout: float = 0.0,
        tied: bool = False,
        embedding_std: float = 0.632,
        eps: float | None = None,
        output_gain: float = 1.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        placed = resolve(placement, depth, alpha)
        self.max_length = max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                heads,
                placement=place,
                norm=norm,
                causal=causal,
                dropout=dropout,
                eps=eps,
                output_gain=output_gain,
                index=index,
                num_layers=depth,
            )
            for index, place in enumerate(placed)
        )
        self.norm = make_norm(norm, dim, eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        nn.init.normal_(self.position.weight, std=0.1 * embedding_std)
        if "deepnorm" in placed:
            for edit in starting_weights(self, describe(self).stacks[0]):
                edit.do()
        if tied:
            self.head.weight = self.embedding.weight

    @property
    def placement(self) -> list[str]:
        """Where the norms of every block sit."""
        return [block.placement for block in self.blocks if isinstance(block, TransformerBlock)]

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"sequences may have at most max_length={self.max_length} tokens; {length} were given")
        x = self.embedding(tokens) + self.position.weight[:length]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
