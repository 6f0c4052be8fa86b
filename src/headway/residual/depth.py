"""Multiplies every residual branch by a small factor, so that a deep network trains without normalisation.

A tower ``F(x) = D((I + lam b_n) o ... o (I + lam b_1)(E(x)))`` of n branches hides 2^n paths; with variance-preserving branches
``Var(h_n) / Var(h_0) = (1 + lam^2)^n``: 2^n at lam = 1, about e at ``lam = 1/sqrt(n)``, about 1 at ``lam = 1/n``. The factor
sits on the branch's output, never on the skip, and n counts all branches added to one stream (two a transformer block).

Paper: "On residual network depth", 2025, arXiv 2510.03470. Reach for it for norm-free or very deep nets; do not expect it to beat
a well-tuned normalised network in accuracy.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.checkpoints import record
from headway.residual.additions import Addition, find_additions, is_norm
from headway.surgery import Edit, SetAttribute, Site, Swap, Technique

Scale = str | float | Sequence[float]
MODES = ("1/sqrt(n)", "1/n", "learnable", "zero")


class NotTowerFormWarning(UserWarning):
    """Something acts on the stream after the addition (a ReLU), so the network is not of the form (I + lam b_n) o ..."""


def scaled_add(x: Tensor, y: Tensor, alpha: float | Tensor) -> Tensor:
    """``x + alpha * y`` in one pass; a tensor ``alpha`` broadcasts and is learned without leaving the graph."""
    if isinstance(alpha, Tensor):
        return torch.addcmul(x, y, alpha.to(dtype=y.dtype))
    return torch.add(x, y, alpha=alpha)


def factors(scale: Scale, n: int, count: int) -> list[float]:
    """The factor of each of ``count`` branches at the start, for a stream with ``n`` branches.

    Raises:
        ValueError: n is not positive, the mode is unknown, or a list has another length than there are branches.
    """
    if n <= 0:
        raise ValueError(f"n must be the positive number of branches on the stream; {n} was given")
    if isinstance(scale, str):
        if scale not in MODES:
            raise ValueError(
                f"scale must be one of {', '.join(MODES)}, a number or a list of numbers; {scale!r} was given"
            )
        value = {"1/n": 1 / n, "zero": 0.0}.get(scale, 1 / math.sqrt(n))
        return [value] * count
    if isinstance(scale, Sequence):
        if len(scale) != count:
            raise ValueError(
                f"a list of scales needs one number a branch: {len(scale)} were given for {count} branches"
            )
        return [float(value) for value in scale]
    return [float(scale)] * count


def is_learned(scale: Any) -> bool:
    return scale in ("learnable", "zero") if isinstance(scale, str) else False


class _HoldsScale(nn.Module):
    """A factor (a float, or a scalar Parameter) and the mode it came from, kept in the state."""

    branch_scale: Any
    scale_mode: Any
    scale_n: int

    def _start_scale(self, scale: Any, n: int, value: float) -> None:
        self.scale_mode, self.scale_n = scale, n
        self.branch_scale = nn.Parameter(torch.tensor(value)) if is_learned(scale) else value

    def get_extra_state(self) -> Tensor:
        value = None if isinstance(self.branch_scale, Tensor) else self.branch_scale
        text = json.dumps({"scale": self.scale_mode, "n": self.scale_n, "value": value})
        # letters as bytes, because formats such as safetensors keep only tensors
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved = json.loads(bytes(state.tolist()))
        if (saved["value"] is None) != isinstance(self.branch_scale, Tensor):
            raise ValueError(
                f"the weights were saved with scale={saved['scale']!r} and this branch has scale={self.scale_mode!r}; "
                "apply the same mode before loading"
            )
        self.scale_mode, self.scale_n = saved["scale"], saved["n"]
        if saved["value"] is not None:
            self.branch_scale = saved["value"]


class Residual(_HoldsScale):
    """``x + lam * module(x)``.

    Args:
        module: the branch, equal input and output shape.
        scale: "1/sqrt(n)" (default), "1/n", a number, "learnable" (a scalar started at 1/sqrt(n)) or "zero" (SkipInit).
        n: how many branches are added to this stream in the whole network; needed unless ``scale`` is a number or "zero".
        residual_dtype: dtype of the stream. In bf16 a branch scaled by 1/n, n >= 256, is below half a unit in the last place
            and is lost; keep the stream in float32.

    Shapes:
        any shape -> the same shape

    Raises:
        ValueError: n is missing or not positive, the mode is unknown, or the branch changes the shape.
    """

    def __init__(
        self,
        module: nn.Module,
        scale: str | float = "1/sqrt(n)",
        n: int | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n is None and isinstance(scale, str) and scale != "zero":
            raise ValueError(f"scale={scale!r} needs n, the number of branches added to the same stream; give n=...")
        self.module = module
        self.residual_dtype = residual_dtype
        count = 1 if n is None else n
        self._start_scale(scale, count, factors(scale, count, 1)[0])

    def forward(self, x: Tensor) -> Tensor:
        stream, seen = x, x
        if self.residual_dtype is not None:
            stream = x.to(self.residual_dtype)
            weight = next(self.module.parameters(), None)
            seen = x if weight is None else x.to(weight.dtype)
        y = self.module(seen)
        if y.shape != x.shape:
            raise ValueError(
                f"a residual branch must keep the shape: {tuple(x.shape)} became {tuple(y.shape)}; "
                "put what changes the shape between the towers"
            )
        if self.residual_dtype is not None:
            y = y.to(self.residual_dtype)
        return scaled_add(stream, y, self.branch_scale)

    def fold(self) -> Residual:
        """Multiplies the factor into the branch's last linear layer, for inference: same function, other training."""
        last: Any = self.module
        while isinstance(last, nn.Sequential) and len(last):
            last = last[-1]
        if not _foldable(last):
            raise ValueError(
                f"the branch ends in {type(last).__name__}; only a linear, convolution or norm can be folded"
            )
        _multiply(last, self.branch_scale)
        self.branch_scale, self.scale_mode = _set_plain(self, 1.0), 1.0
        return self

    def extra_repr(self) -> str:
        return f"scale={self.scale_mode!r}, n={self.scale_n}"


