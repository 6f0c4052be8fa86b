"""Where a norm can sit around a residual branch, and which layer of a stack gets which place.

pre                 x + f(N(x))
post                N(x + f(x))
peri                x + N_out(f(N(x)))                   Peri-LN, 2025 (arXiv 2502.02732)
output              x + N(f(x))                          OLMo 2
deepnorm            N(a x + f(x)),  a = (2 L)^(1/4)      DeepNet, 2022 (arXiv 2203.00555)
layernorm_scaling   x + f(N(x) / sqrt(i + 1))            LayerNorm Scaling, 2025 (arXiv 2502.05795)
mix                 post in the first quarter of the layers, pre above     Mix-LN, 2024 (arXiv 2412.13795)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SCHEMES = ("pre", "post", "peri", "output", "deepnorm", "layernorm_scaling")


def placements(
    num_layers: int, scheme: str = "mix", alpha: float = 0.25, order: str = "post_pre", n_post: int | None = None
) -> list[str]:
    """The placement of every layer, first to last.

    Args:
        num_layers: the global number of layers L (under pipeline parallelism not the stage's).
        scheme: one of :data:`SCHEMES` for all layers, or "mix".
        alpha: for "mix", the share of Post-LN layers: ``n_post = floor(alpha * L)``.
        order: "post_pre" (Post below, Pre above) or the reverse, "pre_post".
        n_post: the number of Post-LN layers itself, instead of ``alpha``.

    Raises:
        ValueError: unknown scheme or order, alpha outside [0, 1], n_post outside [0, L], fewer than one layer.

    >>> placements(4)
    ['post', 'pre', 'pre', 'pre']
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1; {num_layers} was given")
    if scheme in SCHEMES:
        return [scheme] * num_layers
    if scheme != "mix":
        raise ValueError(f"unknown placement {scheme!r}; choose one of {', '.join((*SCHEMES, 'mix'))}")
    if order not in ("post_pre", "pre_post"):
        raise ValueError(f"order must be 'post_pre' or 'pre_post'; {order!r} was given")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; {alpha} was given")
    if n_post is None:
        n_post = math.floor(alpha * num_layers)
        if n_post == 0 and alpha > 0:
            warnings.warn(
                f"alpha={alpha} of {num_layers} layers gives no Post-LN layer: this is plain Pre-LN", stacklevel=2
            )
    if not 0 <= n_post <= num_layers:
        raise ValueError(f"n_post must lie in [0, {num_layers}]; {n_post} was given")
    post, pre = ["post"] * n_post, ["pre"] * (num_layers - n_post)
    return post + pre if order == "post_pre" else pre + post


def resolve(placement: str | Sequence[str], num_layers: int, alpha: float = 0.25) -> list[str]:
    """A placement for every layer from a scheme's name or from a list with one name a layer (ValueError otherwise)."""
    if isinstance(placement, str):
        return placements(num_layers, placement, alpha)
    listed = list(placement)
    if len(listed) != num_layers:
        raise ValueError(f"a list of placements needs one entry a layer, {num_layers}; {len(listed)} were given")
    for name in listed:
        if name not in SCHEMES:
            raise ValueError(f"unknown placement {name!r}; choose one of {', '.join(SCHEMES)}")
    return listed


def residual(
    x: Tensor,
    f: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor] | None = None,
    placement: str = "pre",
    output_norm: Callable[[Tensor], Tensor] | None = None,
    index: int = 0,
    num_layers: int = 1,
) -> Tensor:
    """One residual branch of the stream ``x`` (..., d): the equations above, for a branch ``f``.

    Args:
        norm: layer norm without parameters by default.
        output_norm: the norm on the branch's output under "peri"; needed where ``norm`` is given, because they are two norms.
        index, num_layers: the layer's global place, for "layernorm_scaling" and "deepnorm".

    Raises:
        ValueError: unknown placement, or "peri" with ``norm`` and without ``output_norm``.
    """
    if norm is None:
        norm = _bare_layer_norm
        output_norm = output_norm or _bare_layer_norm
    if placement == "pre":
        return x + f(norm(x))
    if placement == "post":
        return norm(x + f(x))
    if placement == "peri":
        if output_norm is None:
            raise ValueError("the peri placement needs output_norm, a norm of its own for the branch's output")
        return x + output_norm(f(norm(x)))
    if placement == "output":
        return x + norm(f(x))
    if placement == "deepnorm":
        return norm(torch.add(f(x), x, alpha=(2 * num_layers) ** 0.25))
    if placement == "layernorm_scaling":
        return x + f(norm(x) * (index + 1) ** -0.5)
    raise ValueError(f"unknown placement {placement!r}; choose one of {', '.join(SCHEMES)}")


def _bare_layer_norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])
