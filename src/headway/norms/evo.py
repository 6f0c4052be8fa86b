"""EvoNorm: one layer for a normalisation and the activation after it, found by evolution over elementary operations.

    B0   y = gamma x / max(sqrt(s2_bwh + eps), v x + sqrt(s2_wh + eps)) + beta
    B1   y = gamma x / max(sqrt(s2_bwh + eps), (x + 1) sqrt(m2_wh + eps)) + beta
    B2   y = gamma x / max(sqrt(s2_bwh + eps), sqrt(m2_wh + eps) - x) + beta
    S0   y = gamma x sigmoid(v x) / sqrt(s2_whg + eps) + beta
    S1   y = gamma x sigmoid(x) / sqrt(s2_whg + eps) + beta
    S2   y = gamma x sigmoid(x) / sqrt(m2_whg + eps) + beta

s2 is a biased variance, m2 a mean of squares; bwh: of a channel over batch and space, wh: of a channel of one sample, whg: of a
group of channels of one sample. No mean is subtracted from x. Liu, Brock, Simonyan, Le: "Evolving Normalization-Activation Layers",
NeurIPS 2020, arXiv 2004.02967. The S series has no batch statistics, so that batches of one to four train as large ones do and no
running buffer or synchronisation is needed; the B series is for large batches. For convolutional nets whose norms are followed by
an activation (residual ones: pre-activation); not for transformers, and not for pretrained weights without training on. Whole
models: :class:`headway.norms.evo_convert.EvoNorm`.

The backward pass is written out and keeps the input alone (batch norm and an activation keep two tensors of that size, and plain
autograd four to five).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from headway.kernels.evo import batch_norm, group_norm
from headway.norms.statistics import RunningStatistics

LinearMode = Literal["affine", "normalize"]


class _EvoNorm(RunningStatistics):
    learns_v: ClassVar[bool] = False
    dims: ClassVar[int | None] = None
    v: Tensor | None

    def __init__(
        self,
        num_features: int,
        apply_act: bool,
        eps: float,
        linear_mode: LinearMode,
        zero_init: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if num_features < 1 or eps <= 0:
            raise ValueError(f"num_features is at least 1 and eps above 0; they are {num_features} and {eps}")
        if linear_mode not in ("affine", "normalize"):
            raise ValueError(f'linear_mode is "affine" or "normalize"; it is {linear_mode!r}')
        self.num_features, self.apply_act, self.eps = num_features, apply_act, eps
        self.linear_mode, self.zero_init, self.sync = linear_mode, zero_init, False
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        has_v = self.learns_v and apply_act
        v = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if has_v else None
        self.register_parameter("v", v)
        self.reset_parameters()

    @property
    def signal_kind(self) -> str:
        """What the probe takes the layer for: an activation, or a norm alone."""
        return "post" if self.apply_act else "norm"

    def reset_parameters(self) -> None:
        """gamma and v to 1 (gamma to 0 with ``zero_init``), beta to 0."""
        with torch.no_grad():
            self.weight.fill_(0 if self.zero_init else 1)
            self.bias.zero_()
            if self.v is not None:
                self.v.fill_(1)

    def _check(self, x: Tensor) -> None:
        right = x.dim() == self.dims if self.dims else x.dim() >= 3
        if not right or x.shape[1] != self.num_features:
            space = "H, W" if self.dims else "*space"
            raise ValueError(
                f"{type(self).__name__} takes (B, {self.num_features}, {space}); the input has shape {tuple(x.shape)}"
            )

    def _affine_only(self) -> bool:
        return not self.apply_act and self.linear_mode == "affine"

    def _affine(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return (self.weight.view(shape) * x + self.bias.view(shape)).to(x.dtype)


class _BatchEvoNorm(_EvoNorm):
    kind: ClassVar[int]
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        unbiased_running: bool = False,
        linear_mode: LinearMode = "affine",
        sync: bool = False,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum, the share of the new batch, lies between 0 and 1; it is {momentum}")
        super().__init__(num_features, apply_act, eps, linear_mode, zero_init, device, dtype)
        self.momentum, self.unbiased_running, self.sync = momentum, unbiased_running, sync
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=wide))

    def reset_statistics(self) -> None:
        """The running variance back to 1."""
        self.running_var.fill_(1)

    @torch.no_grad()
    def _follow(self, variance: Tensor, count: int) -> None:
        if count < 1:
            return
        if self.unbiased_running:
            variance = variance * (count / max(1, count - 1))
        moved = self.running_var.lerp(variance.to(self.running_var.dtype), self.momentum)
        # a batch with NaN or infinity is left out; no value is asked from the device
        self.running_var.copy_(torch.where(torch.isfinite(variance).all(), moved, self.running_var))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self._affine_only():
            return self._affine(x)
        fixed = None if self.training else self.running_var
        sync = self.training and self._together()
        y, variance, count = batch_norm(
            x, self.weight, self.bias, self.v, fixed, self.kind, self.apply_act, self.eps, sync
        )
        if self.training:
            self._follow(variance, count)
        return y

    def extra_repr(self) -> str:
        act = "" if self.apply_act else f", apply_act=False, linear_mode={self.linear_mode!r}"
        return f"{self.num_features}, momentum={self.momentum}, eps={self.eps}{act}"


class _GroupEvoNorm(_EvoNorm):
    centred: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        linear_mode: LinearMode = "affine",
        zero_init: bool = False,
        strict: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, apply_act, eps, linear_mode, zero_init, device, dtype)
        if groups < 1 or (group_size is not None and (group_size < 1 or num_features % group_size)):
            raise ValueError(
                f"groups is at least 1 and group_size divides the {num_features} channels; "
                f"they are {groups} and {group_size}"
            )
        if group_size is None and strict and num_features % groups:
            raise ValueError(f"{groups} groups do not divide {num_features} channels; choose a divisor or strict=False")
        wanted = num_features // group_size if group_size is not None else min(groups, num_features)
        self.groups = next(g for g in range(wanted, 0, -1) if num_features % g == 0)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self._affine_only():
            return self._affine(x)
        size = self.num_features // self.groups * x.shape[2:].numel()
        if self.training and self.centred and size == 1:
            raise ValueError(
                f"{self.groups} groups of {self.num_features} channels at one position leave one number a group, whose "
                "variance is 0; use fewer groups"
            )
        return group_norm(x, self.weight, self.bias, self.v, self.groups, self.centred, self.apply_act, self.eps)

    def extra_repr(self) -> str:
        act = "" if self.apply_act else f", apply_act=False, linear_mode={self.linear_mode!r}"
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}{act}"


class EvoNormB0(_BatchEvoNorm):
    """y = gamma x / max(sqrt(s2_bwh), v x + sqrt(s2_wh)) + beta, each root of a variance + eps.

    Args:
        num_features: channels C.
        apply_act: False leaves the activation out: ``linear_mode`` "affine" is gamma x + beta without any normalisation, as the
            released code has it; "normalize" is gamma x / sqrt(s2_bwh + eps) + beta.
        momentum: the share of the new batch in the running variance (as in ``nn.BatchNorm2d``).
        eps: inside every root, in float32 for half precision.
        unbiased_running: let the running variance follow the unbiased one (timm) instead of the biased one (released code).
        sync: take the batch variance over all processes of the default group, every one of which must run every pass.
        zero_init: gamma starts at 0, for the last layer of a residual branch.

    Shapes:
        input and output: (B, C, *space) with one axis of space at least; ``EvoNorm2dB0`` insists on (B, C, H, W).

    Evaluation divides by the running variance (starting at 1); what is of one sample is always its own. An empty batch, or one with
    NaN or infinity, moves no statistic. Statistics are float32 or wider. A batch of one makes both roots of B0 the same.

    Raises:
        ValueError: a setting out of its range or an input of another shape. NotImplementedError: a second derivative with ``sync``.
    """

    kind, learns_v = 0, True


class EvoNormB1(_BatchEvoNorm):
    """y = gamma x / max(sqrt(s2_bwh), (x + 1) sqrt(m2_wh)) + beta. Arguments, shapes and errors as :class:`EvoNormB0`."""

    kind = 1


class EvoNormB2(_BatchEvoNorm):
    """y = gamma x / max(sqrt(s2_bwh), sqrt(m2_wh) - x) + beta. Arguments, shapes and errors as :class:`EvoNormB0`."""

    kind = 2


class EvoNormS0(_GroupEvoNorm):
    """y = gamma x sigmoid(v x) / sqrt(s2_whg + eps) + beta; the same in training and evaluation.

    Args:
        num_features: channels C.
        groups: groups of neighbouring channels; lowered until it divides C (the attribute ``groups`` says to what), unless
            ``strict``, which refuses instead.
        group_size: channels a group, instead of ``groups``.
        apply_act: False leaves the activation out: ``linear_mode`` "affine" is gamma x + beta without any normalisation, as the
            released code has it; "normalize" is gamma x / sqrt(s2_whg + eps) + beta.
        eps: inside the root, in float32 for half precision.
        zero_init: gamma starts at 0, for the last layer of a residual branch.

    Shapes:
        input and output: (B, C, *space) with one axis of space at least; ``EvoNorm2dS0`` insists on (B, C, H, W).

    A sample's output does not depend on the others of its batch, whatever they hold.

    Raises:
        ValueError: a setting out of its range, an input of another shape, or groups of one number in training.
    """

    learns_v = True


class EvoNormS1(_GroupEvoNorm):
    """y = gamma x sigmoid(x) / sqrt(s2_whg + eps) + beta. Arguments, shapes and errors as :class:`EvoNormS0`."""


class EvoNormS2(_GroupEvoNorm):
    """y = gamma x sigmoid(x) / sqrt(m2_whg + eps) + beta. Arguments, shapes and errors as :class:`EvoNormS0`."""

    centred = False


class EvoNorm2dB0(EvoNormB0):
    """:class:`EvoNormB0` of (B, C, H, W)."""

    dims = 4


class EvoNorm2dB1(EvoNormB1):
    """:class:`EvoNormB1` of (B, C, H, W)."""

    dims = 4


class EvoNorm2dB2(EvoNormB2):
    """:class:`EvoNormB2` of (B, C, H, W)."""

    dims = 4


class EvoNorm2dS0(EvoNormS0):
    """:class:`EvoNormS0` of (B, C, H, W)."""

    dims = 4


class EvoNorm2dS1(EvoNormS1):
    """:class:`EvoNormS1` of (B, C, H, W)."""

    dims = 4


class EvoNorm2dS2(EvoNormS2):
    """:class:`EvoNormS2` of (B, C, H, W)."""

    dims = 4


def no_weight_decay_parameters(model: nn.Module) -> list[nn.Parameter]:
    """gamma, beta and v of every EvoNorm layer: the published recipe leaves them out of weight decay."""
    layers = [module for module in model.modules() if isinstance(module, _EvoNorm)]
    return list({id(p): p for layer in layers for p in layer.parameters()}.values())


def _fits(x: Tensor, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if x.dim() < 3 or (vector is not None and vector.shape != x.shape[1:2]):
            given = None if vector is None else tuple(vector.shape)
            raise ValueError(f"x is (B, C, *space) and {name} (C,); they are {tuple(x.shape)} and {given}")


def evo_norm_b(
    x: Tensor,
    kind: Literal["B0", "B1", "B2"],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    variance: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """B0, B1 or B2 of (B, C, *space) by the batch's own variance, or by ``variance`` (C,) as a constant (evaluation).

    Raises:
        ValueError: another kind, a vector that does not fit, or ``v`` for a layer that has none.
    """
    if kind not in ("B0", "B1", "B2") or (v is not None and kind != "B0"):
        raise ValueError(f"the kinds are B0, B1 and B2, and only B0 takes v; kind is {kind!r}")
    _fits(x, weight=weight, bias=bias, v=v, variance=variance)
    return batch_norm(x, weight, bias, v, variance, int(kind[1]), eps=eps)[0]


def evo_norm_s(
    x: Tensor,
    kind: Literal["S0", "S1", "S2"],
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """S0, S1 or S2 of (B, C, *space); ``groups`` must divide C.

    Raises:
        ValueError: another kind, groups that do not divide C, a vector that does not fit, or ``v`` for a layer that has none.
    """
    if kind not in ("S0", "S1", "S2") or (v is not None and kind != "S0"):
        raise ValueError(f"the kinds are S0, S1 and S2, and only S0 takes v; kind is {kind!r}")
    _fits(x, weight=weight, bias=bias, v=v)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels; it is {groups}")
    return group_norm(x, weight, bias, v, groups, kind != "S2", eps=eps)
