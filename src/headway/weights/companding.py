"""A whole model under weight companders: which weights, the optimiser's groups, decay on the weights themselves, and the way back."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from headway.checkpoints import record
from headway.kernels.compander import MAPS
from headway.surgery import Edit, Site, Technique
from headway.weights.compander import (
    Granularity,
    WeightCompander,
    channel_dim,
    compander_of,
    remove_weight_compander,
    weight_compander,
)

_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
_RATE = {"sgd": 1e-3, "adam": 1e-1}


def weights_of(module: nn.Module, embeddings: bool = False) -> list[str]:
    """Names of the weights of one module that a compander goes on: matrices of linear layers, convolutions, recurrent cells and
    attention. ``nn.LSTM`` and its kin hold their weights in a list of their own that no parametrization reaches."""
    if isinstance(module, _MATRICES) or type(module).__name__ == "Conv1D":
        names = ["weight"]
    elif isinstance(module, nn.RNNCellBase):
        names = ["weight_ih", "weight_hh"]
    elif isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    elif embeddings and isinstance(module, nn.Embedding):
        names = ["weight"]
    else:
        names = []
    found = [(name, module._parameters.get(name)) for name in names]
    return [name for name, p in found if p is not None and p.dim() >= 2 and p.numel() > 1 and p.is_floating_point()]


class Compand(Edit):
    """Puts one compander on one weight and takes it off again."""

    def __init__(self, owner: nn.Module, key: str, name: str, compander: WeightCompander, tied: bool) -> None:
        self.owner, self.key, self.name, self.compander, self._tied = owner, key, name, compander, tied
        self.weight: nn.Parameter = owner._parameters[key]  # type: ignore[assignment]
        self._order = list(owner._parameters)
        self._before: Tensor | None = None

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        # a and b need a rate of their own, so that they do not join the weight's group
        return [self.weight], [self.weight]

    def do(self) -> None:
        if self._tied:
            # the weight already holds v, put there by the first place it stands in
            with _values_as_they_are(self.compander):
                weight_compander(self.owner, self.key, compander=self.compander)
            return
        self._before = self.weight.detach().clone()
        weight_compander(self.owner, self.key, compander=self.compander)
        self._v = self.weight._version

    def undo(self) -> None:
        from torch.nn.utils import parametrize

        if self._tied:
            parametrize.remove_parametrizations(self.owner, self.key, leave_parametrized=False)
        else:
            assert self._before is not None
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                untouched = torch.equal(self.compander.right_inverse(self._before), self.weight)
            remove_weight_compander(self.owner, self.key)
            if untouched:
                with torch.no_grad():
                    self.weight.copy_(self._before)
            self._before = None
        held = self.owner._parameters
        for key in self._order:
            if key in held:
                held[key] = held.pop(key)

    def describe(self) -> tuple[str, str]:
        a, b = (float(t.detach().exp().mean()) for t in (self.compander.log_a, self.compander.log_b))
        clamped = f", {self.compander.clamped} clamped" if self.compander.clamped else ""
        shape = tuple(self.weight.shape)
        return f"parameter {shape}", f"{self.compander.map} compander, a={a:.3g}, b={b:.3g}{clamped}"


class _values_as_they_are:
    """Within it, registering a compander leaves the values of the tensor as they are."""

    def __init__(self, compander: WeightCompander) -> None:
        self.compander = compander

    def __enter__(self) -> None:
        self.compander.right_inverse = lambda v: v  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self.compander.right_inverse


@dataclass(frozen=True)
class CompandWeights(Technique):
    """Puts every weight matrix of a model through ``w = a * arctan(v / b)``.

    Args:
        c, slope: a = c * std(w), b = a / slope. c = 1.5 with slope = 1.5 regularises harder than the default.
        learn: train a and b too. They then need a much smaller rate than the weights: build the optimiser with
            :func:`param_groups`. They do not join the groups of ``optimizer=``.
        granularity: "tensor" or "channel": one a and b for each output channel.
        map: "arctan", or an ablation: "tanh", "softsign", "mu-law", "power", "identity".
        exclude: globs on names of modules to leave alone, as ("head", "*.head").
        embeddings: also compand embeddings.

    Weights stay as they are but for those beyond the range, which are clamped; a warning tells of more than 1 %. Biases, norms,
    tensors of one entry, and weights tied to something left alone (an embedding) are left alone.

    Raises:
        ValueError: c or slope not above 0, an unknown map or granularity, or a weight that has a compander already.
        NothingToChange: there is no weight to compand.
    """

    c: float = 3.0
    slope: float = 1.0
    learn: bool = False
    granularity: Granularity = "tensor"
    map: str = "arctan"
    exclude: Any = ("head",)
    embeddings: bool = False

    looks_for: ClassVar[str] = "weights of linear layers, convolutions, recurrent cells or attention"

    def __post_init__(self) -> None:
        exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude or ())
        object.__setattr__(self, "exclude", exclude)
        # says at once what is out of range
        WeightCompander.for_weight(torch.ones(2, 2), self.c, self.slope, self.learn, self.granularity, self.map)

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        places = [
            (site, key)
            for site in sites
            if not any(fnmatch.fnmatchcase(site.name, glob) for glob in self.exclude)
            for key in weights_of(site.module, self.embeddings)
        ]
        for site in sites:
            if any(True for _ in _companders(site.module, recurse=False)):
                raise ValueError(f"{site.name} has a compander already; take it off first with hw.undo(model)")
        chosen = {(id(site.module), key) for site, key in places}
        shared_with = {
            id(p)
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None and (id(module), key) not in chosen
        }
        made: dict[int, WeightCompander] = {}
        found: list[Edit] = []
        for site, key in places:
            weight = site.module._parameters[key]
            assert weight is not None
            if id(weight) in shared_with:
                continue
            tied = id(weight) in made
            if not tied:
                made[id(weight)] = WeightCompander.for_weight(
                    weight, self.c, self.slope, self.learn, self.granularity, self.map, channel_dim(site.module)
                )
            name = f"{site.name}.{key}".lstrip(".")
            found.append(Compand(site.module, key, name, made[id(weight)], tied))
        return [*found, *record(model, self, sites)] if found else []


def _companders(model: nn.Module, recurse: bool = True) -> Iterator[tuple[str, nn.Module, str, WeightCompander]]:
    """(qualified name, module, key, compander) of every companded weight."""
    for name, module in model.named_modules() if recurse else [("", model)]:
        for key in list(getattr(module, "parametrizations", {})):
            compander = compander_of(module, key)
            if compander is not None:
                yield f"{name}.{key}".lstrip("."), module, key, compander


def _latent(module: nn.Module, key: str) -> nn.Parameter:
    return module.parametrizations[key].original  # type: ignore[index, union-attr]


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    ab_lr_factor: float | None = None,
    optimizer: Literal["sgd", "adam"] = "sgd",
    decay_on: Literal["v", "w"] = "v",
    normalize_lr: bool = False,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: companded weights; a and b with a small rate, no decay, and gradients clipped at 1; all the rest.

    Args:
        model: under companders.
        lr, weight_decay: of the weights.
        ab_lr_factor: rate of a and b over ``lr``; 1e-3 for SGD and 1e-1 for Adam by default.
        optimizer: which of the two defaults.
        decay_on: "v" lets the optimiser shrink v; with "w" add :func:`weight_penalty` to the loss instead.
        normalize_lr: divide the rate of each companded weight by the square of its slope a / b at 0, as it is now.

    Raises:
        ValueError: no weight has a compander, or a word is unknown.
    """
    if optimizer not in _RATE or decay_on not in ("v", "w"):
        raise ValueError(f'optimizer is "sgd" or "adam", decay_on "v" or "w"; {optimizer!r}, {decay_on!r} were given')
    factor = _RATE[optimizer] if ab_lr_factor is None else ab_lr_factor
    latent: dict[nn.Parameter, float] = {}
    ab: dict[nn.Parameter, None] = {}
    for _, module, key, compander in _companders(model):
        slope = float((compander.log_a - compander.log_b).detach().exp().mean())
        # rounded, so that weights of one slope share a group
        latent[_latent(module, key)] = float(f"{slope:.5g}") if normalize_lr else 1.0
        ab.update(dict.fromkeys(compander.parameters()))
    if not latent:
        raise ValueError("no weight of this model has a compander; apply hw.CompandWeights() first")
    for parameter in ab:
        if not getattr(parameter, "_clipped", False):
            parameter.register_hook(lambda g: g.clamp(-1, 1))
            parameter._clipped = True  # type: ignore[attr-defined]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p, s in latent.items() if s == slope],
            "lr": lr / slope**2,
            "weight_decay": weight_decay if decay_on == "v" else 0.0,
        }
        for slope in dict.fromkeys(latent.values())
    ]
    if ab:
        groups.append({"params": list(ab), "lr": lr * factor, "weight_decay": 0.0})
    rest = [p for p in model.parameters() if p not in latent and p not in ab]
    if rest:
        groups.append({"params": rest, "lr": lr, "weight_decay": weight_decay})
    return groups


