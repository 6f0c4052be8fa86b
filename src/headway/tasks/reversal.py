"""Text written backwards in another alphabet: a small sequence-to-sequence task whose samples differ widely in length.

    source  (padding ... padding) s_1 s_2 ... s_n          target  p(s_n) ... p(s_2) p(s_1) (padding ... padding)

``p`` is a fixed permutation of the bytes. It stands in for translation where PowerNorm (arXiv 2003.07845) was measured: the
norms of the encoder are exchanged, those of the decoder stay, and more than half of what the encoder sees is padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.batches import Batches
from headway.tasks.task import Task
from headway.tasks.text import StdlibText

START, PADDING = 256, 257
_SHORTEST = 4


class EncoderDecoder(nn.Module):
    """A transformer with an encoder and a decoder, norms in front of every sublayer.

    Norms of the encoder whose ``forward`` takes ``pad_mask`` are told where the padding is.

    Args:
        vocabulary: tokens. dim, depth, heads: width, blocks on either side, attention heads.
        length: the longest source and target.
        norm: makes a norm of the encoder from the width.

    Shapes:
        source: (B, length) and target: (B, T), token numbers; pad: (B, length), True on padding; logits: (B, T, vocabulary).
    """

    def __init__(
        self,
        vocabulary: int = 258,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        length: int = 32,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.source_positions, self.target_positions = nn.Embedding(length, dim), nn.Embedding(length, dim)
        self.encoder = nn.ModuleList(_Block(dim, heads, norm) for _ in range(depth))
        self.encoder_norm = norm(dim)
        self.decoder = nn.ModuleList(_Block(dim, heads, nn.LayerNorm, across=True) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, source: Tensor, pad: Tensor, target: Tensor) -> Tensor:
        x = self.embedding(source) + self.source_positions.weight[: source.shape[1]]
        for block in self.encoder:
            x = block(x, pad)
        memory = _normed(self.encoder_norm, x, pad)
        y = self.embedding(target) + self.target_positions.weight[: target.shape[1]]
        for block in self.decoder:
            y = block(y, None, memory, pad)
        return self.head(self.decoder_norm(y))


class _Block(nn.Module):
    """Attention to itself, to a memory if there is one, and two linear layers; causal if there is one."""

    def __init__(self, dim: int, heads: int, norm: Callable[[int], nn.Module], across: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = norm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        if across:
            self.norm2, self.cross = norm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm3, self.mlp = norm(dim), nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, pad: Tensor | None, memory: Tensor | None = None, memory_pad: Tensor | None = None
    ) -> Tensor:
        y, mask = _normed(self.norm1, x, pad), None
        if memory is not None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(y, y, y, key_padding_mask=pad, attn_mask=mask, need_weights=False)[0]
        if memory is not None:
            y = self.norm2(x)
            x = x + self.cross(y, memory, memory, key_padding_mask=memory_pad, need_weights=False)[0]
        return x + self.mlp(_normed(self.norm3, x, pad))


def _normed(norm: nn.Module, x: Tensor, pad: Tensor | None) -> Tensor:
    if pad is not None and "pad_mask" in inspect.signature(type(norm).forward).parameters:
        return norm(x, pad_mask=pad)
    return norm(x)


class TextReversal(Task):
    """Pieces of the standard library's text, to be written backwards with every byte exchanged for another.

    Args:
        dim, depth, heads: of the transformer. length: of the longest piece; most are far shorter, the shortest has 4 bytes.
        held_out: samples that the measure is taken over.
        norm: makes a norm of the encoder.
    """

    name = "text-reversal"
    metric = "loss"
    batch_size = 32
    budget = "400 steps"
    learning_rate = 2e-3

    def __init__(
        self,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        length: int = 32,
        held_out: int = 256,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        if min(depth, dim, heads, held_out) < 1 or dim % heads or length < _SHORTEST:
            raise ValueError(
                f"{self.name} needs depth, dim, heads and held_out of at least 1, heads that divide dim and a length of at "
                f"least {_SHORTEST}; given depth={depth}, dim={dim}, heads={heads}, held_out={held_out}, length={length}"
            )
        self.dim, self.depth, self.heads, self.length, self.held_out = dim, depth, heads, length, held_out
        self._norm = norm
        self._texts = StdlibText(length=length)
        self._alphabet = torch.randperm(256, generator=torch.Generator().manual_seed(0))

    def model(self, seed: int) -> nn.Module:
        return EncoderDecoder(258, self.dim, self.depth, self.heads, self.length, self._norm)

    def samples(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Source and target, (B, length) each, of the pieces that begin at ``starts``; the place decides the length too."""
        share = (starts * 2654435761 % 2**32).double() / 2**32
        lengths = (_SHORTEST + (self.length - _SHORTEST + 1) * share**3).long()
        places = torch.arange(self.length)
        back = text[starts[:, None] + (lengths[:, None] - 1 - places).clamp(min=0)].long()  # the last byte first
        used = places < lengths[:, None]
        target = torch.where(used, self._alphabet[back], PADDING)
        return torch.where(used, back, PADDING).flip(1), target

    def train_batches(self, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of token numbers (batch_size, length), int64, 257 on padding: in front in the source, behind in the target."""
        text = self._texts.texts()[0]
        return Batches(len(text) - self.length, batch_size, seed, lambda at: self.samples(text, at), epochs=False)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(*self._scored(model, batch))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``loss`` in nats a byte and ``accuracy``, with the true bytes so far given, over samples spread through held-out
        text."""
        text, device = self._texts.texts()[1], next(model.parameters()).device
        starts = torch.linspace(0, len(text) - self.length - 1, self.held_out).long()
        logits, wanted = self._scored(model, tuple(part.to(device) for part in self.samples(text, starts)))  # type: ignore
        right = (logits.argmax(-1) == wanted).double().mean()
        return {"loss": float(F.cross_entropy(logits, wanted).detach()), "accuracy": float(right)}

    def _scored(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and true tokens at the places that are no padding."""
        source, target = batch
        begin = torch.full_like(target[:, :1], START)
        used = target != PADDING
        logits = model(source, source == PADDING, torch.cat((begin, target[:, :-1]), 1))
        return logits[used].float(), target[used]
