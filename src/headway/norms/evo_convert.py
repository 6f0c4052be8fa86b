"""EvoNorm in a model you already have: every normalisation with the activation after it becomes one layer.

    model = hw.apply(model, hw.EvoNorm("S0"))

A batch or group norm whose output goes into one activation alone is replaced together with it; a norm that no activation follows
becomes the layer's ``apply_act=False`` form. gamma and beta are the norm's own parameters; the network has to be trained (on), its
function is another one. Liu et al., 2020, arXiv 2004.02967; the layers: :mod:`headway.norms.evo`. The paper's residual networks
are pre-activation, and its released code refuses others: a norm that feeds an addition brings a warning.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from headway.norms import evo
from headway.surgery import Edit, Site, Swap, Technique, apply, like
from headway.weights.invariance import ACTIVATIONS

Kind = Literal["B0", "B1", "B2", "S0", "S1", "S2"]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class _Found:
    """A norm and what its output goes into: the activation to take out with it (None: none), or what is in the way."""

    norm: str
    activation: str | None = None
    obstacle: str = ""
    adds: bool = False


@dataclass(frozen=True)
class EvoNorm(Technique):
    """Replaces each batch or group norm, and the activation that alone reads it, by one EvoNorm layer.

    Attributes:
        to: "S0", "S1", "S2" (no batch statistics, any batch size) or "B0", "B1", "B2" (large batches).
        groups, group_size: of the S series, as the layers have them.
        keep_linear: a norm that no activation follows becomes ``apply_act=False``; False leaves it the norm it is.
        linear_mode: what ``apply_act=False`` computes: "affine" (released code) or "normalize".
        eps: inside every root.
        momentum, unbiased_running, sync: of the B series.

    A norm read by a functional activation (``F.relu``), or by an activation module that also reads something else, cannot lose it
    and stays, with a warning that names it: give it a module of its own.

    Raises:
        ValueError: a layer that does not exist, or settings the layers refuse.
    """

    to: Kind = "S0"
    groups: int = 32
    group_size: int | None = None
    keep_linear: bool = True
    linear_mode: evo.LinearMode = "affine"
    eps: float = 1e-5
    momentum: float = 0.1
    unbiased_running: bool = False
    sync: bool = False

    looks_for: ClassVar[str] = "batch or group norms of images, with the activation that alone reads them"

    def __post_init__(self) -> None:
        if self.to not in ("B0", "B1", "B2", "S0", "S1", "S2"):
            raise ValueError(f'to is "B0", "B1", "B2", "S0", "S1" or "S2"; it is {self.to!r}')

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        by_name = {site.name: site for site in sites}
        found: list[Edit] = []
        taken: set[str] = set()
        blocked, added = [], []
        for each in _pairs(model, set(by_name)):
            if each.obstacle:
                blocked.append(f"{each.norm} ({each.obstacle})")
                continue
            if each.activation is None and not self.keep_linear:
                continue
            if each.adds:
                added.append(each.norm)
            site = by_name[each.norm]
            found.append(Swap(model, each.norm, site.module, like(site, self._layer(site.module, each.activation))))
            if each.activation is not None and each.activation not in taken:
                taken.add(each.activation)
                found.append(Swap(model, each.activation, model.get_submodule(each.activation), nn.Identity()))
        if blocked:
            warnings.warn(f"left as they are: {', '.join(blocked)}", stacklevel=4)
        if added:
            warnings.warn(
                f"{', '.join(added)} feed an addition: the paper's residual networks are pre-activation (norm, activation, "
                "convolution), and its released code refuses others",
                stacklevel=4,
            )
        return found

    def _layer(self, norm: Any, activation: str | None) -> nn.Module:
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
        settings: dict[str, Any] = {
            "apply_act": activation is not None,
            "eps": self.eps,
            "linear_mode": self.linear_mode,
        }
        if self.to.startswith("S"):
            settings |= {"groups": self.groups, "group_size": self.group_size}
        else:
            settings |= {"momentum": self.momentum, "unbiased_running": self.unbiased_running, "sync": self.sync}
        flat = "2d" if isinstance(norm, nn.BatchNorm2d) else ""
        new: Any = getattr(evo, f"EvoNorm{flat}{self.to}")(channels, **settings)
        if norm.weight is not None:
            new.weight, new.bias = norm.weight, norm.bias
        variance = getattr(norm, "running_var", None)
        if variance is not None and hasattr(new, "running_var"):
            new.running_var = variance.detach().clone().to(new.running_var.dtype)
        return new


def convert_bn_act(model: nn.Module, to: Kind = "S0", groups: int = 32, keep_linear: bool = True) -> nn.Module:
    """:class:`EvoNorm` applied to ``model``, in place; returns it."""
    return apply(model, EvoNorm(to=to, groups=groups, keep_linear=keep_linear))


def _pairs(model: nn.Module, allowed: set[str]) -> list[_Found]:
    """What becomes of every norm: from the traced graph where the model can be traced, from the order of modules otherwise."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # whatever the model's own code raises when it is run on proxies
        return list(_by_order(model, allowed))
    return _by_graph(model, graph, allowed)


