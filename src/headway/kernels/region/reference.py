"""Plain torch bodies of the region operators: the truth that ``csrc/region.cpp`` is tested against.

x is (samples, channels, *space) and the mask (samples, *space): True in the hole, or the hole's weight from 0 to 1. Statistics are
(3, 2, groups) float64: mean, 1 / sqrt(var + eps) and 1 / pixels of hole and valid, a group being a plane, or with ``batch`` a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that is computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def planes(x: Tensor) -> Tensor:
    """(samples, channels, space) in the type that is computed in."""
    return x.reshape(*x.shape[:2], x.shape[2:].numel()).to(wide(x.dtype))


def regions(mask: Tensor, like: Tensor) -> Tensor:
    """(2, samples, 1, space): the weight of every pixel in the hole and outside."""
    hole = mask.flatten(1).to(like.dtype)
    return torch.stack([hole, 1 - hole])[:, :, None]


def _inside(region: Tensor, values: Tensor) -> Tensor:
    """Values weighted by a region: selected where it is 0, so that NaN stays out."""
    return torch.where(region > 0, region * values, 0)


def _dims(batch: bool) -> tuple[int, ...]:
    return (1, 3) if batch else (3,)


def moments(a: Tensor, region: Tensor, batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (2, samples or 1, channels, 1) and pixels (2, samples or 1, 1, 1) of both regions, in two passes."""
    dims = _dims(batch)
    pixels = region.sum(dims, keepdim=True)
    count = pixels.where(pixels > 0, 1)
    mean = _inside(region, a).sum(dims, keepdim=True) / count
    # what the rounded mean leaves over is put right
    mean = mean + _inside(region, a - mean).sum(dims, keepdim=True) / count
    var = _inside(region, (a - mean).square()).sum(dims, keepdim=True) / count
    return mean, var, pixels


def _inverse_root(var: Tensor, pixels: Tensor, total: Tensor | float, eps: float, released: bool) -> Tensor:
    count = pixels.where(pixels > 0, 1)
    return torch.rsqrt(var + (eps * (total / count) if released else eps))


def statistics_of(
    mean: Tensor, var: Tensor, pixels: Tensor, total: Tensor | float, eps: float, released: bool
) -> Tensor:
    """Statistics from moments (2, groups); ``total``: pixels of both regions."""
    count = pixels.where(pixels > 0, 1)
    return torch.stack([mean, _inverse_root(var, pixels, total, eps, released), (1 / count).expand_as(mean)]).double()


def _spread(statistic: Tensor, a: Tensor, batch: bool) -> Tensor:
    """(2, groups) as (2, samples or 1, channels, 1)."""
    return statistic.to(a.dtype).reshape(2, 1 if batch else a.shape[0], a.shape[1], 1)


def _vectors(hole: Tensor | None, valid: Tensor | None, missing: float, unit: float, a: Tensor) -> Tensor:
    """(2, 1, channels, 1): a number a region and channel."""
    both = [a.new_full((a.shape[1],), missing) if v is None else unit + v.to(a.dtype) for v in (hole, valid)]
    return torch.stack(both)[:, None, :, None]


def _pixels(given: Tensor, a: Tensor) -> Tensor:
    """(samples, 1, space) of a map with a number a pixel."""
    return given.to(a.dtype).reshape(a.shape[0], 1, a.shape[2])


def normalise(x, mask, given, batch: bool, eps: float, released: bool) -> tuple[Tensor, Tensor]:
    """The normalised planes (samples, channels, space) and the statistics."""
    a = planes(x)
    region = regions(mask, a)
    if given is None:
        mean, var, pixels = moments(a, region, batch)
        total = max(1, a.shape[2] * (a.shape[0] if batch else 1))
        rstd = _inverse_root(var, pixels, total, eps, released)
        flat = (2, a.shape[1] * (1 if batch else a.shape[0]))
        count = pixels.expand_as(mean).reshape(flat)
        kept = statistics_of(mean.reshape(flat), var.reshape(flat), count, total, eps, released)
    else:
        mean, rstd, kept = _spread(given[0], a, batch), _spread(given[1], a, batch), given.clone()
    return _inside(region, (a - mean) * rstd).sum(0), kept


