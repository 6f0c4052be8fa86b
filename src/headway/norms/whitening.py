"""Group-wise whitening and colouring (GDWCT): the style of an exemplar as channel covariances, without an eigendecomposition.

    z = c - mean(c)                                            per channel, over batch and space
    Sigma_g = z_g z_g^T / (B H W - 1) + eps I                  R_w = mean |Sigma - I|       (whitening: a regulariser, no transformation)
    K_g = MLP(s_g),  d_j = |column j of K_g|,  U = K / d       R_c = mean |U^T U - I|       (colouring factors from a piece of the style)
    y = alpha (X z + mu(s)) + (1 - alpha) c                    X_g = U diag(d) U^T = K_g U^T, symmetric, positive semi-definite

The C channels fall into G groups of n = C / G; X is block-diagonal and is never built: the product of blocks costs 1/G of the dense one.
The regularisers pull the encoder's features towards white and U towards orthogonal, so that X z has the covariance X X^T. Paper:
"Image-to-Image Translation via Group-wise Deep Whitening-and-Coloring Transformation" (Cho et al.), CVPR 2019, arXiv 1812.09912.
In place of AdaIN in exemplar-guided translation, style transfer and conditional generators, where correlations between channels carry the
style; one call changes a model that has AdaIN modules (:mod:`headway.norms.adain`), :mod:`headway.vision.translation` has the paper's
network. Not for style transfer without training (:func:`exact_group_wct`), not where means and variances are enough (AdaIN is cheaper),
not for small batches of small maps (noisy covariances).

With the paper's ``stats="batch"`` the output of an image depends on the others of its batch, in training and in evaluation alike;
``"instance"`` centres every image by itself.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels.blocks import color_blocks
from headway.kernels.planes import together
from headway.norms.coloring import (
    ColoringTarget,
    Everywhere,
    blocked,
    check_groups,
    coloring_factors,
    coloring_matrix,
    coloring_penalty,
    enough_positions,
    exact_group_wct,
    full_precision,
    group_coloring,
    group_covariance,
    group_whitening_penalty,
    pooled_covariance,
    whitening_penalty,
    wide,
)

Stats = Literal["batch", "instance"]
__all__ = [
    "GDWCT",
    "ColoringTarget",
    "GDWCTTerms",
    "coloring_factors",
    "coloring_penalty",
    "exact_group_wct",
    "group_coloring",
    "group_covariance",
    "group_wct",
    "group_whitening_penalty",
    "project_alpha",
    "whitening_penalty",
]


class GDWCTTerms(NamedTuple):
    """What the regularisers of one pass are made of: ``cov`` (G, n, n), Sigma; ``U`` (B, G, n, n), the colouring's unit columns."""

    cov: Tensor
    U: Tensor

    def whitening(self) -> Tensor:
        """R_w, a scalar; the paper weights it by 0.001."""
        return whitening_penalty(self.cov)

    def coloring(self, target: ColoringTarget = "paper") -> Tensor:
        """R_c, a scalar; the paper weights it by 10."""
        return coloring_penalty(self.U, target)


def group_wct(
    content: Tensor,
    K: Tensor,
    mu: Tensor,
    alpha: Tensor,
    stats: Stats = "batch",
    eps: float = 1e-5,
    sync: bool = False,
) -> tuple[Tensor, GDWCTTerms]:
    """y = alpha (X z + mu) + (1 - alpha) c and its terms, from the numbers that the style networks give.

    Args:
        content: c, (B, C, *space). K: (B, G, n, n). mu: (B, C). alpha: ().
        stats, eps, sync: as :class:`GDWCT` has them.

    Raises:
        ValueError: fewer than two positions over batch and space (of an image, with "instance").
    """
    groups, n = K.shape[1], K.shape[2]
    several, x = together(sync), content.flatten(2)
    with full_precision(content):
        mean, count = _means(x, stats, several)
        U, _ = coloring_factors(K)
        # y = c + alpha ((X - I) z + mu - mean): one product, and exactly c where alpha is 0
        change = alpha * (coloring_matrix(K, U) - torch.eye(n, dtype=U.dtype, device=U.device))
        mean = mean.expand(x.shape[:2])
        shift = alpha * (wide(mu) - mean)
        y, products = color_blocks(
            blocked(x, groups), mean.reshape(-1, n), change.to(mean.dtype).flatten(0, 1), shift.reshape(-1, n)
        )
        cov = pooled_covariance(products, groups, count, eps, several)
    return y.view(content.shape), GDWCTTerms(cov, U)


def _means(x: Tensor, stats: Stats, several: bool) -> tuple[Tensor, int]:
    """The means that z is taken from, (1 or B, C), and the positions that Sigma is taken over."""
    count, sums = x.shape[0] * x.shape[2], x.sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
    if several:
        count = int(Everywhere.apply(torch.tensor(count, device=x.device)))  # type: ignore[arg-type]
    enough_positions(count, x)
    if stats == "instance":
        return sums / enough_positions(x.shape[2], x[:1]), count
    total = sums.sum(0, keepdim=True)
    return (Everywhere.apply(total) if several else total) / count, count  # type: ignore[operator]


