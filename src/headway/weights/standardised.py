"""Weight Standardization: every filter of a convolution is used with mean 0 and variance 1, whatever the raw weight is.

    W = (V - mean(V)) / sqrt(var(V) + eps)         over all entries of one output filter
    grad V = (G - mean(G) - W mean(G * W)) / sqrt(var(V) + eps)

The gradient sums to zero over a filter and stands upright on it, which smooths the loss, and the following norm cannot see the scale
that is taken away. Paper: "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization" (Qiao et al., 2019), arXiv
1903.10520. For convolutions that a norm follows, above all group norm or :mod:`headway.norms.batch_channel` with one to four images
a step. Not where no norm follows, for the scale of the weight is lost, nor for filters of one entry, which have no variance. Weight
decay on V acts through the effective rate alone; it must not be put on W. One call on a model, and plain convolutions of it once it is
trained: :mod:`headway.weights.standardising`.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headway.kernels.norms import layer_norm
from headway.surgery import Site

EpsMode = Literal["var", "std"]
CONVOLUTIONS: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def standardize(
    weight: Tensor,
    eps: float = 1e-5,
    unbiased: bool = False,
    eps_mode: EpsMode = "var",
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """The standardised weight, computed in float32 or wider.

    Args:
        weight: (O, I / groups, ...), or (I, O / groups, ...) where ``transposed``.
        eps: added to the variance ("var"), or to its root ("std").
        unbiased: divide by one less than a filter's entries, as the released code does.

    Raises:
        ValueError: filters of one entry, or an ``eps_mode`` that does not exist.
    """
    if eps_mode not in ("var", "std"):
        raise ValueError(f'eps_mode is "var" or "std"; it is {eps_mode!r}')
    if transposed:  # (groups * I, O, ...) -> (groups, O, I, ...)
        filters = weight.unflatten(0, (groups, -1)).transpose(1, 2)
        rows = filters.flatten(2)
    else:
        filters, rows = weight, weight.flatten(1)
    n = rows.shape[-1]
    _refuse_single(weight, n)
    if eps_mode == "std":
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        var = centred.square().sum(-1, keepdim=True) / (n - 1 if unbiased else n)
        new = (centred / (var.clamp_min(1e-30).sqrt() + eps)).to(rows.dtype)  # a constant filter has no slope at 0
    elif unbiased:
        share = (n - 1) / n
        new = layer_norm(rows.contiguous(), n, eps=eps * share) * share**0.5
    else:
        new = layer_norm(rows.contiguous(), n, eps=eps)
    new = new.reshape(filters.shape)
    return new.transpose(1, 2).flatten(0, 1) if transposed else new


def _refuse_single(weight: Tensor, entries: int) -> None:
    if entries == 1:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has filters of one entry, whose variance is undefined"
        )


def entries(conv: Any) -> int:
    """Entries of one output filter."""
    shape = conv.weight.shape
    return shape[2:].numel() * (shape[0] // conv.groups if conv.transposed else shape[1])


class WeightStandardization(nn.Module):
    """:func:`standardize` as a parametrization: ``parametrize.register_parametrization(conv, "weight", WeightStandardization())``."""

    def __init__(
        self,
        eps: float = 1e-5,
        unbiased: bool = False,
        eps_mode: EpsMode = "var",
        transposed: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.eps_mode: EpsMode
        self.eps, self.unbiased, self.eps_mode, self.transposed, self.groups = (
            eps,
            unbiased,
            eps_mode,
            transposed,
            groups,
        )

    def forward(self, weight: Tensor) -> Tensor:
        return standardize(weight, self.eps, self.unbiased, self.eps_mode, self.transposed, self.groups)


def weight_standardization(
    module: nn.Module, name: str = "weight", eps: float = 1e-5, unbiased: bool = False, eps_mode: EpsMode = "var"
) -> nn.Module:
    """Standardises one weight of a module by ``torch.nn.utils.parametrize``, in place.

    Raises:
        ValueError: the module has no such weight, or its filters have one entry.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise ValueError(f"{type(module).__name__} has no weight {name!r} with filters to standardise")
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    groups = int(getattr(module, "groups", 1)) if transposed else 1
    part = WeightStandardization(eps, unbiased, eps_mode, transposed, groups)
    part(weight.detach())  # complains before anything is changed
    parametrize.register_parametrization(module, name, part)
    return module


