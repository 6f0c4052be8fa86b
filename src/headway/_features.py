"""What a frozen or copied encoder says of a sample, whatever shape its answer has."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def features_of(out: Any) -> Tensor:
    """Features (n, d) in what an encoder returned: (n, d), (n, tokens, d) averaged over tokens, (n, c, h, w) flattened, the first
    of a tuple, or a Hugging Face output with ``pooler_output`` or ``last_hidden_state``.

    Raises:
        ValueError: there is no such thing in it.
    """
    for name in ("pooler_output", "last_hidden_state"):
        if not isinstance(out, Tensor) and getattr(out, name, None) is not None:
            out = getattr(out, name)
    if isinstance(out, tuple | list):
        out = out[0]
    if not isinstance(out, Tensor) or out.dim() < 2:
        raise ValueError(
            "the model gives no features (n, d) or (n, tokens, d); pass the encoder, not the loss or the text head"
        )
    return out if out.dim() == 2 else out.mean(1) if out.dim() == 3 else out.flatten(1)
