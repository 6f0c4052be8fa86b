"""A residual tower as a sum over orders of paths, computed exactly without walking the 2^n paths.

The state is a power series ``h(lam) = c_0 + lam c_1 + lam^2 c_2 + ...`` with ``c_0 = E(x)``. Block i updates, from the state before it,
``c_1 += b_i(c_0)``, ``c_2 += J_i(c_0) c_1``, ``c_3 += J_i(c_0) c_2 + 1/2 H_i(c_0)[c_1, c_1]`` (Taylor mode). Order k gathers
C(n, k) index sets. Linear branches: ``E_k <- E_k + B_i E_(k-1)``, which ends at n and is exact; piecewise linear ones (ReLU): exact
derivatives, but valid only while no unit changes sign, so read the remainder.

Paper: "On residual network depth", 2025, arXiv 2510.03470.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from headway.residual.depth import Residual, factors, scaled_add


class Tower(nn.Module):
    """``D((I + lam b_n) o ... o (I + lam b_1)(E(x)))``.

    Args:
        branches: n modules of equal input and output shape.
        scale: "1/sqrt(n)", "1/n", a number, a list, "learnable" or "zero".
        encoder, decoder: what stands before and after; the identity by default.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        scale: str | float | Sequence[float] = "1/sqrt(n)",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        n = len(branches)
        values = [scale] * n if isinstance(scale, str) else factors(scale, max(n, 1), n)
        self.encoder = encoder or nn.Identity()
        self.blocks = nn.Sequential(*(Residual(b, v, n) for b, v in zip(branches, values, strict=True)))
        self.decoder = decoder or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.blocks(self.encoder(x)))


@dataclass(frozen=True)
class Expansion:
    """The orders of a tower at the stream, before the decoder.

    Attributes:
        terms: c_0 ... c_order, (order + 1, B, ...), or their norms per sample (order + 1, B) with ``reduce="norm"``.
        n_paths: C(n, k), the number of index sets behind each term.
        share: norm of ``lam^k c_k`` over the norm of the output, mean over samples, (order + 1,).
        remainder: norm of the output minus the sum of all terms, over the norm of the output, (B,).
        per_block: the exact contributions ``b_i(h_(i-1))`` at the trained factors, (n, B, ...), or their norms (n, B).
        scale: the factor lam; 1.0 where the branches carry different ones, which are then part of the terms.
    """

    terms: Tensor
    n_paths: tuple[int, ...]
    share: Tensor
    remainder: Tensor
    per_block: Tensor
    scale: float


def _parts(tower: nn.Module) -> tuple[nn.Module, list[Residual]]:
    if isinstance(tower, Tower):
        return tower.encoder, [block for block in tower.blocks if isinstance(block, Residual)]
    if isinstance(tower, Residual):
        return nn.Identity(), [tower]
    if isinstance(tower, nn.Sequential):
        where = [i for i, module in enumerate(tower) if isinstance(module, Residual)]
        if where and where == list(range(where[0], where[-1] + 1)):
            return tower[: where[0]], [tower[i] for i in where]  # type: ignore[misc]
    raise TypeError(
        f"residual_expansion takes a Tower, or an nn.Sequential whose Residual modules follow one another, "
        f"not {type(tower).__name__}; write the stream as headway.residual.expansion.Tower(branches, encoder=, decoder=)"
    )


# a function of (input, weight, bias, ...) that is linear in its input
_MAPS = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return all(_is_linear(child) for child in module)
    return type(module) is nn.Identity or (type(module) is nn.Linear and module.bias is None)


class _LinearByParts(TorchFunctionMode):
    """Linear maps of a dual number are two maps: what forward mode does by itself costs several times as much."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _MAPS or len(args) < 2 or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        (x, tangent), weight = forward_ad.unpack_dual(args[0]), args[1]
        if tangent is None:
            return func(*args, **kwargs)
        bias = args[2] if len(args) > 2 else kwargs.pop("bias", None)
        return forward_ad.make_dual(
            func(x, weight, bias, *args[3:], **kwargs), func(tangent, weight, None, *args[3:], **kwargs)
        )


class _Cut(Exception):
    """The branch lets no derivative through."""


@contextlib.contextmanager
def _forward_mode(order: int) -> Iterator[None]:
    """What forward mode needs: attention by plain products, and for order 2 one level of dual numbers for all branches."""
    _load_forward_mode()
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level() if order == 2 else contextlib.nullcontext():
        yield


@cache
def _load_forward_mode() -> None:
    """Lets torch load its forward derivatives once, in silence: it does so by torch.jit, whose deprecation is not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.tanh, (torch.zeros(1),), (torch.ones(1),))


def _derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: jvp(f, (t,), (torch.ones_like(t),))[1]


def _coefficients(branch: Callable[[Tensor], Tensor], state: Sequence[Tensor], linear: bool) -> list[Tensor]:
    """Taylor coefficients in lam of ``branch(c_0 + lam c_1 + ...)``, one for each entry of ``state``."""
    if linear:
        return [branch(c) for c in state]
    if len(state) == 1:
        return [branch(state[0])]
    if len(state) == 2:
        with _LinearByParts():
            value, tangent = forward_ad.unpack_dual(branch(forward_ad.make_dual(*state)))
        if tangent is None:
            raise _Cut
        return [value, tangent]

    def path(t: Tensor) -> Tensor:
        return branch(sum((c * t**k for k, c in enumerate(state[1:], 1)), state[0]))

    at = torch.zeros((), dtype=state[0].dtype, device=state[0].device)
    found, f = [path(at)], path
    for k in range(1, len(state)):
        f = _derivative(f)
        found.append(f(at) / math.factorial(k))
    return found


