"""Peri-LN: normalise what a sub-layer reads and what it adds.

    x <- x + N_out(Attn(N_in(x))),   x <- x + N_out'(MLP(N_in'(x))),   and a final norm before the head

Every branch adds a term of fixed size, so the variance of the stream grows linearly with depth (about 2 a block at unit gain)
where Pre-LN's grows with the weights; the last linear layer of a branch becomes scale invariant, which bounds its gradient.

Kim et al.: Peri-LN: Revisiting Normalization Layer in the Transformer Architecture, 2025 (arXiv 2502.02732). Reach for it when
training from scratch at high rates, in half precision or deep. It changes the function, so a trained model must be retrained;
at small scale and low rates its loss need not be lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from headway.residual.placement import Placement
from headway.residual.transformer import make_norm


@dataclass(frozen=True)
class PeriLN(Placement):
    """Gives every sub-layer of a transformer an output norm before its addition, and an input norm where it had none.

    Args:
        output_gain: start of the output norms' gain g; a branch adds about g^2 of variance.
        norm, eps, copy_gains: see :class:`headway.residual.placement.Placement`.
    """

    scheme: str = field(default="peri", init=False)


class PeriNorm(nn.Module):
    """``x + dropout(N_out(sublayer(N_in(x))))`` around any sub-layer of width ``dim``.

    Of a tuple the first element is normalised and added, the rest is passed on.

    Args:
        sublayer: called as ``sublayer(x, *args, **kwargs)``.
        dim: width of the stream; more than 1 under a layer norm, which maps one channel to zero.
        norm: "rmsnorm", "layernorm" or a callable ``dim -> module``.
        output_gain: start of the output norm's gain.
        dropout: applied after the output norm.

    Shapes:
        (..., dim) -> (..., dim)
    """

    def __init__(
        self,
        sublayer: nn.Module,
        dim: int,
        *,
        norm: str | Callable[[int], nn.Module] = "rmsnorm",
        eps: float | None = None,
        output_gain: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim < 1 or (dim == 1 and norm == "layernorm"):
            raise ValueError(
                f"dim must be at least 1, and at least 2 under a layer norm; dim={dim}, norm={norm!r} were given"
            )
        self.sublayer = sublayer
        self.input_norm = make_norm(norm, dim, eps)
        self.output_norm = make_norm(norm, dim, eps)
        if isinstance(weight := getattr(self.output_norm, "weight", None), nn.Parameter):
            nn.init.constant_(weight, output_gain)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.sublayer(self.input_norm(x), *args, **kwargs)
        if isinstance(out, tuple):
            return (x + self.dropout(self.output_norm(out[0])), *out[1:])
        return x + self.dropout(self.output_norm(out))


_NAMES = {
    # the same key is the MLP's input norm in Llama and the attention's output norm in Gemma 2
    "gemma2": {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "attention_output_norm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "mlp_output_norm",
    },
}


def convert_checkpoint_names(
    state_dict: Mapping[str, Any], from_: str = "gemma2", to: str = "library"
) -> dict[str, Any]:
    """Renames the norms of a state dict between Gemma 2's convention and that of ``hw.apply(llama, hw.PeriLN())``.

    In Llama, and in a Llama that Peri-LN was applied to, ``post_attention_layernorm`` is the MLP's input norm; in Gemma 2 it is
    the attention's output norm. Gemma 2 reads a gain as 1 + weight: gains are shifted by one on the way.

    Raises:
        ValueError: a direction other than gemma2 -> library or library -> gemma2.
    """
    if (from_, to) == ("gemma2", "library"):
        names, shift = _NAMES["gemma2"], 1.0
    elif (from_, to) == ("library", "gemma2"):
        names, shift = {new: old for old, new in _NAMES["gemma2"].items()}, -1.0
    else:
        raise ValueError(f"names are converted between 'gemma2' and 'library'; from_={from_!r}, to={to!r} were given")
    renamed: dict[str, Any] = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        place = next((i for i, part in enumerate(parts) if part in names and "layers" in parts[:i]), None)
        if place is not None:
            parts[place] = names[parts[place]]
            value = value + shift
        elif parts[-2:] == ["norm", "weight"]:
            value = value + shift
        renamed[".".join(parts)] = value
    return renamed
