"""What of a model is a normaliser's gain and shift, and which layer is its output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from headway.anatomy import UnknownFamily, describe
from headway.residual.additions import is_norm

GAINS, SHIFTS = ("weight", "gamma", "scale"), ("bias", "beta")
_HEADS = ("fc", "classifier", "head", "heads", "output", "lm_head", "score", "qa_outputs")
_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
_SHAPES = ("flatten", "view", "reshape", "squeeze", "mean", "softmax", "log_softmax", "sigmoid", "contiguous", "float")
Kinds = str | type | Sequence[str | type] | None


@dataclass(frozen=True)
class Affine:
    """A normaliser with a gain or a shift.

    Attributes:
        name, module: the normaliser.
        gain, shift: names of its own parameters, None where it has no such one.
    """

    name: str
    module: nn.Module
    gain: str | None
    shift: str | None

    @property
    def names(self) -> list[str]:
        """The qualified names of what trains."""
        return [f"{self.name}.{key}" if self.name else key for key in (self.gain, self.shift) if key is not None]


def kind_names(kinds: Kinds) -> tuple[str, ...] | None:
    """Kinds as globs on class names, None for all.

    Raises:
        ValueError: no kind at all.
        TypeError: something that is neither a class nor a glob on its name.
    """
    if kinds is None:
        return None
    listed = [kinds] if isinstance(kinds, str | type) else list(kinds)
    if not listed:
        raise ValueError(
            'kinds names no normaliser; give class names such as "BatchNorm*" or "LayerNorm", or None for all'
        )
    if wrong := [kind for kind in listed if not isinstance(kind, str | type)]:
        raise TypeError(f'kinds are classes or globs on their names such as "BatchNorm*", not {wrong[0]!r}')
    return tuple(kind if isinstance(kind, str) else kind.__name__ for kind in listed)


def normalisers(model: nn.Module, kinds: tuple[str, ...] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every normaliser of these kinds, affine or not, once and under its first name."""
    for name, module in model.named_modules():
        home = type(module).__module__.startswith("headway.norms")
        if not (is_norm(module) or home) or isinstance(module, nn.LocalResponseNorm | nn.CrossMapLRN2d):
            continue
        classes = [cls.__name__ for cls in type(module).__mro__]
        if kinds is None or any(fnmatchcase(cls, kind) for cls in classes for kind in kinds):
            yield name, module


def affine_normalisers(model: nn.Module, kinds: tuple[str, ...] | None = None) -> list[Affine]:
    """Those of them with a gain or a shift of their own."""
    found = []
    for name, module in normalisers(model, kinds):
        own = {key for key, p in module._parameters.items() if p is not None}
        gain = next((key for key in GAINS if key in own), None)
        shift = next((key for key in SHIFTS if key in own), None)
        if gain or shift:
            found.append(Affine(name, module, gain, shift))
    return found


def without_affine(model: nn.Module, kinds: tuple[str, ...] | None = None) -> list[str]:
    """Names of torch's normalisers that could have a gain and have none."""
    torchs = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return [
        name
        for name, m in normalisers(model, kinds)
        if isinstance(m, torchs) and all(p is None for p in m._parameters.values())
    ]


def quantised(model: nn.Module) -> list[str]:
    """Names of modules whose weights are packed integers, through which no gradient flows."""
    homes = (
        "torch.ao.nn.quantized",
        "torch.ao.nn.intrinsic.quantized",
        "torch.nn.quantized",
        "torch.nn.intrinsic.quantized",
    )
    return [name for name, module in model.named_modules() if type(module).__module__.startswith(homes)]


def output_layer(model: nn.Module, given: str | None = None) -> tuple[str, nn.Module]:
    """Name and module of the layer that gives the output: the one named, or what the traced graph, the anatomy or the usual names
    of heads tell.

    Raises:
        ValueError: there is no such module, or it cannot be told; give its name.
    """
    modules = dict(model.named_modules())
    if given is not None:
        if given not in modules or not any(True for _ in modules[given].parameters()):
            raise ValueError(
                f"the model has no module {given!r} with parameters; its own are {', '.join(_children(model))}"
            )
        return given, modules[given]
    name = _by_graph(model, modules) or _by_family(model, modules) or _by_name(model)
    if name is None:
        raise ValueError(
            "which layer is the output cannot be told of this model; name it, e.g. include_output='fc'. Its own modules are "
            f"{', '.join(_children(model))}"
        )
    return name, modules[name]


def _children(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children()]


class _Leaves(fx.Tracer):
    """Traces down to torch's own layers and everything that holds parameters of its own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = any(p is not None for p in m._parameters.values())
        return own or super().is_leaf_module(m, module_qualified_name)


def graph_of(model: nn.Module) -> fx.Graph | None:
    """The traced graph, None where the model cannot be traced."""
    try:
        return _Leaves().trace(model)
    except Exception:  # tracing runs the user's code on proxies, which may raise anything
        return None


def _by_graph(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    graph = None if any(True for _ in _torch_stacks(model)) else graph_of(model)
    node: Any = next((n for n in graph.nodes if n.op == "output"), None) if graph is not None else None
    while node is not None:
        sources = node.all_input_nodes
        if len(sources) != 1:
            return None
        node = sources[0]
        if node.op == "call_module":
            module = modules[node.target]
            if isinstance(module, _LINEAR):
                return node.target
            if any(True for _ in module.parameters()):
                return None
        elif node.op == "placeholder":
            return None
        else:
            word = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if word not in _SHAPES:
                return None
    return None


def _torch_stacks(model: nn.Module) -> Iterable[nn.Module]:
    return (m for m in model.modules() if isinstance(m, nn.RNNBase))


def _by_family(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    embeddings = getattr(model, "get_output_embeddings", None)
    try:
        head = embeddings() if callable(embeddings) else None
    except (NotImplementedError, AttributeError):
        head = None
    if head is not None:
        return next((name for name, module in modules.items() if module is head), None)
    try:
        heads = [name for stack in describe(model).stacks for name in stack.heads]
    except (UnknownFamily, ValueError, KeyError, AttributeError):
        return None
    return heads[0] if len(heads) == 1 and isinstance(modules.get(heads[0]), nn.Linear) else None


def _by_name(model: nn.Module) -> str | None:
    found = [name for name, child in model.named_children() if name in _HEADS and any(True for _ in child.parameters())]
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def fresh_gain(module: nn.Module, gain: torch.Tensor, init: str) -> torch.Tensor:
    """A gain drawn anew: "uniform" from U(0, 1), "signed" from U(-1, 1), "ones".

    Raises:
        ValueError: another init, or a norm that reads its weight as ``1 + weight``.
    """
    if init not in GAMMA_INITS:
        raise ValueError(f"gamma_init is one of {', '.join(GAMMA_INITS)} or None (keep the gains); {init!r} was given")
    if reads_offset(module):
        raise ValueError(
            f"{type(module).__name__} reads its weight as 1 + weight, so a gain cannot be drawn for it; use gamma_init=None"
        )
    if init == "ones":
        return torch.ones_like(gain)
    drawn = torch.rand_like(gain)
    return drawn if init == "uniform" else 2 * drawn - 1


GAMMA_INITS = ("uniform", "ones", "signed")


def reads_offset(module: nn.Module) -> bool:
    """Whether the gain is ``1 + weight`` (the Gemma family)."""
    from headway.norms.rms import RMSNorm

    if type(module).__module__.startswith("torch."):
        return False
    known = module if isinstance(module, RMSNorm) else RMSNorm.from_module(module)
    return known is not None and bool(known.gain_offset)
