"""Where a model is probed: which modules' outputs are looked at, and what part each plays.

pre     what a linear map, a convolution, an attention or a recurrent layer puts out (before any normaliser)
post    what an activation puts out
stream  what a residual block (an item of a stack of like modules) puts out
skip    what a long skip carries from an encoder to a decoder, where it is none of these
norm    what a normaliser puts out            (asked for by ``kinds`` or ``layers``)
other   anything else                         (asked for by ``layers``)
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from headway.anatomy import Anatomy, describe

KINDS = ("pre", "post", "stream", "skip")
ALL_KINDS = (*KINDS, "norm", "other")
Layers = str | Sequence[str] | Callable[[str, nn.Module], bool]

_PROBABILITIES = ("Softmax", "LogSoftmax", "Softmin", "Softmax2d", "AdaptiveLogSoftmaxWithLoss")
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Point:
    """One module to look at. ``tentative``: a block found by its place in a stack; it counts if it keeps its input's shape.
    ``carried``: by a long skip, so that it counts as a "skip" otherwise."""

    name: str
    module: nn.Module
    kind: str
    tentative: bool = False
    carried: bool = False


def is_weighted(module: nn.Module) -> bool:
    """Whether the module is itself a linear map of its input (a graph convolution or a ``Conv1D`` of transformers included)."""
    kinds = {cls.__name__ for cls in type(module).__mro__}
    return isinstance(module, _WEIGHTED) or bool(kinds & {"Conv1D", "MessagePassing"})


def kind_of(module: nn.Module) -> str:
    """The part a module plays, from its class: "pre", "post", "norm" or "other"; ``module.signal_kind`` overrides it."""
    told = getattr(module, "signal_kind", None)
    if isinstance(told, str):
        return told
    cls = type(module)
    if is_weighted(module) or _is_attention(module):
        return "pre"
    if (
        cls.__module__ in ("torch.nn.modules.activation", "transformers.activations")
        and cls.__name__ not in _PROBABILITIES
    ):
        return "post"
    return "norm" if "norm" in cls.__name__.lower() else "other"


def _is_attention(module: nn.Module) -> bool:
    def named(m: nn.Module) -> bool:
        return "Attention" in type(m).__name__ and any(True for _ in m.parameters())

    return named(module) and not any(named(inner) for inner in module.modules() if inner is not module)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a ``DistributedDataParallel`` or ``DataParallel``; any other as it is."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, parallel) else model


def anatomy_of(model: nn.Module) -> Anatomy | None:
    """The model's anatomy, or None where it is of no known family."""
    try:
        return describe(model)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def find(
    model: nn.Module,
    layers: Layers | None = None,
    kinds: Sequence[str] = KINDS,
    anatomy: Anatomy | None = None,
    skips: Sequence[str] = (),
) -> list[Point]:
    """The points of ``model``, in the order of its modules.

    Args:
        layers: a glob on qualified names, several, or a predicate (name, module); whatever matches is a point.
        kinds: which kinds to keep.
        anatomy: the model's, if known already.
        skips: the modules whose outputs long skips carry (:func:`headway.signals.long_skips.long_skips`).

    Raises:
        ValueError: an unknown kind, or a filter that matches nothing.
    """
    if isinstance(kinds, str):
        kinds = (kinds,)
    if unknown := [kind for kind in kinds if kind not in ALL_KINDS]:
        raise ValueError(f"kinds {unknown} are unknown; choose from {', '.join(ALL_KINDS)}")
    blocks = _blocks(model, anatomy or anatomy_of(model))
    carried = {plain_name(name.partition("#")[0]) for name in skips} if layers is None and "skip" in kinds else set()
    points: list[Point] = []
    for name, module in model.named_modules():
        name = plain_name(name)
        kind = "stream" if id(module) in blocks else kind_of(module)
        if name in carried and kind not in kinds:
            kind = "skip"
        if layers is None:
            keep = kind in kinds
        else:
            keep = _matches(layers, name, module) and (kind in kinds or tuple(kinds) == KINDS)
        if keep and (name or layers is not None or kind in ("pre", "post")):
            tentative = kind == "stream" and blocks.get(id(module), False)
            points.append(Point(name or type(module).__name__, module, kind, tentative, name in carried))
    if points:
        return points
    if layers is not None:
        names = [plain_name(name) for name, _ in model.named_modules() if name]
        raise ValueError(
            f"layers={layers!r} matches no module among kinds {', '.join(kinds)}; the model holds "
            f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        )
    if tuple(kinds) != KINDS:
        raise ValueError(
            f"the model has no module of kind {', '.join(kinds)}; choose from {', '.join(ALL_KINDS)} or name layers="
        )
    # a model of unknown parts: every leaf, or the model itself
    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    return [Point(plain_name(n) or type(m).__name__, m, "other") for n, m in leaves]


def plain_name(name: str) -> str:
    """The qualified name without what wrappers put in it (torch.compile's ``_orig_mod.``)."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return "" if name in ("_orig_mod", "_fsdp_wrapped_module") else name


def _matches(layers: Layers, name: str, module: nn.Module) -> bool:
    if callable(layers):
        return bool(layers(name, module))
    patterns = [layers] if isinstance(layers, str) else layers
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _blocks(model: nn.Module, anatomy: Anatomy | None) -> dict[int, bool]:
    """id(module) -> tentative, for the residual blocks: by the model's known anatomy, else by their place in a stack."""
    if anatomy is not None:
        return {id(model.get_submodule(block.name)): False for block in anatomy.blocks}
    blocks: dict[int, bool] = {}
    inside: set[int] = set()
    for container in model.modules():
        if id(container) in inside or not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        items = _stack(container)
        if any(isinstance(item, nn.ModuleList | nn.Sequential) and _stack(item) for item in items):
            continue  # a sequence of stages: their blocks are the stream
        for item in items:
            blocks[id(item)] = True
            inside.update(id(inner) for inner in item.modules())
    return blocks


def _stack(container: nn.Module) -> list[nn.Module]:
    """The items of a container that hold at least two weighted modules each, if two of them are of one class."""
    items = [m for m in container.children() if sum(is_weighted(inner) for inner in m.modules()) >= 2]
    return items if len({type(m) for m in items}) < len(items) else []
