"""Layers as they are while their weights rest: convolutions that keep no input, ReLUs that keep a bit, norms that say what they need.

    frozen convolution      gx = W^T * gy           needs W alone; torch keeps the input too, frozen or not
    ReLU                    gx = gy where x > 0     one bit an entry; torch keeps the output
    batch norm              d gamma = sum g xhat, d beta = sum g, and gx        needs its input
    batch norm and ReLU     the same with g = gy where gamma xhat + beta > 0    needs the norm's input

So of a convolution, a batch norm and a ReLU the norm's input stays, where torch keeps two tensors of that size. A norm that takes the
ReLU behind it along gives that ReLU's output; the ReLU then hands it on. A frozen linear layer keeps no input in torch either. A layer
changes its class and nothing else: parameters, hooks and state stay where they are. arXiv 2003.00152, 2020.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.kernels.batch_norm import batch_norm
from headway.kernels.library import Function, load, needs_grad
from headway.kernels.relu import relu_bits
from headway.surgery import Edit

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# entries from which a batch norm of our own makes up for its way through Python; with a ReLU taken along it always does
_LEAST_NUMBERS = 1 << 14


_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class _FrozenConv(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        call: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return call(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        spatial, no = len(stride), [True, False, False]
        unread = gy.new_empty(ctx.shape)
        gx = _CONVOLUTION_BACKWARD(
            gy, unread, weight.to(gy.dtype), None, stride, padding, dilation, False, [0] * spatial, groups, no
        )[0]
        return gx if gx.dtype == ctx.dtype else gx.to(ctx.dtype), *(None,) * 6


class _FrozenConvEager(Function):
    """The same without what function transforms ask for, which costs more than the convolution of a small image."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _FrozenConv.forward(*inputs)
        _FrozenConv.setup_context(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        return _FrozenConv.backward(ctx, gy)


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv1d`` .. ``conv3d`` with a gradient for ``x`` alone, which needs ``weight`` and not ``x``.

    Shapes:
        x: (N, C, ...) or (C, ...); weight: (out, C / groups, ...) -> (N, out, ...) or (out, ...).
    """
    batched = x.dim() == weight.dim()
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]
    kind = _FrozenConv if traced else _FrozenConvEager
    y: Any = kind.apply(x if batched else x[None], weight, bias, stride, padding, dilation, groups)
    return y if batched else y[0]


class _Kin:
    """A module class that stands in for ``original``, which tools that know a layer by its class and home still recognise."""

    original: type[nn.Module]
    mixin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self.mixin, self.original), self.__dict__


@cache
def kin(mixin: type, original: type[nn.Module]) -> type[nn.Module]:
    """``original`` with the behaviour of ``mixin``."""
    space = {"original": original, "mixin": mixin, "__module__": original.__module__}
    return type(f"{mixin.__name__}{original.__name__}", (mixin, original), space)


def _revive(mixin: type, original: type[nn.Module]) -> nn.Module:
    kind: Any = kin(mixin, original)
    return kind.__new__(kind)


class Frozen(_Kin):
    """A convolution that keeps no input while its weight and bias ask for no gradient; otherwise torch's own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv: Any = self
        if needs_grad(weight, bias) or not needs_grad(input):
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        around = conv._reversed_padding_repeated_twice
        even = all(around[i] == around[i + 1] for i in range(0, len(around), 2))
        if conv.padding_mode == "zeros" and even:
            padding = tuple(reversed(around[::2]))
        else:
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            input, padding = F.pad(input, around, mode), (0,) * len(conv.stride)
        return frozen_conv(input, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


class Bit(_Kin):
    """A ReLU that keeps one bit an entry, or none where the norm before it has done its work."""

    def forward(self, input: Tensor) -> Tensor:
        if getattr(input, _RECTIFIED, None) == input._version:  # and nobody has written to it since
            return input
        return relu_bits(input, self.inplace)  # type: ignore[attr-defined]


_RECTIFIED = "_headway_rectified_at"
"""The version of a tensor that :class:`Joined` gave."""


class Trained(_Kin):
    """A batch norm whose gain and shift are all that trains. The batch's statistics, as ever, and moving averages.

    Raises:
        ValueError: in training mode, an empty batch, or one value a channel.
    """

    still = False
    rectifies = False

    def forward(self, input: Tensor) -> Tensor:
        norm: Any = self
        if norm.training and not self.still:
            self._check_batch(input)
            if _fits(norm, input):
                return self._fused(input)
        if not (self.still and norm.training):
            return super().forward(input)  # type: ignore[misc]
        norm.training = False  # what a batch norm does in evaluation, whatever else a subclass does after it
        try:
            return super().forward(input)  # type: ignore[misc]
        finally:
            norm.training = True

    def _check_batch(self, input: Tensor) -> None:
        synced = isinstance(self, nn.SyncBatchNorm)  # its batch is that of all processes
        if input.dim() < 2 or synced:
            return
        if input.numel() == 0:
            raise ValueError(
                f"an empty batch has no statistics: the input of a batch norm has the shape {tuple(input.shape)}; leave such a "
                "batch out, or apply BatchNormOnly with freeze_stats=True"
            )
        if input.numel() == input.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}; give more samples a "
                "batch, or apply BatchNormOnly with freeze_stats=True, which normalises by the running statistics"
            )

    def _fused(self, input: Tensor) -> Tensor:
        norm: Any = self
        norm._check_input_dim(input)
        running, share = (None, None), 0.0
        if norm.track_running_stats and norm.running_mean is not None:
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            running = norm.running_mean, norm.running_var
        y = batch_norm(input, norm.weight, norm.bias, running, share, norm.eps, self.rectifies)
        if self.rectifies:
            setattr(y, _RECTIFIED, y._version)
        return y


