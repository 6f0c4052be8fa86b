"""Normalize-and-Project: every scale-invariant weight goes back to the sphere it began on, so that the rate you write is the rate
you get.

A weight W in front of a normalisation acts through its direction alone; it grows as it is trained, and its effective rate
eta / ||W||^2 (SGD) or eta / ||W|| (Adam) falls, whatever the schedule says. After every optimiser step

    W <- rho W / ||W||,    rho = ||W|| at the start (the whole tensor, one number)
    sigma <- sigma - lr wd (sigma - 1),   mu <- (1 - lr wd) mu       the norm's gain and offset, ``scale_offset="decay"``
    (sigma, mu) <- (sigma, mu) sqrt(rho_s / (||sigma||^2 + ||mu||^2))    "joint", for positively homogeneous activations

Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney: "Normalization and effective learning rates in reinforcement
learning", 2024 (arXiv 2407.01800). For long or changing training (reinforcement, continual learning) that loses the ability to
learn, and to study schedules. Not without a schedule where the implicit decay is what makes training work: at a constant, too high
rate results get worse. The coefficient of "decay", ``per="row"`` and ``tangent`` are ours.

Nothing happens in the forward pass: the model is exported as it is. No value is asked from the device, so a projection may be
captured in a CUDA graph. With ``torch.optim.Adam`` or ``AdamW``, ``fused=True``, on a CPU, step and projection are one pass over the
weights (:mod:`headway.weights.one_pass`).
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.optim.effective import effective_rates, follows_gradient_size
from headway.weights import spheres
from headway.weights.invariance import HOMOGENEOUS, followed_by_norm, links, output_changes
from headway.weights.one_pass import OnePass
from headway.weights.transformer_norms import is_conv1d

_SMALL = 1e-12


class NaP:
    """Keeps the norms of weights. ``attach(optimizer)`` projects after its every step; ``project()`` does it by hand.

    Args:
        model_or_named_params: a model, whose linear maps and convolutions straight before a normalisation are taken, or pairs
            (name, parameter), whose matrices are all taken.
        every: project every so many steps.
        scale_offset: "decay", "joint" or "none": the rule for the norms' gains and offsets.
        include, exclude: globs on names: ``include`` adds weights of the model, ``exclude`` leaves some out.
        per: "tensor" (the paper), or "row": every output unit keeps its own norm.
        decay: coefficient of "decay".
        tangent: also take the radial part out of the optimiser's momentum.

    Raises:
        ValueError: a setting out of range, or "joint" before an activation that is not positively homogeneous.
    """

    def __init__(
        self,
        model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]],
        every: int = 1,
        scale_offset: Literal["decay", "joint", "none"] = "decay",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        per: Literal["tensor", "row"] = "tensor",
        *,
        decay: float = 1e-2,
        tangent: bool = False,
    ) -> None:
        if int(every) != every or every < 1:
            raise ValueError(f"every is a whole number of steps, at least 1; it is {every!r}")
        if scale_offset not in ("decay", "joint", "none") or per not in ("tensor", "row"):
            raise ValueError(
                f'scale_offset is "decay", "joint" or "none" and per "tensor" or "row", not {scale_offset!r} and {per!r}'
            )
        self.every, self.scale_offset, self.per, self.decay, self.tangent = (
            int(every),
            scale_offset,
            per,
            decay,
            tangent,
        )
        self.affine: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._rest: dict[str, float] = {}
        if isinstance(model_or_named_params, nn.Module):
            chosen = self._of_model(model_or_named_params, _globs(include), _globs(exclude))
        else:
            chosen = {n: p for n, p in model_or_named_params if p.dim() > 1 and not _matches(n, _globs(exclude))}
        seen: set[int] = set()
        # tied weights once, under their first name; vectors and numbers never
        self.weights = {n: p for n, p in chosen.items() if p.dim() > 1 and not (id(p) in seen or seen.add(id(p)))}
        with torch.no_grad():
            self.rho = {name: spheres.norm(p.detach(), per == "row") for name, p in self.weights.items()}
            self.rho_scale = {name: _pair_norm(*pair) for name, pair in self.affine.items()}
        for name, rho in self.rho.items():
            if not bool((rho > 0).any()):
                warnings.warn(f"{name} is zero and stays zero: it has no direction to keep", stacklevel=2)
        self.steps = 0
        self._missed: dict[torch.device, Tensor] = {}
        self._handles: list[Any] = []
        self._one_pass = OnePass(self)

    def _of_model(self, model: nn.Module, include: list[str], exclude: list[str]) -> dict[str, Tensor]:
        params, modules = dict(model.named_parameters()), dict(model.named_modules())
        found = followed_by_norm(model)
        names = [n for n in params if (n in found or _matches(n, include)) and not _matches(n, exclude)]
        turned = [n for n in names if is_conv1d(modules[n.rpartition(".")[0]])]
        if turned and self.per == "row":
            raise ValueError(
                f'per="row" takes the first axis for the output units, and {turned[0]} keeps them last; use per="tensor"'
            )
        if self.scale_offset == "none":
            return {n: params[n] for n in names}
        following = _activations(model)
        for name in names:
            norm = found.get(name)
            if norm is None or getattr(modules[norm], "weight", None) is None:
                continue
            self.affine[norm] = modules[norm].weight, getattr(modules[norm], "bias", None)  # type: ignore[assignment]
            self._rest[norm] = _resting_gain(modules[norm])
            after = following.get(norm)
            if self.scale_offset == "joint" and not isinstance(after, HOMOGENEOUS):
                kind = "no module that can be seen" if after is None else type(after).__name__
                raise ValueError(
                    f'scale_offset="joint" needs ReLU, LeakyReLU or Identity after the norm {norm}, and {kind} follows; '
                    'use "decay" or "none"'
                )
        return {n: params[n] for n in names}

    # --- projecting

    @torch.no_grad()
    def project(self) -> None:
        """Puts every weight back on its sphere. A norm that is not finite leaves its tensor alone and is counted (``skipped``)."""
        self._project(self.weights)

    def _project(self, names: Iterable[str]) -> None:
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name in names:
            p = self.weights[name]
            params, rho = groups.setdefault((p.device, p.dtype, spheres.served(p)), ([], []))
            params.append(p.detach())
            rho.append(self.rho[name])
        for (device, *_), (params, rho) in groups.items():
            spheres.project_(params, rho, self.missed(device), self.per == "row")

    def missed(self, device: torch.device) -> Tensor:
        """How many norms on a device were not finite, 0-dim int64: what projections there add to."""
        if device not in self._missed:
            self._missed[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._missed[device]

    def due(self) -> bool:
        """Whether the next step of the optimiser is one that ends in a projection."""
        return (self.steps + 1) % self.every == 0

    @property
    def skipped(self) -> int:
        """How many projections met a norm that was not finite; waits for the device."""
        return sum(map(int, self._missed.values()))

    @torch.no_grad()
    def balance(self, optimizer: Optimizer | None = None) -> None:
        """The rule for gains and offsets; "decay" takes each one's learning rate from the optimiser."""
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]} if optimizer is not None else {}
        for name, (gain, offset) in self.affine.items():
            if self.scale_offset == "joint":
                factor = (self.rho_scale[name].to(gain.device) / _pair_norm(gain, offset).clamp(min=_SMALL)).sqrt()
                for part in (gain, offset):
                    if part is not None:
                        part.mul_(factor.to(part.dtype))
            elif self.scale_offset == "decay":
                if id(gain) in rates:
                    gain.sub_((gain - self._rest[name]) * (rates[id(gain)] * self.decay))
                if offset is not None and id(offset) in rates:
                    offset.mul_(1 - rates[id(offset)] * self.decay)

    # --- in a training loop

    def attach(self, optimizer: Optimizer) -> NaP:
        """Projects after every step of ``optimizer`` (``every``), and travels in its ``state_dict`` as "nap_state". Weight decay
        on projected weights is set to 0, with a warning: they get a parameter group of their own."""
        _without_decay(optimizer, self.weights)
        self._handles = [
            *self._one_pass.attach(optimizer),
            optimizer.register_step_post_hook(lambda opt, args, kwargs: self._after(opt)),
            optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "nap_state": self.state_dict()}),
            optimizer.register_load_state_dict_pre_hook(self._take_state),
        ]
        return self

    def detach(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        due = self.due()
        self.steps += 1
        if due:
            self._project(name for name in self.weights if name not in self._one_pass.done)
            if self.tangent:
                self._turn_momentum(optimizer)
        self.balance(optimizer)

    @torch.no_grad()
    def _turn_momentum(self, optimizer: Optimizer) -> None:
        for p in self.weights.values():
            for name in ("exp_avg", "momentum_buffer"):
                m = optimizer.state.get(p, {}).get(name)
                if m is not None:
                    dims = tuple(range(1, p.dim())) if self.per == "row" else tuple(range(p.dim()))
                    along = (p * m).sum(dims, keepdim=True) / p.square().sum(dims, keepdim=True).clamp(min=_SMALL)
                    m.sub_(along * p)

    def _take_state(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        if "nap_state" in saved:
            saved = dict(saved)
            self.load_state_dict(saved.pop("nap_state"))
        return saved

    def state_dict(self) -> dict[str, Any]:
        """The norms at the start and the count of steps; loading never measures them anew."""
        return {"rho": dict(self.rho), "rho_scale": dict(self.rho_scale), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError for names this model does not have, or lacks."""
        for part, own in (("rho", self.rho), ("rho_scale", self.rho_scale)):
            if set(state[part]) != set(own):
                odd = sorted(set(state[part]) ^ set(own))
                raise KeyError(
                    f"the saved state and this model differ in {', '.join(odd)}; build NaP with the same settings"
                )
            own.update({name: torch.as_tensor(value).clone() for name, value in state[part].items()})
        self.steps = int(state["steps"])

    def elr(self, optimizer: Optimizer) -> dict[str, float]:
        """{name: effective learning rate}: eta / ||W||^2 for SGD and its kin, eta / ||W|| for the others."""
        return effective_rates(optimizer, self.weights)


def apply_nap(
    model: nn.Module, optimizer: Optimizer, example_input: Any = None, tol: float = 1e-2, **settings: Any
) -> NaP:
    """Finds the scale-invariant weights of a model, checks them on ``example_input`` where one is given, and attaches.

    Raises:
        ValueError: none was found, or a selected weight is not scale invariant (with the relative change of the output).
    """
    nap = NaP(model, **settings)
    if not nap.weights:
        raise ValueError(
            "no weight of this model goes straight into a normalisation; insert some with hw.apply(model, "
            "hw.NormalizeAndProject(), optimizer=optimizer), or name weights with include="
        )
    if example_input is not None:
        changes = output_changes(model, example_input, list(nap.weights))
        if wrong := {name: change for name, change in changes.items() if change > tol}:
            listed = ", ".join(f"{name} ({change:.2g})" for name, change in wrong.items())
            raise ValueError(
                f"not scale invariant, by the relative change of the output when doubled: {listed}; exclude them"
            )
    return nap.attach(optimizer)


def rescaled_lr(optimizer: Optimizer, nap: NaP) -> list[Any]:
    """The twin for analysis: no projection, but each weight's rate is multiplied by (||W|| / rho)^2 (SGD) or ||W|| / rho (others)
    at every step. With plain SGD and norms without eps it computes the same functions as projecting. Returns the hooks."""
    power = 2 if follows_gradient_size(optimizer) else 1
    groups: list[tuple[dict[str, Any], str]] = []
    for name, p in nap.weights.items():
        for group in list(optimizer.param_groups):
            if any(q is p for q in group["params"]):
                group["params"] = [q for q in group["params"] if q is not p]
                own = {**group, "params": [p]}
                optimizer.param_groups.append(own)
                groups.append((own, name))
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    bases: list[Any] = []

    def before(*call: Any) -> None:
        bases[:] = [group["lr"] for group, _ in groups]
        for group, name in groups:
            group["lr"] = group["lr"] * float(spheres.norm(nap.weights[name].detach(), False) / nap.rho[name]) ** power

    def after(*call: Any) -> None:
        for (group, _), base in zip(groups, bases, strict=True):
            group["lr"] = base

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def _without_decay(optimizer: Optimizer, weights: dict[str, Tensor]) -> None:
    mine = {id(p): name for name, p in weights.items()}
    moved: list[str] = []
    for group in list(optimizer.param_groups):
        if not group.get("weight_decay"):
            continue
        own = [p for p in group["params"] if id(p) in mine]
        if own:
            moved += [mine[id(p)] for p in own]
            rest = [p for p in group["params"] if id(p) not in mine]
            if rest:
                group["params"] = rest
                optimizer.param_groups.append({**group, "params": own, "weight_decay": 0.0})
            else:
                group["weight_decay"] = 0.0
    if moved:
        warnings.warn(
            f"weight decay is set to 0 for {', '.join(moved)}: it does nothing to a weight that is projected",
            stacklevel=3,
        )


def _activations(model: nn.Module) -> dict[str, nn.Module]:
    """{name of a norm after a linear map: the module that follows it}."""
    modules, found = dict(model.named_modules()), {}
    for link in links(model):
        inner = modules[link.next] if link.next else None
        if isinstance(inner, nn.Sequential) and len(inner) > 1:
            found[f"{link.next}.{next(iter(dict(inner.named_children())))}"] = inner[1]
        elif link.next and link.after:
            found[link.next] = modules[link.after]
    return found


def _pair_norm(gain: Tensor, offset: Tensor | None) -> Tensor:
    """||sigma||^2 + ||mu||^2, 0-dim."""
    total: Any = sum(spheres.square(part.detach()) for part in (gain, offset) if part is not None)
    return total


def _resting_gain(norm: nn.Module) -> float:
    """The stored gain that leaves a norm's output alone: 0 where it is read as 1 + weight (the Gemma family), else 1."""
    offset = 1 if "Gemma" in type(norm).__name__ else getattr(norm, "gain_offset", 0)
    return 1.0 - float(offset)  # type: ignore[arg-type]


def _globs(given: str | Sequence[str] | None) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