def norm(
    x, mask, hole_weight, hole_bias, valid_weight, valid_bias, pixel_weight, pixel_bias, given,
    batch: bool, unit: float, shared: bool, eps: float, released: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The normalised input times its gain plus its offset, and the statistics. Weights count from ``unit``; ``shared`` adds both
    offsets at every pixel."""
    n, kept = normalise(x, mask, given, batch, eps, released)
    region = regions(mask, n)
    if hole_weight is not None or valid_weight is not None:
        n = n * (region * _vectors(hole_weight, valid_weight, 1, unit, n)).sum(0)
    if hole_bias is not None or valid_bias is not None:
        offset = _vectors(hole_bias, valid_bias, 0, 0, n)
        n = n + (offset.sum(0) if shared else (region * offset).sum(0))
    if pixel_weight is not None:
        n = n * (unit + _pixels(pixel_weight, n))
    if pixel_bias is not None:
        n = n + _pixels(pixel_bias, n)
    return n.reshape(x.shape).to(x.dtype), kept


def products(
    gy, x, mask, kept, hole_weight, valid_weight, pixel_weight, batch: bool, unit: float
) -> tuple[Tensor, ...]:
    """(2, 2, channels) sums of h and of h times the normalised value, h the gradient before the region's own gain, and what they
    are made of: h (2, samples, channels, space) inside each region, the normalised value, the gain."""
    a, g = planes(x), planes(gy)
    region = regions(mask, a)
    normal = (a - _spread(kept[0], a, batch)) * _spread(kept[1], a, batch)
    h = g if pixel_weight is None else g * (unit + _pixels(pixel_weight, a))
    h = _inside(region, h.expand(2, *h.shape))
    sums = torch.stack([h.sum(3), _times(h, normal).sum(3)])
    return sums, h, normal, _vectors(hole_weight, valid_weight, 1, unit, a), region


def _times(h: Tensor, normal: Tensor) -> Tensor:
    """A gradient of zero takes part in nothing, whatever it meets."""
    return torch.where(h == 0, 0, h * normal)


def norm_backward(
    gy, x, mask, kept, hole_weight, hole_bias, valid_weight, valid_bias, pixel_weight, pixel_bias, whole,
    batch: bool, unit: float, shared: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, the four vectors and the two maps, empty for what is not there. ``whole`` (2, 2, channels): the sums of h and of
    h times the normalised value, gain included, over all processes where this one sees its part.

    grad_x = rstd (h - sum(h) / S - xh sum(h xh) / S) within each region.
    """
    sums, h, normal, gain, region = products(gy, x, mask, kept, hole_weight, valid_weight, pixel_weight, batch, unit)
    over = sums.sum(2) if batch else sums
    over = (over[:, :, None] if batch else over)[..., None] * gain
    if whole is not None:
        over = whole.to(h.dtype)[:, :, None, :, None]
    rstd, share = _spread(kept[1], h[0], batch), _spread(kept[2], h[0], batch)
    quiet = (h == 0).all(3, keepdim=True) if not batch else (h == 0).all(3, keepdim=True).all(1, keepdim=True)
    gx = rstd * (h * gain - over[0] * share - _times(over[1].expand_as(h), normal) * share)
    gx = torch.where((region > 0) & ~(quiet & ~torch.isfinite(rstd)), gx, 0).sum(0)
    ones, twos = sums[0].sum(1), sums[1].sum(1)
    if shared:
        ones = ones.sum(0).expand_as(ones)
    none, g = h.new_zeros(0), planes(gy)
    return (
        gx.reshape(x.shape).to(x.dtype),
        *(none if p is None else v.clone() for p, v in zip((hole_weight, hole_bias, valid_weight, valid_bias),
                                                          (twos[0], ones[0], twos[1], ones[1]), strict=True)),
        none if pixel_weight is None else (g * _inside(region, normal).sum(0)).sum(1).flatten(),
        none if pixel_bias is None else g.sum(1).flatten(),
    )  # fmt: skip


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, 2, space) of mean and maximum over the channels, and the channel of the maximum."""
    a = planes(x)
    if a.shape[1] == 0 or a.numel() == 0:
        return x.new_empty((x.shape[0], 2, a.shape[2])), a.new_empty((x.shape[0], a.shape[2]), dtype=torch.int32)
    top, index = a.max(1)
    return torch.stack([a.mean(1), top], 1).to(x.dtype), index.to(torch.int32)


def pool_backward(gradient: Tensor, index: Tensor, channels: int) -> Tensor:
    """(samples, channels, space): the mean's gradient everywhere, the maximum's where it was."""
    g = gradient.to(wide(gradient.dtype))
    gx = (g[:, :1] / max(1, channels)).repeat(1, channels, 1)
    if gx.numel():
        gx.scatter_add_(1, index[:, None].long(), g[:, 1:])
    return gx.to(gradient.dtype)


def pool_backward_(gx: Tensor, gradient: Tensor, index: Tensor) -> None:
    """The same, added onto ``gx`` (samples, channels, *space), which is contiguous."""
    found = pool_backward(gradient.to(wide(gradient.dtype)), index, gx.shape[1])
    gx.add_(found.view(gx.shape))
