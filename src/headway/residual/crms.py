"""Modules for a residual stream that is kept without its last channel (Pre-CRMSNorm).

The stream has mean zero, so its last channel is minus the sum of the others, and d - 1 numbers hold all of it. A norm whose
readers are linear maps becomes :class:`headway.norms.rms.CRMSNorm`; where the full width is wanted again (the output of a
backbone) it is :class:`CompletingRMSNorm`. The heads of an attention keep their number and size: only what it reads and writes is
narrower, which ``nn.MultiheadAttention`` cannot express and :class:`NarrowAttention` can. Paper: arXiv 2305.14858.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.norms import rms_norm


class CompletingRMSNorm(nn.Module):
    """RMS norm of a stream kept without its last channel, at the full width: ``RMS0([z, -sum z]) * weight + bias``.

    Args:
        normalized_shape: d, the channels of the output.
        eps: as in the norm it stands for.
        weight, bias: the parameters of that norm, of d numbers, or None.

    Shapes:
        (..., d - 1) -> (..., d)
    """

    def __init__(
        self, normalized_shape: int, eps: float, weight: nn.Parameter | None = None, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (normalized_shape,), eps
        self.weight, self.bias = weight, bias

    def forward(self, z: Tensor) -> Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        whole = torch.cat([wide, -wide.sum(-1, keepdim=True)], -1).to(z.dtype)
        return rms_norm(whole, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class NarrowAttention(nn.Module):
    """``nn.MultiheadAttention`` that reads and writes a stream of another width than its heads have together.

    Args:
        like: the attention whose heads, dropout and layout it keeps.
        weights: "q", "k", "v": (weight, bias) of the three projections; "out": those of the output projection.

    Shapes:
        as ``nn.MultiheadAttention``, the query (and the output) with the width of the narrow stream.
    """

    def __init__(self, like: nn.MultiheadAttention, weights: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = like.num_heads, like.head_dim, like.dropout
        self.batch_first, self.add_zero_attn, self.embed_dim = like.batch_first, like.add_zero_attn, like.embed_dim
        self._qkv_same_embed_dim = False
        self.bias_k, self.bias_v = like.bias_k, like.bias_v
        # torch's layers look at it to choose their fused path, which this attention does not have
        self.in_proj_bias = None
        for name, (weight, bias) in weights.items():
            layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(weight, like.out_proj.weight.requires_grad)
            layer.bias = None if bias is None else nn.Parameter(bias, like.out_proj.weight.requires_grad)
            self.add_module(f"{name}_proj", layer)
        self.train(like.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        layers: Any = self
        single = query.dim() == 2
        q, k, v = (layer(x) for layer, x in ((layers.q_proj, query), (layers.k_proj, key), (layers.v_proj, value)))
        if single:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        batch, length, width = q.shape
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(batch, 1, width)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(batch, 1, width)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(batch, 1, width)], 1) for x in (k, v))
        q, k, v = (x.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[2], single)
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            y = F.dropout(weights, drop) @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if single else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, drop)
        y = layers.out_proj(y.transpose(1, 2).reshape(batch, length, width))
        if single:
            return y[0], weights
        return y if self.batch_first else y.transpose(0, 1), weights

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int, single: bool) -> Tensor | None:
        """Both masks as one that is added to the scores: (batch, heads or 1, queries or 1, keys)."""
        parts = []
        for given, shape in (
            (mask, lambda m: m if m.dim() == 2 else m.view(q.shape[0], self.num_heads, *m.shape[1:])),
            (padding, lambda m: (m[None] if single else m)[:, None, None]),
        ):
            if given is None:
                continue
            if given.dtype == torch.bool:
                given = torch.zeros_like(given, dtype=q.dtype).masked_fill_(given, float("-inf"))
            laid = shape(given.to(q.dtype))
            # keys of the module's own stand behind the given ones and are always seen
            parts.append(F.pad(laid, (0, keys - laid.shape[-1])))
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


def narrow_attention(
    attention: nn.MultiheadAttention, changed: Callable[[str], Any], cut: tuple[bool, bool, bool], out: tuple
) -> NarrowAttention:
    """The narrow twin of an attention.

    Args:
        changed: gives a parameter of the attention after what was folded into it.
        cut: whether query, key and value come from the stream that is one channel short.
        out: weight and bias of the new output projection.
    """
    if attention.in_proj_weight is not None:
        weights = changed("in_proj_weight").detach().chunk(3)
    else:
        weights = [changed(f"{name}_proj_weight").detach() for name in "qkv"]
    bias = changed("in_proj_bias")
    biases = (None, None, None) if bias is None else bias.detach().chunk(3)
    parts = {}
    for name, weight, shift, short in zip("qkv", weights, biases, cut, strict=True):
        wide = weight.double()
        if short:
            wide = wide[:, :-1] - wide[:, -1:]
        parts[name] = wide.to(weight.dtype).contiguous(), None if shift is None else shift.clone()
    return NarrowAttention(attention, {**parts, "out": out})
