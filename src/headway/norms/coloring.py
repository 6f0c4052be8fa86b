"""Covariances of groups of channels, what pulls them to the identity, and the matrices that colour white features.

The equations of group-wise whitening and colouring (Cho et al., 2019, arXiv 1812.09912) as functions of tensors, and the transformation
by eigendecomposition that they do without. The layer made of them: :mod:`headway.norms.whitening`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from headway.kernels.blocks import block_gram, block_product

ColoringTarget = Literal["paper", "released"]
_TINY = 1e-8


class Everywhere(torch.autograd.Function):
    """The sum over all processes; every process adds its own gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return Everywhere.apply(grads[0])  # type: ignore[return-value]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)


def check_groups(groups: int, **channels: int) -> None:
    for name, count in channels.items():
        if groups < 1 or count < 1 or count % groups:
            raise ValueError(f"groups must divide {name}; they are {groups} and {count}")


def _check_features(**features: Tensor) -> None:
    for name, x in features.items():
        if x.dim() < 3:
            raise ValueError(f"{name} is (B, C, *space) with one axis of space at least; its shape is {tuple(x.shape)}")


def _check_blocks(K: Tensor) -> None:
    if K.dim() < 2 or K.shape[-1] != K.shape[-2]:
        raise ValueError(f"K holds square blocks, (..., n, n); its shape is {tuple(K.shape)}")


def blocked(x: Tensor, groups: int) -> Tensor:
    """(B, C, P) as (B * G, n, P), without a copy."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, x.shape[2])


def pooled_covariance(products: Tensor, groups: int, count: int, eps: float, several: bool = False) -> Tensor:
    """Sigma (G, n, n) from the products z z^T of every image's groups, (B G, n, n), over ``count`` positions."""
    n = products.shape[1]
    total = products.view(-1, groups, n, n).sum(0)
    if several:
        total = Everywhere.apply(total)
    return total / (count - 1) + eps * torch.eye(n, dtype=products.dtype, device=products.device)  # type: ignore[operator]


def group_covariance(z: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Sigma of (B, C, *space), pooled over batch and space: (G, n, n), float32 or wider. ``z`` need not be centred.

    Raises:
        ValueError: groups that do not divide C, no axis of space, or fewer than two positions in the batch.
    """
    _check_features(z=z)
    check_groups(groups, C=z.shape[1])
    with full_precision(z):
        x = wide(z).flatten(2)
        count = enough_positions(x.shape[0] * x.shape[2], z)
        z = x - x.mean((0, 2), keepdim=True)
        return pooled_covariance(block_gram(blocked(z, groups)), groups, count, eps)


def enough_positions(count: int, x: Tensor) -> int:
    if count < 2:
        raise ValueError(
            f"a covariance needs two positions at least over batch and space; the features have the shape {tuple(x.shape)}"
        )
    return count


def whitening_penalty(cov: Tensor) -> Tensor:
    """R_w: the mean over entries of \\|cov - I\\|, a scalar."""
    return (cov - torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)).abs().mean()


def group_whitening_penalty(z: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """R_w of features (B, C, *space): how far the covariances of their groups are from the identity. Errors: :func:`group_covariance`."""
    return whitening_penalty(group_covariance(z, groups, eps))


def coloring_penalty(U: Tensor, target: ColoringTarget = "paper") -> Tensor:
    """R_c of unit columns U (..., n, n): the mean over entries of \\|U^T U - I\\|.

    The released training loop takes \\|U - I\\| instead (``target="released"``), which pulls X towards a diagonal: AdaIN.

    Raises:
        ValueError: another target.
    """
    if target not in ("paper", "released"):
        raise ValueError(f'the target is "paper" or "released"; it is {target!r}')
    with full_precision(U):
        return whitening_penalty(U.mT @ U if target == "paper" else U)


def coloring_factors(K: Tensor) -> tuple[Tensor, Tensor]:
    """U (..., n, n) with unit columns and the columns' norms d (..., n) of K = U diag(d), float32 or wider.

    1e-8 is added to the norms, so that a column of zeros has a finite gradient.

    Raises:
        ValueError: blocks that are not square.
    """
    _check_blocks(K)
    K = wide(K)
    # a norm's gradient at zero is zero, a root's is not a number
    d = torch.linalg.vector_norm(K, dim=-2) + _TINY
    return K / d.unsqueeze(-2), d


def coloring_matrix(K: Tensor, U: Tensor) -> Tensor:
    """X = U diag(d) U^T."""
    return wide(K) @ U.mT


def group_coloring(z: Tensor, K: Tensor) -> Tensor:
    """X z, group by group: features whose covariance is the identity get X X^T, with X = U diag(d) U^T of K = U diag(d).

    Args:
        z: (B, C, *space).
        K: (B, G, n, n) with G n = C.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_features(z=z)
    _check_blocks(K)
    if K.dim() != 4 or K.shape[0] != z.shape[0] or K.shape[1] * K.shape[2] != z.shape[1]:
        raise ValueError(f"K is (B, G, n, n) for z (B, G n, *space); they are {tuple(K.shape)} and {tuple(z.shape)}")
    with full_precision(z):
        X = coloring_matrix(K, coloring_factors(K)[0]).to(z.dtype).flatten(0, 1)
        return block_product(X, blocked(z.flatten(2), K.shape[1])).reshape(z.shape)


def exact_group_wct(content: Tensor, style_feat: Tensor, groups: int = 1, eps: float = 1e-5) -> Tensor:
    """Whitening and colouring by eigendecomposition: content features with the mean and the group covariances of style features.

    Every image of the batch is paired with its own exemplar. For use without training, and as the reference for the learned layer: the
    decomposition is slow, and its gradient unstable where eigenvalues lie close to each other.

    Args:
        content, style_feat: (B, C, *space), whose spaces may differ.
        groups: groups of channels; 1 is the ordinary transformation.
        eps: added to the eigenvalues of the content's covariance.

    Raises:
        ValueError: shapes that do not fit, groups that do not divide C, or an image of fewer than two positions.
    """
    _check_features(content=content, style_feat=style_feat)
    check_groups(groups, C=content.shape[1])
    if content.shape[:2] != style_feat.shape[:2]:
        raise ValueError(
            f"content and style_feat have the same B and C; they are {tuple(content.shape)} and {tuple(style_feat.shape)}"
        )
    with full_precision(content):
        z, _, whiten = _root(content, groups, lambda values: (values.clamp(min=0) + eps).rsqrt())
        _, mean, color = _root(style_feat, groups, lambda values: values.clamp(min=0).sqrt())
        y = block_product(color @ whiten, z).view(*content.shape[:2], -1) + mean
        return y.reshape(content.shape).to(content.dtype)


def _root(x: Tensor, groups: int, of_values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Centred blocks (B G, n, P), means (B, C, 1), and V f(w) V^T of the blocks' covariances V w V^T."""
    x = wide(x).flatten(2)
    mean = x.mean(2, keepdim=True)
    z = blocked(x - mean, groups)
    values, vectors = torch.linalg.eigh(block_gram(z) / (enough_positions(x.shape[2], x[:1]) - 1))
    return z, mean, vectors * of_values(values).unsqueeze(-2) @ vectors.mT
