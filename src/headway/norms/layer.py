"""Layer norm over the last axes or over any named axes, each training case by itself.

    y = weight * (a - mean(a)) / sqrt(var(a) + eps) + bias          (biased variance, eps inside the root)

with the mean and variance over the normalised axes. Same in training and evaluation, no batch statistics. Paper: "Layer
Normalization" (Ba, Kiros, Hinton), 2016, arXiv 1607.06450. Over the channels of a feature map, ``dims=(1,)``, the planes are read
as they lie, which saves the two permuted copies of ``permute, nn.LayerNorm, permute``. Not for convolutional nets where batch
statistics work well.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from headway.kernels.norms import channel_norm, layer_norm
from headway.surgery import Site


def layer_norm_dims(
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the named axes of ``x``.

    Args:
        x: any shape.
        dims: the axes to normalise over, negative ones counted from the end, e.g. ``(1,)`` for the channels of (N, C, H, W).
        weight, bias: shaped as those axes of ``x``, in the order in which they are named.
        eps: added to the variance, inside the root.

    Returns:
        A tensor of the shape and type of ``x``.

    Raises:
        ValueError: an axis is missing or named twice, or a parameter does not have the shape of the axes.
    """
    if any(not -x.dim() <= d < x.dim() for d in dims) or not dims or len({d % x.dim() for d in dims}) != len(dims):
        raise ValueError(f"dims must name different axes of an input of shape {tuple(x.shape)}; they are {tuple(dims)}")
    named = [d % x.dim() for d in dims]
    shape = tuple(x.shape[d] for d in named)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name} must have the shape {shape} of the axes {tuple(dims)}; it is {tuple(parameter.shape)}"
            )
    axes = sorted(named)
    if axes != named:
        order = [named.index(d) for d in axes]
        weight, bias = (None if p is None else p.permute(order) for p in (weight, bias))
        shape = tuple(x.shape[d] for d in axes)
    first, last = axes[0], axes[-1]
    if last - first + 1 == len(axes):
        if last == x.dim() - 1:
            return layer_norm(x, shape, weight, bias, eps)
        moved = torch.movedim(x, axes, tuple(range(-len(axes), 0)))
        if not moved.is_contiguous():  # else the channels lie innermost (channels_last), and the rows are there already
            planes = x.reshape(prod(x.shape[:first]), prod(shape), prod(x.shape[last + 1 :]))
            flat_weight, flat_bias = (None if p is None else p.reshape(-1) for p in (weight, bias))
            return channel_norm(planes, flat_weight, flat_bias, eps).reshape(x.shape)
    ends = tuple(range(-len(axes), 0))
    return torch.movedim(layer_norm(torch.movedim(x, axes, ends), shape, weight, bias, eps), ends, axes)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` with a faster kernel and, optionally, other axes than the last ones.

    Args:
        normalized_shape: sizes of the normalised axes.
        eps: added to the variance, inside the root.
        elementwise_affine, bias: whether there is a weight, and a bias beside it.
        dims: the axes, as many as ``normalized_shape`` has sizes; None for the last ones. ``LayerNorm(64, dims=(1,))`` normalises
            (N, 64, H, W) over its channels.

    Shapes:
        input and output: any, whose axes ``dims`` have the sizes ``normalized_shape``.

    Raises:
        ValueError: ``dims`` and ``normalized_shape`` differ in number, or the input does not fit them.
    """

    looks_for = "nn.LayerNorm"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dims: int | Sequence[int] | None = None,
    ) -> None:
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dims = None if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
        if self.dims is not None and len(self.dims) != len(shape):
            raise ValueError(f"dims {self.dims} must name as many axes as normalized_shape {tuple(shape)} has sizes")

    def forward(self, input: Tensor) -> Tensor:
        if self.dims is None:
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if max(self.dims) < input.dim() and tuple(input.shape[d] for d in self.dims) != tuple(self.normalized_shape):
            raise ValueError(
                f"axes {self.dims} must have the sizes {tuple(self.normalized_shape)}; the input has the shape {tuple(input.shape)}"
            )
        return layer_norm_dims(input, self.dims, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.dims is None else f", dims={self.dims}")

    @classmethod
    def from_module(cls, module: nn.Module, *, site: Site | None = None) -> LayerNorm | None:
        """The same layer with this kernel, holding the very same parameters; None for what is not a plain ``nn.LayerNorm``."""
        if type(module) is not nn.LayerNorm:
            return None
        new = cls(module.normalized_shape, module.eps, elementwise_affine=False)
        new.elementwise_affine = module.elementwise_affine
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)
