"""Region normalisation: pixels inside a hole and outside it are normalised apart, by the mean and variance of their own region.

    n = sum over r of  r (x - mu_r) / sqrt(var_r + e),    r in {m, 1 - m},  m = 1 in the hole
    RN-B   y = m ((1 + gamma_h) n + beta_h) + (1 - m) ((1 + gamma_v) n + beta_v)                 a mask is given
    RN-L   I = sigmoid(conv([mean_c x; max_c x])),  m = (I >= t),  y = (1 + conv(I)) n + conv(I)  the layer finds it itself

The filled pixels of a hole drag the statistics of every feature map, so that an ordinary norm shifts the valid ones by an amount that
depends on the hole. Yu et al., "Region Normalization for Image Inpainting", AAAI 2020, arXiv 1911.10375. RN-B belongs into the first
layers of a network whose input has known invalid pixels (inpainting, sensor dropouts, tiles without data), RN-L into later ones, where
holes are partly filled; :class:`headway.norms.region_convert.RegionNorm` puts both into a model you have. Not for unmasked images, nor
where a network never sees invalid pixels. A threshold of 0.8 flags next to nothing at first: RN-L starts as a norm of the whole plane.

Statistics are a sample's own, as the paper defines them, in training and evaluation alike. ``stats="batch"`` is the released code: an
image's output then depends on the others of its batch, also in evaluation; its authors find that sharper on data like the training
data, and blurrier and more biased elsewhere. The backward pass is written out and keeps the input and the mask alone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway.kernels.planes import together
from headway.kernels.region import channel_pool
from headway.kernels.region import region_norm as _region_norm
from headway.kernels.stencil import StencilConv2d
from headway.norms.holes import TakesMask, fitting, hole_of
from headway.surgery import Site

Statistics = Literal["instance", "batch"]
EpsMode = Literal["plain", "released"]
AffineMode = Literal["paper", "released"]
_STAND_IN_FOR = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)


def _settings(stats: str, eps: float, eps_mode: str) -> dict[str, Any]:
    if stats not in ("instance", "batch"):
        raise ValueError(f'stats is "instance" or "batch"; it is {stats!r}')
    if eps_mode not in ("plain", "released"):
        raise ValueError(f'eps_mode is "plain" or "released"; it is {eps_mode!r}')
    if eps <= 0:
        raise ValueError(f"eps is above 0; it is {eps}")
    return {"batch": stats == "batch", "eps": eps, "released": eps_mode == "released"}


def _check(x: Tensor, channels: int | None = None) -> None:
    if x.dim() != 4 or (channels is not None and x.shape[1] != channels) or not x.is_floating_point():
        raise ValueError(f"the input must be floating, (B, {channels or 'C'}, H, W); it is {x.dtype} {tuple(x.shape)}")


def region_norm(
    x: Tensor,
    mask: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stats: Statistics = "instance",
    eps: float = 1e-5,
    eps_mode: EpsMode = "plain",
    soft: bool = False,
) -> Tensor:
    """Normalises each pixel by its region's mean and variance, then ``n * scale + shift``.

    Args:
        x: (B, C, H, W).
        mask: (B, h, w) or (B, 1, h, w), True or 1 in the hole; resized to (H, W) by nearest neighbour.
        scale, shift: (C,), one a channel; (2, C), those of the hole and of the valid pixels; or what broadcasts to x with four axes,
            such as (B, 1, H, W).
        stats: over each sample's own pixels, or over those of the "batch".
        eps: added to the variance; "released" takes eps times all pixels over the region's, so that a small region has a large one.
        soft: the mask holds weights from 0 to 1.

    A region without a pixel adds nothing, one of a single pixel is 0 there. Half precision is computed in float32.

    Raises:
        ValueError: another shape, a mask that holds other values, or a setting that does not exist.
    """
    _check(x)
    settings = _settings(stats, eps, eps_mode)
    hole = fitting(hole_of(mask, soft), x)
    kinds = {_kind(given, x) for given in (scale, shift) if given is not None}
    if kinds <= {"vectors"}:
        gains, offsets = ((None, None) if v is None else v.expand(2, v.shape[-1]).unbind() for v in (scale, shift))
        return _region_norm(x, hole, (gains[0], offsets[0]), (gains[1], offsets[1]), **settings)
    if kinds == {"pixels"}:
        size = (x.shape[0], 1, *x.shape[2:])
        gain, offset = (None if p is None else p.expand(size) for p in (scale, shift))
        return _region_norm(x, hole, pixel=(gain, offset), **settings)
    n = _region_norm(x, hole, **settings)
    n = n if scale is None else n * _spread(scale, hole)
    return (n if shift is None else n + _spread(shift, hole)).to(x.dtype)


def _kind(given: Tensor, x: Tensor) -> Literal["vectors", "pixels", "any"]:
    """Numbers a region and channel, numbers a pixel, or something else that broadcasts."""
    channels = x.shape[1]
    if given.dim() == 4 and all(n in (1, m) for n, m in zip(given.shape, x.shape, strict=True)):
        return "pixels" if given.shape[1] == 1 else "any"
    if given.shape in ((channels,), (2, channels)):
        return "vectors"
    raise ValueError(
        f"scale and shift are ({channels},), (2, {channels}) or broadcast to {tuple(x.shape)} with four axes; one has the shape "
        f"{tuple(given.shape)}"
    )


def _spread(given: Tensor, hole: Tensor) -> Tensor:
    """A scale or shift of any kind as something that broadcasts to the input."""
    if given.dim() == 4:
        return given
    inside, outside = given.expand(2, given.shape[-1])[:, :, None, None].unbind()
    marks = hole[:, None]
    return torch.where(marks, inside, outside) if hole.dtype == torch.bool else marks * inside + (1 - marks) * outside


class RegionNormB2d(TakesMask):
    """RN-B: the regions are given by a mask, and each has a gain 1 + gamma and an offset beta of its own a channel.

    Args:
        num_features: channels C.
        stats: over each sample's own pixels ("instance"), or over those of the batch, also in evaluation ("batch").
        eps: added to the variance.
        eps_mode: "plain", or "released": eps times all pixels over the region's.
        affine_mode: "paper"; or "released", which adds both offsets at every pixel.
        hole_value: what a mask holds in the hole, 1 or 0.
        soft: take masks of weights from 0 to 1.
        sync: with ``stats="batch"``, statistics over all processes of the default group, every one of which must run every pass.

    Shapes:
        input and output: (B, C, H, W); mask: (B, h, w) or (B, 1, h, w), resized by nearest neighbour.

    NaN in a hole reaches no valid pixel. State of the released code (foreground_*, background_*) loads.

    Raises:
        ValueError: a setting that does not exist, another shape, or a mask with other values.
        RuntimeError: neither an argument nor :func:`headway.norms.holes.region_mask` gives a mask.
    """

    hole_gamma: nn.Parameter
    hole_beta: nn.Parameter
    valid_gamma: nn.Parameter
    valid_beta: nn.Parameter
    looks_for = "nn.InstanceNorm2d, nn.BatchNorm2d"

    def __init__(
        self,
        num_features: int,
        stats: Statistics = "instance",
        eps: float = 1e-5,
        eps_mode: EpsMode = "plain",
        affine_mode: AffineMode = "paper",
        hole_value: int = 1,
        soft: bool = False,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _settings(stats, eps, eps_mode)
        if num_features < 1 or hole_value not in (0, 1):
            raise ValueError(f"num_features is at least 1 and hole_value 0 or 1; they are {num_features}, {hole_value}")
        if affine_mode not in ("paper", "released"):
            raise ValueError(f'affine_mode is "paper" or "released"; it is {affine_mode!r}')
        if sync and (stats != "batch" or soft):
            raise ValueError('sync=True is for stats="batch" with binary masks: nothing else is shared by processes')
        self.num_features, self.stats, self.eps, self.eps_mode = num_features, stats, eps, eps_mode
        self.affine_mode, self.hole_value, self.soft, self.sync = affine_mode, int(hole_value), soft, sync
        for name in ("hole_gamma", "hole_beta", "valid_gamma", "valid_beta"):
            self.register_parameter(name, nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)))

    def reset_parameters(self) -> None:
        """All four to 0: gains of 1 and no offset."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        _check(x, self.num_features)
        return _region_norm(
            x,
            self.hole(x, mask),
            (self.hole_gamma, self.hole_beta),
            (self.valid_gamma, self.valid_beta),
            unit=1.0,
            shared=self.affine_mode == "released",
            sync=together(self.sync),
            **_settings(self.stats, self.eps, self.eps_mode),
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("gamma", "beta"):
            for ours, released in (("hole", "foreground"), ("valid", "background")):
                if (found := state_dict.pop(f"{prefix}{released}_{name}", None)) is not None:
                    state_dict[f"{prefix}{ours}_{name}"] = found
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.num_features}, stats={self.stats!r}, eps={self.eps}, affine_mode={self.affine_mode!r}"

    @classmethod
    def from_module(cls, module: nn.Module, *, site: Site | None = None, **settings: Any) -> RegionNormB2d | None:
        """The layer with the gain and offset of a 2d batch or instance norm in both regions; None for anything else."""
        if not isinstance(module, _STAND_IN_FOR):
            return None
        new = cls(module.num_features, **{"eps": module.eps, **settings})
        if module.weight is not None:
            # where both offsets are added everywhere, each is half of it
            offset = module.bias.detach() * (0.5 if new.affine_mode == "released" else 1.0)
            for region in ("hole", "valid"):
                setattr(new, f"{region}_gamma", nn.Parameter(module.weight.detach() - 1))
                setattr(new, f"{region}_beta", nn.Parameter(offset.clone()))
        return new


