"""Every weight goes through a squashing map while training: large ones are compressed, small ones get larger gradients.

    w = a * arctan(v / b),   |w| < a * pi / 2,   dw/dv = (a / b) / (1 + (v / b)^2)        v is trained, and a, b > 0 if wanted

The decision is spread over more weights. "Weight Compander: A Simple Weight Reparameterization for Regularization" (Cakaj, Mehnert,
Yang), 2023, arXiv 2306.16993. For small or noisy data, beside weight decay, dropout or augmentation. Not where weights must become
sparse, where a pretrained net needs its full range, or where a net underfits already. What the paper starts a and b from is not
known here: a = c * std(w), b = a / slope and their defaults are ours.

Near 0 a step of v moves w by (a / b)^2 times as much, so ``slope`` multiplies the rate of small weights by its square. The gradients
of a and b sum over the whole tensor: :func:`param_groups` gives them a much smaller rate. Order of work for a trained model: apply,
build the optimiser with :func:`param_groups`, train, :func:`export_plain`.
"""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headway.kernels.compander import MAPS, inverse
from headway.kernels.compander import compand as _compand

# clamped entries keep this share of the bound, so that they still get a gradient
_INSIDE = 0.95
Granularity = Literal["tensor", "channel"]


def compand(v: Tensor, a: Tensor | float, b: Tensor | float, map: str = "arctan") -> Tensor:
    """``a * f(v / b)``, entry by entry, with a backward that keeps only ``v``. Differentiable in all three, any number of times.

    Args:
        v: any shape, floating; half precision is computed in float32.
        a, b: above 0; numbers or tensors that broadcast to ``v``.
        map: f is "arctan" (the method), "tanh", "softsign", "mu-law" (sign(r) log(1 + |r|)), "power" (sign(r) |r|^0.8, which only
            expands) or "identity" (``v`` itself).

    Raises:
        ValueError: an unknown map, a number a or b not above 0, or tensors that do not broadcast. TypeError: ``v`` is not floating.
    """
    if not v.is_floating_point():
        raise TypeError(f"a compander takes a floating tensor, not {v.dtype}")
    _known(map)
    tensors = []
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must lie above 0; it is {value}")
            value = torch.tensor(value, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
        elif torch.broadcast_shapes(value.shape, v.shape) != v.shape:
            raise ValueError(f"{name} of shape {tuple(value.shape)} does not broadcast to the weight {tuple(v.shape)}")
        tensors.append(value)
    return _compand(v, tensors[0], tensors[1], map)


def _known(map: str) -> None:
    if map not in MAPS:
        raise ValueError(f"there is no map {map!r}; it is one of {', '.join(MAPS)}")


class WeightCompander(nn.Module):
    """The map as a parametrization: ``torch.nn.utils.parametrize.register_parametrization(layer, "weight", WeightCompander(a, b))``.

    Args:
        a, b: above 0; with ``granularity="channel"`` tensors of one number a channel, else numbers.
        learn: train them, as logarithms, so that they stay positive; else they are buffers.
        granularity: "tensor", or "channel": one a and b for each output channel.
        map: see :func:`compand`.
        channel_dim: the axis of the output channels.

    In evaluation without gradients the weight is computed once and kept until v, a or b change, so inference costs nothing.
    Registering a weight beyond the map's range clamps it to 95 % of the bound and warns where that is more than 1 % of the entries;
    ``clamped`` counts them.

    Raises:
        ValueError: a or b not above 0, unknown map or granularity, a weight that is not floating.
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(
        self,
        a: float | Tensor = 1.0,
        b: float | Tensor = 1.0,
        learn: bool = True,
        granularity: Granularity = "tensor",
        map: str = "arctan",
        channel_dim: int = 0,
    ) -> None:
        super().__init__()
        _known(map)
        if granularity not in ("tensor", "channel"):
            raise ValueError(f'granularity is "tensor" or "channel", not {granularity!r}')
        self.learn, self.granularity, self.map, self.channel_dim = learn, granularity, map, channel_dim
        for name, value in (("a", a), ("b", b)):
            tensor = torch.as_tensor(value)
            tensor = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
            if tensor.dim() != (granularity == "channel"):
                wanted = "one number a channel, a vector" if granularity == "channel" else "a single number"
                raise ValueError(
                    f'with granularity="{granularity}" {name} is {wanted}; it has shape {tuple(tensor.shape)}'
                )
            if not bool(((tensor > 0) & tensor.isfinite()).all()):
                raise ValueError(f"{name} must lie above 0; it is {value}")
            # a vector even where it is one number: fully_shard takes no scalars
            log = tensor.log().reshape(-1)
            if learn:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)
        self.clamped = 0
        self._kept: tuple[Any, Tensor] | None = None

    @classmethod
    def for_weight(
        cls,
        w: Tensor,
        c: float = 3.0,
        slope: float = 1.0,
        learn: bool = True,
        granularity: Granularity = "tensor",
        map: str = "arctan",
        channel_dim: int = 0,
    ) -> WeightCompander:
        """With a = c * std(w) and b = a / slope, or 1 where a weight does not vary. Raises ValueError for c or slope not above 0."""
        for name, value in (("c", c), ("slope", slope)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must lie above 0; it is {value}")
        wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))
        if granularity == "channel":
            rows = wide.movedim(channel_dim, 0).flatten(1)
            spread = rows.std(1, correction=0) if rows.numel() else rows.new_zeros(len(rows))
        else:
            spread = wide.std(correction=0) if wide.numel() else wide.new_zeros(())
        varies = (spread > 0) & spread.isfinite()
        a = torch.where(varies, c * spread, 1.0)
        return cls(a, torch.where(varies, a / slope, 1.0), learn, granularity, map, channel_dim)

    def a_b(self, dims: int) -> tuple[Tensor, Tensor]:
        """a and b in the shape that broadcasts over a weight of ``dims`` axes."""
        a, b = self.log_a.exp(), self.log_b.exp()
        if self.granularity == "channel":
            shape = [1] * dims
            shape[self.channel_dim] = -1
            return a.view(shape), b.view(shape)
        return (a, b) if dims else (a.view(()), b.view(()))

    def forward(self, v: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or not _plain(v):
            return _compand(v, *self.a_b(v.dim()), self.map)
        key = tuple((t.data_ptr(), t._version, t.dtype) for t in (v, self.log_a, self.log_b))
        if self._kept is None or self._kept[0][0]() is not v or self._kept[0][1] != key:
            with torch.inference_mode(False):
                self._kept = ((weakref.ref(v), key), _compand(v, *self.a_b(v.dim()), self.map))
        return self._kept[1]

    def right_inverse(self, w: Tensor) -> Tensor:
        """The v that gives ``w``; entries out of range are clamped."""
        if not w.is_floating_point():
            raise ValueError(f"a compander takes real floating weights; this one is {w.dtype}")
        a, b = self.a_b(w.dim())
        limit = (_INSIDE * MAPS[self.map].bound * a).to(w.device)
        outside = w.abs() > limit
        self.clamped = int(outside.sum())
        if self.clamped > 0.01 * w.numel():
            warnings.warn(
                f"{self.clamped} of {w.numel()} weights lay beyond the range of the map and were clamped to it; a larger c "
                "(or a) keeps them",
                stacklevel=2,
            )
        inside = torch.where(outside, w.sign() * limit, w).to(w.dtype) if self.clamped else w
        return inverse(inside, a.to(w.device), b.to(w.device), self.map)

    def train(self, mode: bool = True) -> WeightCompander:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"map={self.map!r}, granularity={self.granularity!r}, learn={self.learn}"


def _plain(v: Tensor) -> bool:
    """Whether a tensor can be recognised again: no transform or compiler is at work."""
    if torch.compiler.is_compiling() or v.is_inference():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(v)  # type: ignore[attr-defined]


def compander_of(module: nn.Module, name: str) -> WeightCompander | None:
    """The compander of a weight, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    chain = module.parametrizations[name]  # type: ignore[index]
    return next((part for part in chain if isinstance(part, WeightCompander)), None)


def channel_dim(module: nn.Module) -> int:
    """The axis of the output channels of a layer's weight."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1
    return -1 if type(module).__name__ in ("Conv1D", "ParametrizedConv1D") else 0


def weight_compander(
    module: nn.Module,
    name: str = "weight",
    c: float = 3.0,
    slope: float = 1.0,
    learn: bool = True,
    granularity: Granularity = "tensor",
    map: str = "arctan",
    compander: WeightCompander | None = None,
) -> nn.Module:
    """Puts a compander on one weight, as ``torch.nn.utils.parametrizations.weight_norm`` does, and returns the module.

    Args:
        module, name: whose weight.
        c, slope: a = c * std(w), b = a / slope: the smaller c, the stronger. With c >= 4 the map is nearly linear for a fresh layer.
        learn, granularity, map: see :class:`WeightCompander`.
        compander: one made already (shared with another weight, say) instead of one made from c and slope.

    Raises:
        ValueError: there is no such weight, it is not floating, it has a compander already, or a setting is out of range.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        owned = ", ".join(key for key, _ in module.named_parameters(recurse=False)) or "no parameter"
        raise ValueError(f"{type(module).__name__} has no weight {name!r}; it has {owned}")
    if compander_of(module, name) is not None:
        raise ValueError(f"{name!r} of {type(module).__name__} has a compander already; remove it first")
    if not weight.is_floating_point():
        raise ValueError(f"a compander takes real floating weights; {name!r} is {weight.dtype}")
    if compander is None:
        compander = WeightCompander.for_weight(weight, c, slope, learn, granularity, map, channel_dim(module))
    compander.to(weight.device).train(module.training)
    parametrize.register_parametrization(module, name, compander)
    make_picklable(module)
    return module


def remove_weight_compander(module: nn.Module, name: str = "weight") -> nn.Module:
    """Bakes the weight in as a plain parameter, the same object that was trained, and returns the module.

    Raises:
        ValueError: this weight has no compander.
    """
    if compander_of(module, name) is None:
        raise ValueError(f"{name!r} of {type(module).__name__} has no compander")
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return module


def make_picklable(module: nn.Module) -> None:
    """Lets a module with parametrizations be pickled, which ``torch.nn.utils.parametrize`` does not."""
    type(module).__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]


def _reduce(module: nn.Module, protocol: Any) -> Any:
    return _revive, (type(module).__bases__[0],), module.__dict__


def _revive(kind: type[nn.Module]) -> nn.Module:
    module = kind.__new__(kind)
    made = type(f"Parametrized{kind.__name__}", (kind,), {"__setstate__": _set_state, "__reduce_ex__": _reduce})
    module.__class__ = made
    return module


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    module.__class__ = type(module).__bases__[0]
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)
    make_picklable(module)