def weight_penalty(model: nn.Module, weight_decay: float) -> Tensor:
    """``weight_decay / 2 * sum of w^2`` over the companded weights, to be added to the loss: decay on w, not on v.

    Raises:
        ValueError: no weight has a compander.
    """
    seen: dict[int, Tensor] = {}
    for _, module, key, _ in _companders(model):
        if id(_latent(module, key)) not in seen:
            seen[id(_latent(module, key))] = getattr(module, key).square().sum()
    if not seen:
        raise ValueError("no weight of this model has a compander; apply hw.CompandWeights() first")
    return weight_decay / 2 * torch.stack(list(seen.values())).sum()


@torch.no_grad()
def clip_latent_(model: nn.Module, limit: float = 20.0) -> nn.Module:
    """Brings every v back within ``limit * b`` in place, where its gradient has not died; call it after a step."""
    for _, module, key, compander in _companders(model):
        v = _latent(module, key)
        edge = (limit * compander.a_b(v.dim())[1]).to(v.dtype)
        v.copy_(torch.minimum(torch.maximum(v, -edge), edge))
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Bakes all companded weights in, in place, as plain parameters; returns the model, whose outputs stay the same bit for bit."""
    shared: dict[int, Tensor] = {}
    for _, module, key, _ in list(_companders(model)):
        latent = _latent(module, key)
        if id(latent) in shared:
            from torch.nn.utils import parametrize

            parametrize.remove_parametrizations(module, key, leave_parametrized=False)
        else:
            shared[id(latent)] = latent
            remove_weight_compander(module, key)
    return model


@torch.no_grad()
def export_plain(model: nn.Module) -> dict[str, Tensor]:
    """An ordinary state dict, under the names the model has without companders; the model keeps them."""
    state = dict(model.state_dict())
    for name, module, key, _ in _companders(model):
        prefix = name.removesuffix(key)
        inner = f"{prefix}parametrizations.{key}."
        state = {k: v for k, v in state.items() if not k.startswith(inner)}
        state[name] = getattr(module, key).detach().clone()
    return state


@dataclass(frozen=True)
class Spread:
    """How one weight spreads its magnitude.

    Attributes:
        name: of the weight.
        largest: largest |w| over the standard deviation.
        near_zero: share of entries below a tenth of the standard deviation.
        effective: effective number of weights, (sum |w|)^2 / sum w^2.
        entries: how many there are.
        saturated: share of entries beyond 95 % of the map's bound; 0 without one.
    """

    name: str
    largest: float
    near_zero: float
    effective: float
    entries: int
    saturated: float


@torch.no_grad()
def histogram_report(model: nn.Module) -> list[Spread]:
    """One :class:`Spread` a weight that has a compander or could have one; each tied weight once."""
    found: list[Spread] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        keys = [*weights_of(module), *(key for _, _, key, _ in _companders(module, recurse=False))]
        for key in keys:
            compander = compander_of(module, key)
            parameter = _latent(module, key) if compander is not None else module._parameters[key]
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            w = getattr(module, key).detach().double().abs()
            spread = getattr(module, key).detach().double().std(correction=0)
            saturated = 0.0
            if compander is not None:
                # clamped entries stand at 95 % itself, give or take a rounding
                edge = 0.9499 * MAPS[compander.map].bound * compander.a_b(w.dim())[0]
                saturated = (w > edge).double().mean().item()
            squares = w.square().sum()
            found.append(
                Spread(
                    f"{name}.{key}".lstrip("."),
                    (w.max() / spread).item() if spread > 0 else 1.0,
                    (w < 0.1 * spread).double().mean().item(),
                    (w.sum() ** 2 / squares).item() if squares > 0 else 0.0,
                    w.numel(),
                    saturated,
                )
            )
    return found