class RegionNormL2d(nn.Module):
    """RN-L: the layer finds the regions itself, and its gain and offset are one a pixel, for all channels.

    Args:
        num_features: channels C of the input.
        threshold: a pixel whose importance is at least this belongs to the one region, the others to the other.
        kernel_size: of the three convolutions, 7 or 3.
        stats: over each sample's own pixels ("instance"), or over those of the batch, also in evaluation ("batch").
        eps: added to the variance.
        eps_mode: "plain", or "released": eps times all pixels over the region's.
        sync: with ``stats="batch"``, statistics over all processes of the default group, every one of which must run every pass.

    Shapes:
        input and output: (B, C, H, W).

    No gradient goes through the threshold: the convolution that finds the regions learns through the gain and the offset alone.
    ``last_region`` (B, 1, H, W) bool is what the last pass flagged. State of the released code (sa.*) loads.

    Raises:
        ValueError: a setting out of its range, or another shape.
    """

    last_region: Tensor | None
    looks_for = RegionNormB2d.looks_for

    def __init__(
        self,
        num_features: int,
        threshold: float = 0.8,
        kernel_size: int = 7,
        stats: Statistics = "instance",
        eps: float = 1e-5,
        eps_mode: EpsMode = "plain",
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _settings(stats, eps, eps_mode)
        if num_features < 1 or kernel_size not in (3, 7):
            raise ValueError(
                f"num_features is at least 1 and kernel_size 3 or 7; they are {num_features}, {kernel_size}"
            )
        if sync and stats != "batch":
            raise ValueError('sync=True is for stats="batch": nothing else is shared by processes')
        self.num_features, self.threshold, self.kernel_size = num_features, threshold, kernel_size
        self.stats, self.eps, self.eps_mode, self.sync = stats, eps, eps_mode, sync
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.importance_conv = StencilConv2d(2, kernel_size, bias=False, **made)
        self.gamma_conv = StencilConv2d(1, kernel_size, **made)
        self.beta_conv = StencilConv2d(1, kernel_size, **made)
        self.last_region = None

    def reset_parameters(self) -> None:
        """The convolutions as torch starts them."""
        for conv in (self.importance_conv, self.gamma_conv, self.beta_conv):
            conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        _check(x, self.num_features)
        x, pooled = channel_pool(x)
        importance = torch.sigmoid(self.importance_conv(pooled))
        region = importance.detach() >= self.threshold
        self.last_region = region
        return _region_norm(
            x,
            region[:, 0],
            pixel=(self.gamma_conv(importance), self.beta_conv(importance)),
            unit=1.0,
            sync=together(self.sync),
            **_settings(self.stats, self.eps, self.eps_mode),
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for ours, released in (("importance_conv", "conv1"), ("gamma_conv", "gamma_conv"), ("beta_conv", "beta_conv")):
            for kind in ("weight", "bias"):
                if (found := state_dict.pop(f"{prefix}sa.{released}.{kind}", None)) is not None:
                    state_dict[f"{prefix}{ours}.{kind}"] = found
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_region": None}

    def extra_repr(self) -> str:
        return f"{self.num_features}, threshold={self.threshold}, stats={self.stats!r}, eps={self.eps}"

    @classmethod
    def from_module(cls, module: nn.Module, *, site: Site | None = None, **settings: Any) -> RegionNormL2d | None:
        """The layer in the place of a 2d batch or instance norm, whose gain and offset it has no room for; None for anything else."""
        if not isinstance(module, _STAND_IN_FOR):
            return None
        return cls(module.num_features, **{"eps": module.eps, **settings})