class StandardisedConv(nn.modules.conv._ConvNd):
    """What the convolutions share. In evaluation without gradients the standardised weight is kept until the raw one changes."""

    ws_eps: float
    unbiased: bool
    eps_mode: EpsMode
    _kept: tuple[Any, Tensor] | None = None

    def _setup(self, ws_eps: float, unbiased: bool, eps_mode: EpsMode) -> None:
        self.ws_eps, self.unbiased, self.eps_mode = ws_eps, unbiased, eps_mode
        if eps_mode not in ("var", "std"):
            raise ValueError(f'eps_mode is "var" or "std"; it is {eps_mode!r}')
        _refuse_single(self.weight, entries(self))

    def _standardised(self, weight: Tensor) -> Tensor:
        return standardize(weight, self.ws_eps, self.unbiased, self.eps_mode, self.transposed, self.groups)

    def standardised_weight(self) -> Tensor:
        """What the convolution is done with."""
        weight = self.weight
        constant = not self.training and not (torch.is_grad_enabled() and weight.requires_grad)
        if not constant or torch.compiler.is_compiling() or weight.is_inference():
            self._kept = None
            return self._standardised(weight)
        # the version counts changes in place, the address those of what lies behind ``.data``
        key = (
            weight._version,
            weight.data_ptr(),
            weight.dtype,
            weight.device,
            self.ws_eps,
            self.unbiased,
            self.eps_mode,
        )
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._standardised(weight.detach())
        return self._kept[1]

    def train(self, mode: bool = True) -> Any:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ws_eps={self.ws_eps}"

    @classmethod
    def from_module(cls, module: nn.Module, *, site: Site | None = None, **settings: Any) -> nn.Module | None:
        """The standardised convolution with the very parameters of a plain one; None for anything else."""
        kind = STANDARDISED.get(type(module))
        if kind is None or (cls is not StandardisedConv and kind is not cls):
            return None
        new = copy.copy(module)  # shares parameters, settings and hooks
        new._parameters, new._buffers, new._modules = (
            dict(module._parameters),
            dict(module._buffers),
            dict(module._modules),
        )
        new.__class__ = kind
        new._setup(**{"ws_eps": 1e-5, "unbiased": False, "eps_mode": "var", **settings})  # type: ignore[operator]
        return new


class WSConv1d(StandardisedConv, nn.Conv1d):
    """``nn.Conv1d`` with a standardised weight; the same arguments and ``ws_eps``, ``unbiased``, ``eps_mode``."""

    def __init__(
        self, *args: Any, ws_eps: float = 1e-5, unbiased: bool = False, eps_mode: EpsMode = "var", **kwargs: Any
    ) -> None:
        nn.Conv1d.__init__(self, *args, **kwargs)
        self._setup(ws_eps, unbiased, eps_mode)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardised_weight(), self.bias)


class WSConv2d(StandardisedConv, nn.Conv2d):
    """``nn.Conv2d`` with a standardised weight; the same arguments and ``ws_eps``, ``unbiased``, ``eps_mode``."""

    def __init__(
        self, *args: Any, ws_eps: float = 1e-5, unbiased: bool = False, eps_mode: EpsMode = "var", **kwargs: Any
    ) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._setup(ws_eps, unbiased, eps_mode)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardised_weight(), self.bias)


class WSConv3d(StandardisedConv, nn.Conv3d):
    """``nn.Conv3d`` with a standardised weight; the same arguments and ``ws_eps``, ``unbiased``, ``eps_mode``."""

    def __init__(
        self, *args: Any, ws_eps: float = 1e-5, unbiased: bool = False, eps_mode: EpsMode = "var", **kwargs: Any
    ) -> None:
        nn.Conv3d.__init__(self, *args, **kwargs)
        self._setup(ws_eps, unbiased, eps_mode)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardised_weight(), self.bias)


class WSConvTranspose2d(StandardisedConv, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a standardised weight, over the entries that make one output channel."""

    def __init__(
        self, *args: Any, ws_eps: float = 1e-5, unbiased: bool = False, eps_mode: EpsMode = "var", **kwargs: Any
    ) -> None:
        nn.ConvTranspose2d.__init__(self, *args, **kwargs)
        self._setup(ws_eps, unbiased, eps_mode)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        places: Any = (self.stride, self.padding, self.dilation, self.kernel_size)
        stride, padding, dilation, size = (list(place) for place in places)
        extra = self._output_padding(input, output_size, stride, padding, size, 2, dilation)
        weight = self.standardised_weight()
        return nn.functional.conv_transpose2d(
            input,
            weight,
            self.bias,
            stride,
            padding,
            extra,
            self.groups,
            dilation,
        )


STANDARDISED: dict[type[nn.Module], Any] = {
    nn.Conv1d: WSConv1d,
    nn.Conv2d: WSConv2d,
    nn.Conv3d: WSConv3d,
    nn.ConvTranspose2d: WSConvTranspose2d,
}
