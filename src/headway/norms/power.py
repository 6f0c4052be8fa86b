"""PowerNorm: channels divided by a running quadratic mean, after a per-token scaling of groups of channels.

    u = x / sqrt(mean of x^2 over the token's group + eps)          (group scaling; left out with ``group_num=None``)
    y = weight * z + bias,  z = u / sqrt(phi + eps)                 phi: running mean of mean(u^2) over the tokens
    gradient: a = weight * gy - nu * z,  du = a / sqrt(phi + eps),  nu <- nu + (1 - alpha_bkw) * mean(a * z)

No mean is subtracted. The gradient of the second line is on purpose not its derivative; that of the first one is exact. Paper:
"PowerNorm: Rethinking Batch Normalization in Transformers" (Shen et al.), ICML 2020, arXiv 2003.07845; the group scaling is in all
its released runs. For transformer encoders that are trained with it. Not for steps of very few tokens, models that cannot be
trained on, or strictly causal training: the training statistic mixes positions. Without groups
:class:`headway.norms.fold.FoldNorms` folds it away once it is trained.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway.kernels.channels import power_norm
from headway.kernels.norms import rms_norm
from headway.norms.unified import ChannelStatistics
from headway.surgery import Site


def group_scaling(x: Tensor, num_groups: int, eps: float = 1e-5) -> Tensor:
    """Divides each of ``num_groups`` groups of the last axis by its quadratic mean, token by token.

    With one group it is RMSNorm without a weight.

    Raises:
        ValueError: ``num_groups`` does not divide the last axis.
    """
    if num_groups < 1 or x.shape[-1] % num_groups:
        raise ValueError(f"num_groups {num_groups} must divide the last axis of an input of shape {tuple(x.shape)}")
    return rms_norm(
        x.unflatten(-1, (num_groups, x.shape[-1] // num_groups)), x.shape[-1] // num_groups, eps=eps
    ).flatten(-2)


class GroupScaling(nn.Module):
    """:func:`group_scaling` as a layer.

    Args:
        num_groups: groups of neighbouring channels; must divide the last axis.
        eps: added to the mean square, inside the root.

    Shapes:
        input and output: (..., C).
    """

    def __init__(self, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1; it is {num_groups}")
        self.num_groups, self.eps = num_groups, eps

    def forward(self, x: Tensor) -> Tensor:
        return group_scaling(x, self.num_groups, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, eps={self.eps}"


class PowerNorm(ChannelStatistics):
    """Normalises each channel by a running quadratic mean, with the paper's approximate gradient.

    Args:
        num_features: channels, the size of the last axis.
        eps: added to the mean squares, inside the roots.
        alpha_fwd, alpha_bkw: the share of the statistic of the forward and of the backward pass that is kept at each batch.
        warmup_iters: batches that are normalised by their own statistic before the running one is used.
        group_num: groups of the per-token scaling that comes first; None leaves it out.
        variant: "running" for the method, "v" for the paper's PN-V: the batch's own statistic and its exact gradient,
            for which the settings of the gradient's statistic below and ``alpha_bkw`` have no meaning.
        grad_scale: "running" divides the gradient by the statistic of the forward pass, as the paper does; "batch" by this
            batch's, as the released code does, which grows without bound on a batch that is nearly zero.
        count_padding: let the gradient's mean run over padding too, as the released code does.
        clamp_gamma: hold (1 - alpha_bkw) * mean(z^2) in the recursion of the gradient's statistic at 1 at most. Above 2, where
            a batch is over 20 times larger than the running statistic, the recursion diverges.
        batch_first: False when the input is (T, B, C); the mask is (B, T) either way.
        sync: take the statistics over the batches of all processes of the default group, so that they stay equal. Every
            process must then run every pass, forward and backward. Without a process group it changes nothing.

    Shapes:
        input and output: (B, T, C), (T, B, C) or (N, C); pad_mask: (B, T) or (N,), True on padding, which then moves no statistic.

    A batch that holds NaN or infinity, no token, or padding alone moves no statistic. The statistics are float32 or wider; half
    precision input is computed in float32. Every training pass counts as one batch, also within gradient accumulation.

    Raises:
        ValueError: a setting out of its range, another last axis than ``num_features``, or a mask that does not fit.
    """

    running_phi: Tensor
    ema_gz: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        warmup_iters: int = 4000,
        group_num: int | None = 1,
        variant: Literal["running", "v"] = "running",
        grad_scale: Literal["running", "batch"] = "running",
        count_padding: bool = False,
        clamp_gamma: bool = False,
        batch_first: bool = True,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, sync, device, dtype)
        for name, alpha in (("alpha_fwd", alpha_fwd), ("alpha_bkw", alpha_bkw)):
            if not 0 <= alpha <= 1:
                raise ValueError(f"{name} must lie between 0 and 1; it is {alpha}")
        if group_num is not None and (group_num < 1 or num_features % group_num):
            raise ValueError(f"group_num {group_num} must divide num_features {num_features}")
        if variant not in ("running", "v"):
            raise ValueError(f'variant must be "running" or "v"; it is {variant!r}')
        if grad_scale not in ("running", "batch"):
            raise ValueError(f'grad_scale must be "running" or "batch"; it is {grad_scale!r}')
        self.alpha_fwd, self.alpha_bkw, self.warmup_iters = alpha_fwd, alpha_bkw, warmup_iters
        self.group_num, self.variant, self.grad_scale = group_num, variant, grad_scale
        self.count_padding, self.clamp_gamma, self.batch_first = count_padding, clamp_gamma, batch_first
        self._add_statistic("running_phi", 1.0)
        self._add_statistic("ema_gz", 0.0)

    def reset_statistics(self) -> None:
        """Back to the state before the first batch, so that warm-up runs again (before fine-tuning, say)."""
        self.running_phi.fill_(1)
        self.ema_gz.zero_()
        self.iters.zero_()

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The two vectors (s, b) with which the layer in evaluation is ``s * u + b``; u is the input where there are no groups."""
        return self._scale_shift(self.running_phi)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if pad_mask is not None and not self.batch_first and pad_mask.dim() == 2:
            pad_mask = pad_mask.transpose(0, 1)
        self._check(x, pad_mask)
        groups, exact = self.group_num or 0, self.variant == "v"
        if not self.training:
            return self._fixed(x, "running_phi", groups)
        return power_norm(
            x,
            self.weight,
            self.bias,
            pad_mask,
            (self.running_phi, self.iters, self.ema_gz),
            groups=groups,
            warmup=self.warmup_iters,
            alpha_fwd=self.alpha_fwd,
            alpha_bkw=self.alpha_bkw,
            eps=self.eps,
            batch_forward=exact,
            batch_gradient=self.grad_scale == "batch",
            exact=exact,
            count_padding=self.count_padding,
            clamp_gamma=self.clamp_gamma,
            sync=self._together(),
            moves=self._frozen == 0,
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, group_num={self.group_num}, warmup_iters={self.warmup_iters}, eps={self.eps}"

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        site: Site | None = None,
        group_num: int | Literal["heads"] | None = 1,
        **settings: Any,
    ) -> PowerNorm | None:
        """The norm with the very parameters of a LayerNorm over the last axis and its own ``eps``; None for anything else.

        ``group_num="heads"`` takes the number of attention heads from the configuration of the model.

        Raises:
            ValueError: the number of heads is asked for and the model has none in its configuration.
        """
        if group_num == "heads":
            config = None if site is None else getattr(site.model, "config", None)
            heads = getattr(config, "num_attention_heads", None)
            if not isinstance(heads, int):
                raise ValueError(
                    'group_num="heads" needs a model whose config has num_attention_heads; give the number instead'
                )
            group_num = heads
        return cls._from_layer_norm(module, group_num=group_num, **settings)
