"""The norm operators ``headway::layer_norm``, ``rms_norm``, ``crms_norm``, ``add_norm``, ``norm_add_norm``, ``channel_norm``.

Each is registered with its plain body, its fake and its backward, and beside it stands the slim way through autograd that the
public functions take: one node and no dispatcher round trip. ``keep`` says whether the statistics are kept for a backward; the
first three always keep them, and ``headway::norm`` is what they are where none comes: on one token, making room for statistics
is a part of the time that shows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headway.kernels.library import Function, below_autograd, define, load
from headway.kernels.norms import reference
from headway.kernels.norms.gradients import (
    channel_rule,
    crms_rule,
    keep,
    norm_add_norm_rule,
    norm_rule,
    packed,
)
from headway.kernels.norms.lazy import on_cuda
from headway.kernels.norms.reference import COMPRESSED, LAYER, RMS

load("norms")


def _kept(stats: Tensor, wanted: bool) -> Tensor:
    return stats if wanted else stats[:0].clone()


def _norm_plain(x, weight, bias, n, eps, kind, offset):
    return reference.rows(x.contiguous(), weight, bias, n, eps, kind, offset)[0]


def _layer_plain(x, weight, bias, n, eps):
    return reference.rows(x.contiguous(), weight, bias, n, eps, LAYER)


def _rms_plain(x, weight, bias, n, eps, offset):
    return reference.rows(x.contiguous(), weight, bias, n, eps, RMS, offset)


def _crms_plain(z, eps):
    return reference.rows(z.contiguous(), None, None, z.shape[-1], eps, COMPRESSED)


def _add_norm_plain(x, residual, weight, bias, n, eps, rms, offset, keep):
    h = (x + residual).contiguous()
    y, stats = reference.rows(h, weight, bias, n, eps, RMS if rms else LAYER, offset)
    return y, h, _kept(stats, keep)


def _norm_add_norm_plain(f, x, ow, ob, iw, ib, n, eps, rms, offset, keep):
    x_new, u, stats = reference.norm_add_norm(f, x, ow, ob, iw, ib, n, eps, rms, offset)
    return x_new.contiguous(), u.contiguous(), _kept(stats, keep)


def _channel_plain(x, weight, bias, eps, rms, keep):
    y, stats = reference.channels(x, weight, bias, eps, rms)
    return y, _kept(stats, keep)


def _layer_out_plain(x, weight, bias, n, eps, out):
    out.copy_(reference.rows(x, weight, bias, n, eps, LAYER)[0])


def _rms_out_plain(x, weight, bias, n, eps, offset, out):
    out.copy_(reference.rows(x, weight, bias, n, eps, RMS, offset)[0])


def _stats(x: Tensor, n: Any, keep: bool = True, each: int = 2) -> Tensor:
    return x.new_empty((x.numel() // n if keep and n else 0, each), dtype=reference.wide(x.dtype))


def _layer_setup(ctx, inputs, output):
    x, weight, bias, n, eps = inputs
    ctx.mark_non_differentiable(output[1])
    keep(ctx, (x, weight, output[1]), (bias,), n, eps, LAYER, 0.0)


def _rms_setup(ctx, inputs, output):
    x, weight, bias, n, eps, offset = inputs
    ctx.mark_non_differentiable(output[1])
    keep(ctx, (x, weight, output[1]), (bias,), n, eps, RMS, offset)


def _crms_setup(ctx, inputs, output):
    z, eps = inputs
    ctx.mark_non_differentiable(output[1])
    keep(ctx, (z, output[1]), (), z.shape[-1], eps)


def _add_norm_setup(ctx, inputs, output):
    _, _, weight, bias, n, eps, rms, offset, _ = inputs
    ctx.mark_non_differentiable(output[2])
    keep(ctx, (output[1], weight, output[2]), (bias,), n, eps, RMS if rms else LAYER, offset)


def _norm_add_norm_setup(ctx, inputs, output):
    f, _, ow, ob, iw, ib, n, eps, rms, offset, _ = inputs
    ctx.mark_non_differentiable(output[2])
    keep(ctx, (f, output[0], ow, iw, output[2]), (ob, ib), n, eps, rms, offset)


def _channel_setup(ctx, inputs, output):
    x, weight, bias, eps, rms, _ = inputs
    ctx.mark_non_differentiable(output[1])
    keep(ctx, (x, weight, output[1]), (bias,), eps, rms)


_AFFINE = "Tensor? weight, Tensor? bias, SymInt n, float eps"
norm = define(
    f"norm(Tensor x, {_AFFINE}, int kind, float offset) -> Tensor",
    _norm_plain,
    lambda x, *_: packed(x),
    cuda=on_cuda("norm", _norm_plain),
)
layer_norm = define(
    f"layer_norm(Tensor x, {_AFFINE}) -> (Tensor, Tensor)",
    _layer_plain,
    lambda x, weight, bias, n, eps: (packed(x), _stats(x, n)),
    _layer_setup,
    lambda ctx, gy, _: (*norm_rule(ctx, gy), None, None),
    cuda=on_cuda("layer_norm", _layer_plain),
)
rms_norm = define(
    f"rms_norm(Tensor x, {_AFFINE}, float offset) -> (Tensor, Tensor)",
    _rms_plain,
    lambda x, weight, bias, n, eps, offset: (packed(x), _stats(x, n)),
    _rms_setup,
    lambda ctx, gy, _: (*norm_rule(ctx, gy), None, None, None),
    cuda=on_cuda("rms_norm", _rms_plain),
)
crms_norm = define(
    "crms_norm(Tensor z, float eps) -> (Tensor, Tensor)",
    _crms_plain,
    lambda z, eps: (packed(z), _stats(z, z.shape[-1])),
    _crms_setup,
    lambda ctx, gy, _: (crms_rule(ctx, gy), None),
)
layer_norm_out = define(f"layer_norm_out(Tensor x, {_AFFINE}, Tensor(a!) out) -> ()", _layer_out_plain, lambda *_: None)
rms_norm_out = define(
    f"rms_norm_out(Tensor x, {_AFFINE}, float offset, Tensor(a!) out) -> ()", _rms_out_plain, lambda *_: None
)
add_norm = define(
    f"add_norm(Tensor x, Tensor residual, {_AFFINE}, bool rms, float offset, bool keep) -> (Tensor, Tensor, Tensor)",
    _add_norm_plain,
    lambda x, residual, weight, bias, n, eps, rms, offset, keep: (packed(x), packed(x), _stats(x, n, keep)),
    _add_norm_setup,
    lambda ctx, gy, gh, _: (*norm_rule(ctx, gy, gh, inputs=2), None, None, None, None, None),
    cuda=on_cuda("add_norm", _add_norm_plain),
)
norm_add_norm = define(
    "norm_add_norm(Tensor f, Tensor x, Tensor? output_weight, Tensor? output_bias, Tensor? input_weight, Tensor? input_bias, "
    "SymInt n, float eps, bool rms, float offset, bool keep) -> (Tensor, Tensor, Tensor)",
    _norm_add_norm_plain,
    lambda f, x, ow, ob, iw, ib, n, eps, rms, offset, keep: (packed(f), packed(f), _stats(f, n, keep, 4)),
    _norm_add_norm_setup,
    lambda ctx, gs, gu, _: (*norm_add_norm_rule(ctx, gs, gu), None, None, None, None, None),
)
channel_norm = define(
    "channel_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, bool keep) -> (Tensor, Tensor)",
    _channel_plain,
    lambda x, weight, bias, eps, rms, keep: (packed(x), _stats(x, x.shape[1], keep)),
    _channel_setup,
    lambda ctx, gy, _: (*channel_rule(ctx, gy), None, None, None),
)


class Norm(Function):
    """Layer norm or RMS norm, by ``kind``."""

    @staticmethod
    def forward(ctx, x, weight, bias, n, eps, kind, offset):
        with below_autograd():
            if kind == LAYER:
                y, stats = layer_norm(x, weight, bias, n, eps)
            else:
                y, stats = rms_norm(x, weight, bias, n, eps, offset)
        keep(ctx, (x, weight, stats), (bias,), n, eps, kind, offset)
        return y

    @staticmethod
    def backward(ctx, gy):
        return *norm_rule(ctx, gy), None, None, None, None


class CRMSNorm(Function):
    """The compressed RMS norm."""

    @staticmethod
    def forward(ctx, z, eps):
        with below_autograd():
            y, stats = crms_norm(z, eps)
        keep(ctx, (z, stats), (), z.shape[-1], eps)
        return y

    @staticmethod
    def backward(ctx, gy):
        return crms_rule(ctx, gy), None


class AddNorm(Function):
    """Residual addition and norm."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, n, eps, rms, offset):
        with below_autograd():
            y, h, stats = add_norm(x, residual, weight, bias, n, eps, rms, offset, True)
        ctx.set_materialize_grads(False)  # a last sum that nobody reads costs no pass over zeros
        keep(ctx, (h, weight, stats), (bias,), n, eps, RMS if rms else LAYER, offset)
        return y, h

    @staticmethod
    def backward(ctx, gy, gh):
        return *norm_rule(ctx, gy, gh, inputs=2), None, None, None, None


class NormAddNorm(Function):
    """Norm, residual addition, norm."""

    @staticmethod
    def forward(ctx, f, x, ow, ob, iw, ib, n, eps, rms, offset):
        with below_autograd():
            x_new, u, stats = norm_add_norm(f, x, ow, ob, iw, ib, n, eps, rms, offset, True)
        keep(ctx, (f, x_new, ow, iw, stats), (ob, ib), n, eps, rms, offset)
        return x_new, u

    @staticmethod
    def backward(ctx, gs, gu):
        return *norm_add_norm_rule(ctx, gs, gu), None, None, None, None


class ChannelNorm(Function):
    """The norm over the channels of (samples, channels, space)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms):
        with below_autograd():
            y, stats = channel_norm(x, weight, bias, eps, rms, True)
        keep(ctx, (x, weight, stats), (bias,), eps, rms)
        return y

    @staticmethod
    def backward(ctx, gy):
        return *channel_rule(ctx, gy), None, None