def mlp(inputs: int, width: int, blocks: int, outputs: int) -> nn.Sequential:
    """Linear layers with LeakyReLU(0.01) between: one from the inputs, ``blocks`` hidden ones, one to the outputs."""
    layers: list[nn.Module] = []
    for before in (inputs, *[width] * blocks):
        layers += [nn.Linear(before, width), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class GDWCT(nn.Module):
    """Gives content features the channel covariances and means that a style vector asks for.

    Args:
        channels: C of the content features.
        style_dim: numbers of the style vector.
        groups: G; each group of channels is coloured by the style's piece of the same place. Fewer groups catch more correlations, for
            more time.
        mlp_dim: width of the colouring network, which all groups share. coloring_blocks, mean_blocks: hidden layers of both networks.
        alpha_init: of alpha, the learned share of the styled features. The forward pass takes alpha as it is: :func:`project_alpha`
            after each optimiser step keeps it between 0 and 1.
        stats: centre by the means of the "batch" (the paper) or of each "instance". Sigma is pooled over the batch in both.
        eps: added to Sigma's diagonal.
        sync: means and Sigma over the batches of all processes of the default group; otherwise of each process.

    Shapes:
        content (B, C, H, W), style (B, style_dim) or (B, style_dim, 1, 1); output (B, C, H, W) and :class:`GDWCTTerms`.

    No state is kept, training and evaluation are the same. NaN goes through. Sigma and the colouring factors are float32 or wider.

    Raises:
        ValueError: a setting out of its range, groups that do not divide C and style_dim, an input of another shape, different batch
            sizes of content and style, fewer than two positions over batch and space (of an image, with "instance").
    """

    def __init__(
        self,
        channels: int,
        style_dim: int,
        groups: int = 8,
        mlp_dim: int = 256,
        coloring_blocks: int = 3,
        mean_blocks: int = 1,
        alpha_init: float = 0.6,
        stats: Stats = "batch",
        eps: float = 1e-5,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_groups(groups, channels=channels, style_dim=style_dim)
        if stats not in ("batch", "instance"):
            raise ValueError(f'stats is "batch" or "instance"; it is {stats!r}')
        if mlp_dim < 1 or min(coloring_blocks, mean_blocks) < 0 or not 0 <= alpha_init <= 1 or eps < 0:
            raise ValueError(
                "mlp_dim is at least 1, coloring_blocks, mean_blocks and eps at least 0, alpha_init between 0 and 1; they are "
                f"{mlp_dim}, {coloring_blocks}, {mean_blocks}, {eps} and {alpha_init}"
            )
        self.channels, self.style_dim, self.groups, self.alpha_init = channels, style_dim, groups, alpha_init
        self.stats: Stats = stats
        self.eps, self.sync, self._warned = eps, sync, False
        self.alpha = nn.Parameter(torch.empty(()))
        self.coloring_net = mlp(style_dim // groups, mlp_dim, coloring_blocks, (channels // groups) ** 2)
        self.mean_net = mlp(style_dim, style_dim, mean_blocks, channels)
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Weights by Kaiming's normal rule, biases 0, alpha to its start."""
        with torch.no_grad():
            self.alpha.fill_(self.alpha_init)
            for linear in (*self.coloring_net, *self.mean_net):
                if isinstance(linear, nn.Linear):
                    nn.init.kaiming_normal_(linear.weight)
                    nn.init.zeros_(linear.bias)

    def forward(self, content: Tensor, style: Tensor) -> tuple[Tensor, GDWCTTerms]:
        style, n = self._check(content, style), self.channels // self.groups
        pieces = style.reshape(len(style) * self.groups, self.style_dim // self.groups)
        K = self.coloring_net(pieces).view(len(style), self.groups, n, n)
        self._warn(content, n)
        return group_wct(content, K, self.mean_net(style), self.alpha, self.stats, self.eps, self.sync)

    def _warn(self, content: Tensor, n: int) -> None:
        count = content.shape[0] * content.shape[2:].numel()
        if not torch.compiler.is_compiling() and 1 < count <= n and not self._warned:
            self._warned = True
            warnings.warn(
                f"covariances of {n} channels from {count} positions are singular: take more groups or larger batches",
                stacklevel=5,
            )

    def _check(self, content: Tensor, style: Tensor) -> Tensor:
        """The style as (B, style_dim)."""
        if content.dim() != 4 or content.shape[1] != self.channels:
            raise ValueError(f"the content is (B, {self.channels}, H, W); its shape is {tuple(content.shape)}")
        flat = style.dim() == 4 and style.shape[2:] == (1, 1)
        if not (style.dim() == 2 or flat) or style.shape[:2] != (content.shape[0], self.style_dim):
            wanted = (content.shape[0], self.style_dim)
            raise ValueError(
                f"the style is {wanted} or {(*wanted, 1, 1)}, as the content; its shape is {tuple(style.shape)}"
            )
        return style.flatten(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        alpha = state_dict.get(f"{prefix}alpha")
        if alpha is not None:  # released as (1,)
            state_dict[f"{prefix}alpha"] = alpha.reshape(())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, style_dim={self.style_dim}, groups={self.groups}, stats={self.stats!r}, eps={self.eps}"
        )


@torch.no_grad()
def project_alpha(model: nn.Module) -> nn.Module:
    """Puts alpha of every :class:`GDWCT` of a model back between 0 and 1; to be called after each optimiser step:

        optimizer.step()
        project_alpha(model)

    Raises:
        ValueError: a model that holds none.
    """
    found = [module for module in model.modules() if isinstance(module, GDWCT)]
    if not found:
        raise ValueError("the model holds no GDWCT, whose alpha could be projected; ReplaceAdaIN() puts them in")
    for module in found:
        module.alpha.clamp_(0, 1)
    return model