def residual_expansion(tower: nn.Module, x: Tensor, order: int = 2, reduce: str | None = "norm") -> Expansion:
    """Expands a tower in its branch factor, up to ``order``, in O(n) branch evaluations for each order.

    The derivatives are exact (forward mode): order 2 costs three evaluations a branch, two at c_0 (value and derivative) and the
    forward pass itself. Orders above 2 of nonlinear branches nest it, at a cost that doubles with each
    order; linear branches cost n products for each order.

    Args:
        tower: a :class:`Tower`, or an ``nn.Sequential`` of :class:`~headway.residual.Residual` modules.
        x: input, (B, ...).
        order: the highest order, at least 0.
        reduce: "norm" keeps the norm of each term and block per sample, None the whole tensors.

    Raises:
        TypeError: no tower.
        ValueError: ``order`` < 0; ``reduce`` unknown; a branch changes the shape; a branch uses batch statistics in training
            mode; ``order`` >= 2 and a branch cannot be differentiated.
    """
    if order < 0:
        raise ValueError(f"order must be at least 0; {order} was given")
    if reduce not in ("norm", None):
        raise ValueError(f"reduce must be 'norm' or None; {reduce!r} was given")
    encoder, blocks = _parts(tower)
    n = len(blocks)
    for block in blocks:
        _refuse_batch_statistics(block)
    linear = [_is_linear(block.module) for block in blocks]
    if all(linear) and order > n:
        warnings.warn(f"the series of {n} linear branches ends at order {n}; order={order} is cut to it", stacklevel=2)
        order = n
    scales = [float(block.branch_scale) for block in blocks]
    lam = scales[0] if scales and all(s == scales[0] for s in scales) else 1.0
    weights = [1.0 if s == lam else s / lam for s in scales]
    with torch.no_grad(), _forward_mode(order):
        h = encoder(x)
        state = [h, *(torch.zeros_like(h) for _ in range(order))]
        contributions = []
        for block, weight, exact in zip(blocks, weights, linear, strict=True):
            y = block.module(h)
            if y.shape != h.shape:
                raise ValueError(
                    f"a residual branch must keep the shape: {tuple(h.shape)} became {tuple(y.shape)}; "
                    "put what changes the shape between the towers"
                )
            contributions.append(_norms(y) if reduce == "norm" else y)
            if order:
                for c, a in zip(state[1:], _added(block.module, state[:order], exact), strict=True):
                    c.add_(a, alpha=weight)
            h = scaled_add(h, y, block.branch_scale)
        powers = [lam**k for k in range(order + 1)]
        size = _norms(h)
        total = sum((p * c for p, c in zip(powers, state, strict=True)), torch.zeros_like(h))
        terms = torch.stack(state)
        norms = _norms(terms, 2)
        share = torch.stack([(p * norm / size).mean() for p, norm in zip(powers, norms, strict=True)])
        nothing = h.new_zeros((0, *(h.shape[:1] if reduce == "norm" else h.shape)))
        per_block = torch.stack(contributions) if contributions else nothing
        paths = tuple(math.comb(n, k) for k in range(order + 1))
        remainder = _norms(h - total) / size
        return Expansion(norms if reduce == "norm" else terms, paths, share, remainder, per_block, lam)


def _added(branch: nn.Module, state: Sequence[Tensor], linear: bool) -> list[Tensor]:
    """What a branch adds to c_1, c_2, ...; ValueError where it cannot be differentiated."""
    order = len(state)
    if order > 2 and not linear:
        _refuse_constant(branch, state[0])
    try:
        return _coefficients(branch, state, linear)
    except _Cut:
        raise ValueError(
            f"a branch ({type(branch).__name__}) lets no derivative through, which order >= 2 needs; use order=1"
        ) from None
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"a branch ({type(branch).__name__}) cannot be differentiated as order={order} needs: {error}; use order=1"
        ) from error


def _norms(x: Tensor, kept: int = 1) -> Tensor:
    if x.dim() <= kept:
        return x.abs()
    return torch.linalg.vector_norm(x, dim=tuple(range(kept, x.dim())))


def _refuse_batch_statistics(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        ):
            if module.training or not module.track_running_stats:
                raise ValueError(
                    f"{type(module).__name__} uses batch statistics, which couples the samples, so the terms of one sample "
                    "are not defined; call tower.eval() first"
                )
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError("dropout draws another branch at every call; call tower.eval() first")


def _refuse_constant(branch: nn.Module, h: Tensor) -> None:
    with torch.enable_grad():
        x = h[:1].detach().requires_grad_()
        y = branch(x)
        gradient = torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None
    if gradient is None:
        raise ValueError(
            f"a branch ({type(branch).__name__}) lets no derivative through, which order >= 2 needs; use order=1"
        )