def _by_graph(model: nn.Module, graph: fx.Graph, allowed: set[str]) -> list[_Found]:
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in model.named_modules()}
    calls: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(id(modules[str(node.target)]), []).append(node)

    def called(node: Any) -> nn.Module | None:
        return modules[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def norm_of(node: Any) -> nn.Module | None:
        """The norm that ``node`` calls, if it may be replaced, is called nowhere else and has one reader."""
        norm = called(node)
        if not isinstance(norm, _NORMS) or first[id(norm)] not in allowed or len(node.users) != 1:
            return None
        if len(calls[id(norm)]) > 1:
            return None
        return None if isinstance(called(node.args[0]), nn.Linear) else norm

    # an activation goes if everything it reads is a norm that goes
    goes = {
        key: all(norm_of(node.args[0]) is not None for node in nodes)
        for key, nodes in calls.items()
        if isinstance(called(nodes[0]), ACTIVATIONS)
    }
    found = []
    for nodes in list(calls.values()):
        norm = called(nodes[0])
        if (
            not isinstance(norm, _NORMS)
            or first[id(norm)] not in allowed
            or isinstance(called(nodes[0].args[0]), nn.Linear)
        ):
            continue
        name = first[id(norm)]
        readers = [user for node in nodes for user in node.users]
        acts = {id(m): m for user in readers if isinstance(m := called(user), ACTIVATIONS)}
        if any(_functional(user) for user in readers):
            found.append(_Found(name, obstacle="its activation is no module"))
        elif not acts:
            found.append(_Found(name, adds=any(user.target in _ADDITIONS for user in readers)))
        elif len(readers) > 1:
            found.append(_Found(name, obstacle="its output is read more than once"))
        elif not goes[key := next(iter(acts))]:
            found.append(_Found(name, obstacle=f"{first[key]} also reads something else"))
        else:
            found.append(_Found(name, first[key]))
    return found


def _functional(node: fx.Node) -> bool:
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    known = {
        "relu",
        "gelu",
        "silu",
        "tanh",
        "sigmoid",
        "elu",
        "selu",
        "leaky_relu",
        "mish",
        "softplus",
        "relu6",
        "hardswish",
    }
    return node.op in ("call_function", "call_method") and called.rstrip("_") in known


def _by_order(model: nn.Module, allowed: set[str]) -> Iterator[_Found]:
    """Neighbours in the order in which modules were assigned; an activation that stands in two places is left alone."""
    places: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
    first = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        children = [child for child in module._modules.values() if child is not None]
        for i, child in enumerate(children):
            name = first[id(child)]
            if not isinstance(child, _NORMS) or name not in allowed or (i and isinstance(children[i - 1], nn.Linear)):
                continue
            after = children[i + 1] if i + 1 < len(children) else None
            alone = isinstance(after, ACTIVATIONS) and places[id(after)] == places[id(child)] == 1
            if alone and sum(isinstance(c, ACTIVATIONS) for c in children) == 1 < sum(
                isinstance(c, _NORMS) for c in children
            ):
                yield _Found(name, obstacle=f"{first[id(after)]} is the only activation of several norms")
            else:
                yield _Found(name, first[id(after)] if alone else None)