class Joined(Trained):
    """The same and the ReLU behind it, in training: its output is rectified, and a :class:`Bit` hands it on as it is."""

    rectifies = True


class Still(Trained):
    """The same, with running statistics that neither move nor depend on the batch."""

    still = True


def _fits(norm: Any, x: Tensor) -> bool:
    """Whether the fused batch norm computes what ``norm`` does, and faster."""
    plain = type(norm).original in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not plain or x.dim() < 3 or x.device.type != "cpu" or not x.is_floating_point() or not x.is_contiguous():
        return False
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):  # type: ignore[attr-defined]
        return False
    running = norm.running_mean
    if running is not None and running.dtype not in (torch.float32, torch.float64):
        return False
    large = norm.rectifies or x.numel() >= _LEAST_NUMBERS
    return large and load("batch_norm") and needs_grad(x, norm.weight, norm.bias)


class Become(Edit):
    """Gives a module another class over the same state."""

    def __init__(self, module: nn.Module, mixin: type, name: str) -> None:
        self.module, self.name = module, name
        self.before = type(module)
        self.after = kin(mixin, self.before)
        self.mixin = mixin

    def do(self) -> None:
        self.module.__class__ = self.after

    def undo(self) -> None:
        self.module.__class__ = self.before

    def describe(self) -> tuple[str, str]:
        words = {
            Frozen: ("keeps its input", "keeps its weight alone"),
            Bit: ("keeps its output", "keeps one bit an entry"),
            Trained: ("torch's batch norm", "the same, fused"),
            Joined: ("torch's batch norm", "the same, fused with the ReLU behind it"),
            Still: ("statistics of the batch", "running statistics, held still"),
        }
        return words.get(self.mixin, ("", ""))


def lighter(module: nn.Module) -> type | None:
    """The mixin that makes a resting layer keep less, or None."""
    kind = type(module)
    return Frozen if kind in CONVOLUTIONS else Bit if kind is nn.ReLU else None


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, _Kin)