def _set_plain(module: nn.Module, value: float) -> float:
    module._parameters.pop("branch_scale", None)
    return value


def _foldable(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    known = isinstance(module, kinds) or type(module).__name__.removeprefix("Scaled") in ("Conv1D", "NormBias")
    return known and (getattr(module, "weight", None) is not None or getattr(module, "bias", None) is not None)


def _multiply(module: nn.Module, value: float | Tensor) -> None:
    with torch.no_grad():
        for key in ("weight", "bias"):
            parameter = module._parameters.get(key)
            if parameter is not None:
                parameter.mul_(value)


class Scaled(_HoldsScale):
    """What a branch's last module becomes: the same module with its output multiplied by ``branch_scale``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * self.branch_scale

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (type(self).original,), self.__dict__  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        inner = super().extra_repr()
        value = self.branch_scale
        shown = f"scale={self.scale_mode!r}" if isinstance(value, Tensor) else f"scale={value:.4g}"
        return f"{inner}, {shown}" if inner else shown


@cache
def _subclass(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Scaled{original.__name__}", (Scaled, original), {"original": original})


def _revive(original: type[nn.Module]) -> nn.Module:
    kind: Any = _subclass(original)
    return kind.__new__(kind)


def scaled(module: nn.Module, mode: Any, n: int, value: float) -> nn.Module:
    """A module that shares the children, buffers and parameters of ``module`` and multiplies its output."""
    kind: Any = _subclass(
        getattr(type(module), "original", type(module)) if isinstance(module, Scaled) else type(module)
    )
    new: Any = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    new.__dict__["_parameters"] = dict(module._parameters)
    if isinstance(module, Scaled):
        new._parameters.pop("branch_scale", None)
        new.__dict__.pop("branch_scale", None)
    new._start_scale(mode, n, value)
    return new


def fold(model: nn.Module) -> nn.Module:
    """Multiplies every factor into the weights of the layer that carries it, in place, for inference; returns the model.

    The function stays the same and its training does not, so fold last. A factor behind dropout (torch.nn layers) stays.
    Fold weights that are tied to another module only after untying them.
    """
    for owner in list(model.modules()):
        for key, child in list(owner._modules.items()):
            if isinstance(child, Residual):
                inner: Any = child.module
                while isinstance(inner, nn.Sequential) and len(inner):
                    inner = inner[-1]
                if _foldable(inner):
                    child.fold()
            elif isinstance(child, Scaled) and _foldable(child):
                _multiply(child, child.branch_scale)
                original: Any = type(child).original  # type: ignore[attr-defined]
                plain = original.__new__(original)
                plain.__dict__.update(child.__dict__)
                plain._parameters.pop("branch_scale", None)
                for name in ("branch_scale", "scale_mode", "scale_n"):
                    plain.__dict__.pop(name, None)
                owner._modules[key] = plain
    return model


class NormBias(nn.Module):
    """What stays of a removed norm: its bias, or a new one started at 0 where the norm's centring stood in for it."""

    def __init__(self, bias: nn.Parameter, channel_dim: bool) -> None:
        super().__init__()
        self.bias = bias
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_dim:
            return x + self.bias.view(-1, *[1] * (x.dim() - 2))
        return x + self.bias


def without_norm(norm: nn.Module) -> nn.Module:
    """The module that takes a norm's place: its bias alone, or the identity for a norm that neither centres nor shifts."""
    bias = getattr(norm, "bias", None)
    channels = isinstance(norm, nn.GroupNorm | nn.modules.batchnorm._NormBase)
    if not isinstance(bias, nn.Parameter):
        shape = getattr(norm, "normalized_shape", None) or getattr(norm, "num_features", None)
        shape = shape or getattr(norm, "num_channels", None)
        if shape is None or "RMS" in type(norm).__name__:
            return nn.Identity()
        bias = nn.Parameter(torch.zeros(shape))
    return NormBias(bias, channels)


@dataclass(frozen=True)
class ScaleResiduals(Technique):
    """Multiplies every residual branch of a model by a factor below 1.

    Args:
        scale: "1/sqrt(n)" keeps random networks balanced at the start, "1/n" keeps any network bounded; a number; a list with
            one number a branch; "learnable" (one scalar a branch, started at 1/sqrt(n)); "zero" (SkipInit, started at 0).
            Keep learned scalars out of weight decay.
        n: the number of branches on the stream; counted by default. With pipeline parallelism give the global count.
        remove_norm: norms are replaced by their bias alone.
        per_stage: count n between shortcut projections (staged CNNs) instead of in total.
        layers: globs on the names of the branch ends to scale; all by default.

    Raises:
        ValueError: n <= 0, an unknown mode, a list of the wrong length, or (without ``layers``) a branch that ends in a function
            such as ``F.relu``, so that no module can carry its factor.
        NothingToChange: no residual addition was found.

    Source: "On residual network depth", 2025, arXiv 2510.03470.
    """

    scale: Any = "1/sqrt(n)"
    n: int | None = None
    remove_norm: bool = False
    per_stage: bool = False
    layers: Any = None

    looks_for: ClassVar[str] = "additions of a branch to a residual stream"

    def __post_init__(self) -> None:
        if isinstance(self.scale, list):
            object.__setattr__(self, "scale", tuple(self.scale))
        factors(self.scale, 1 if self.n is None else self.n, len(self.scale) if isinstance(self.scale, tuple) else 1)

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        allowed = {id(site.module) for site in sites}
        additions = find_additions(model)
        if self.layers is None:
            _refuse_obstacles(additions)
        chosen = [a for a in additions if id(a.end) in allowed and _named(a.name, self.layers)]
        if not chosen:
            return []
        curved = [a.name for a in chosen if a.activation_after]
        if curved:
            warnings.warn(
                f"{len(curved)} additions are followed by an activation ({curved[0]}, ...): the network is not of the tower "
                "form, so the laws of depth hold only between the activations; pre-activation blocks have that form",
                NotTowerFormWarning,
                stacklevel=4,
            )
        # the count is the stream's, also where only some branches are scaled
        counts = [self.n or _stream_count(a, additions, self.per_stage) for a in chosen]
        starts = list(self.scale) if isinstance(self.scale, tuple) else [None] * len(chosen)
        if len(starts) != len(chosen):
            raise ValueError(
                f"a list of scales needs one number a branch: {len(starts)} were given for {len(chosen)} branches"
            )
        edits: list[Edit] = []
        ends: dict[int, tuple[Addition, Any, int, float]] = {}
        for addition, n, start in zip(chosen, counts, starts, strict=True):
            mode = self.scale if start is None else float(start)
            value = factors(mode, n, 1)[0]
            before = ends.get(id(addition.end))
            if before is not None and (is_learned(mode) or before[3] != value):
                raise ValueError(
                    f"{addition.name} ends several branches, so they must share one constant factor; "
                    f"scale={self.scale!r} gives each its own"
                )
            ends[id(addition.end)] = (addition, mode, n, value)
        if self.remove_norm:
            for site in sites:
                if is_norm(site.module) and id(site.module) not in ends:
                    edits.append(Swap(model, site.name, site.module, without_norm(site.module)))
        for addition, mode, n, value in ends.values():
            end = addition.end
            assert end is not None  # those with an obstacle are not among the chosen
            if isinstance(end, Residual):
                new: nn.Module = Residual(end.module, 1.0, n, end.residual_dtype)
                new._start_scale(mode, n, value)  # type: ignore[operator]
                new.train(end.training)
            else:
                host = without_norm(end) if self.remove_norm and is_norm(end) else end
                host.train(end.training)
                new = scaled(host, mode, n, value)
            reference = next((p for p in model.parameters() if p.is_floating_point()), None)
            factor = new._parameters.get("branch_scale")
            if factor is not None and reference is not None:
                factor.data = factor.data.to(reference.device, reference.dtype)
            edits.append(Swap(model, addition.name, end, new))
            if addition.fast_path is not None:
                # the fused inference path of torch.nn reads the weights and would pass over the factor
                edits.append(SetAttribute(addition.fast_path, "activation_relu_or_gelu", 0, name=addition.name))
        return [*edits, *record(model, self, sites)]


def _refuse_obstacles(additions: Sequence[Addition]) -> None:
    blocked = [a for a in additions if a.obstacle is not None]
    if blocked:
        raise ValueError(
            f"{len(blocked)} of {len(additions)} residual branches cannot be scaled: the one at {blocked[0].name} "
            f"{blocked[0].obstacle}; let every branch end in a module of its own, or name the branches to scale with layers="
        )


def _named(name: str, layers: Any) -> bool:
    from fnmatch import fnmatchcase

    patterns = [layers] if isinstance(layers, str) else layers
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def _stream_count(addition: Addition, additions: Sequence[Addition], per_stage: bool) -> int:
    """The branches on the same stream: of a model with several, an encoder's and a decoder's are counted apart."""
    same = [other for other in additions if other.stream == addition.stream]
    return sum(other.stage == addition.stage for other in same) if per_stage else len(same)
