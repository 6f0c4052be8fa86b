"""Who reads a norm: the linear layers that a norm with fixed statistics can be folded into, or the reason why it cannot.

Known families are read off :mod:`headway.anatomy`; in any other model torch.fx follows the output of the norm through dropouts and
transpositions to whatever takes it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from headway.anatomy import UnknownFamily, describe

_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MOVES = {"transpose", "permute", "swapaxes"}


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads a norm.

    Attributes:
        name, module: the layer.
        weight, bias: names of its parameters.
        axis, output_axis: which axis of the weight runs over the channels it reads, and over those it writes.
        rows: how many of its outputs, from the first, read the norm; None for all.
    """

    name: str
    module: nn.Module
    weight: str = "weight"
    bias: str = "bias"
    axis: int = 1
    output_axis: int = 0
    rows: int | None = None


def readers_of(model: nn.Module, norms: Mapping[str, nn.Module]) -> dict[str, list[Reader] | str]:
    """For each norm the layers that read it, all of them linear, or the reason why they are not.

    Raises:
        ValueError: nothing reads a norm.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    named = _by_anatomy(model, modules)
    rest = {name: norm for name, norm in norms.items() if id(norm) not in named}
    if rest:
        named.update(_by_tracing(model, modules, rest))
    calls: dict[int, int] = {}
    for found in named.values():
        for name, *_ in found if not isinstance(found, str) else ():
            calls[id(modules[name])] = calls.get(id(modules[name]), 0) + 1
    owners = _owners(model)
    answer: dict[str, list[Reader] | str] = {}
    for name, norm in norms.items():
        found = named[id(norm)]
        if isinstance(found, str):
            answer[name] = found
            continue
        if not found:
            raise ValueError(f"nothing reads {name}; a norm is folded into the linear layers behind it")
        readers = [_reader(each, modules[each], kind, norm) for each, kind in found]
        complaint = next((r for r in readers if isinstance(r, str)), None) or next(
            (c for r in readers if not isinstance(r, str) and (c := _shared(r, calls, owners))), None
        )
        answer[name] = complaint or [r for r in readers if not isinstance(r, str)]
    return answer


_Found = list[tuple[str, str]] | str  # names and kinds of the readers ("", "first axis", "query"), or the reason


def _by_anatomy(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[int, _Found]:
    try:
        anatomy = describe(model)
    except UnknownFamily:
        return {}
    found: dict[int, _Found] = {}

    def note(name: str | None, readers: _Found) -> None:
        if name is None:
            return
        before = found.get(id(modules[name]))
        if isinstance(before, str):
            return
        # parallel branches may share a norm
        found[id(modules[name])] = readers if before is None or isinstance(readers, str) else [*before, *readers]

    for stack in anatomy.stacks:
        for block in stack.blocks:
            for part in block.sublayers:
                if block.placement in ("pre", "peri", "parallel"):
                    kind = "query" if part.kind == "cross_attention" else ""
                    note(part.norm, [(reader, kind) for reader in part.readers])
                elif block.placement == "layernorm_scaling":
                    note(part.norm, "is scaled before it is read")
                else:
                    note(part.norm, f"feeds a residual add (placed {block.placement!r})")
                note(part.output_norm, "feeds a residual add (placed on the output of a branch)")
        note(stack.embedding_norm, "feeds the residual stream")
        if stack.heads:
            pooled = any(head.endswith("pooler.dense") for head in stack.heads)
            note(stack.final_norm, "feeds the model's output" if pooled else [(head, "") for head in stack.heads])
    return found


class _Tracer(fx.Tracer):
    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._norms = {id(norm) for norm in norms.values()}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._norms or super().is_leaf_module(m, module_qualified_name)


def _by_tracing(
    model: nn.Module, modules: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]
) -> dict[int, _Found]:
    found: dict[int, _Found] = {
        id(norm): "feeds the model's output"
        for norm in norms.values()
        if norm is model or (isinstance(model, _STACKS) and norm is model.norm)
    }
    if len(found) == len(norms):
        return found
    try:
        graph = _Tracer(norms).trace(model)
    except Exception as error:  # whatever the model's own code raises when it is run on proxies
        reason = " ".join(str(error).split())[:80]
        return {id(norm): f"has unknown readers: torch.fx cannot trace the model ({reason})" for norm in norms.values()}
    called: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            called.setdefault(id(modules[node.target]), []).append(node)
    # torch's own stacks are not looked into; what they return is what their last norm returns
    last = {id(m.norm): id(m) for m in modules.values() if isinstance(m, _STACKS)}
    for norm in norms.values():
        nodes = called.get(id(norm), called.get(last.get(id(norm), 0), []))
        parts = [_follow(node, False, modules, called) for node in nodes]
        reason = next((part for part in parts if isinstance(part, str)), None)
        inside = "stands inside a layer that torch.fx does not look into" if not nodes else None
        found[id(norm)] = reason or inside or [each for part in parts if not isinstance(part, str) for each in part]
    return found


def _follow(
    node: fx.Node, first: bool, modules: Mapping[str, nn.Module], called: Mapping[int, Sequence[fx.Node]]
) -> _Found:
    """What takes the value of ``node``, whose channels lie on the last axis, or on axis 1 where ``first``."""
    found: list[tuple[str, str]] = []
    for user in node.users:
        target = user.target
        if user.op == "output":
            return "feeds the model's output"
        if target in _ADDITIONS:
            return "feeds a residual add"
        if user.op == "call_module":
            name = str(target)
            module = modules[name]
            if isinstance(module, nn.Dropout | nn.Identity):
                more = _follow(user, first, modules, called)
                if isinstance(more, str):
                    return more
                found += more
                continue
            if len(called[id(module)]) > 1:
                return f"feeds {name}, which is called more than once"
            if isinstance(module, nn.MultiheadAttention):
                same = list(user.args[:3]) == [node] * 3 or (user.args[:1] == (node,) and len(user.args) == 1)
                if not same or any(user.kwargs.get(key, node) is not node for key in ("query", "key", "value")):
                    return f"feeds {name} beside another input"
            found.append((name, "first axis" if first else ""))
            continue
        moved = _moved(user, first)
        if moved is None:
            return f"feeds {getattr(target, '__name__', target)}"
        more = _follow(user, moved, modules, called)
        if isinstance(more, str):
            return more
        found += more
    return list(dict.fromkeys(found))


def _moved(node: fx.Node, first: bool) -> bool | None:
    """Where a transposition puts the channels (True for axis 1, False for the last one), None for anything else."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name not in _MOVES:
        return None
    given = node.args[1:]
    axes = tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else given
    if name == "permute":
        to_first, to_last = ((0, 2, 1), (0, 3, 1, 2)), ((0, 2, 1), (0, 2, 3, 1))
    else:
        to_first = to_last = ((1, 2), (2, 1), (-1, -2), (-2, -1), (1, -1), (-1, 1))
    return None if axes not in (to_last if first else to_first) else not first


def _reader(name: str, module: nn.Module, kind: str, norm: Any) -> Reader | str:
    """The module as a reader, or what is in the way."""
    width = norm.num_features
    if kind == "first axis" and type(module) in _CONVOLUTIONS:
        conv: Any = module
        plain = set(conv.kernel_size) == {1} and conv.groups == 1 and not any(conv.padding)
        return Reader(name, module) if plain else f"feeds {name}, a convolution of more than one position or group"
    if kind == "first axis":
        return f"feeds {name} ({type(module).__name__}) with its channels on axis 1"
    if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) and module.in_features == width:  # type: ignore[attr-defined]
        return Reader(name, module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers keeps its weight as (in, out)
        return Reader(name, module, axis=0, output_axis=1)
    if type(module) is nn.MultiheadAttention:
        if not module._qkv_same_embed_dim:
            return f"feeds {name}, which keeps its projections apart"
        rows = module.embed_dim if kind == "query" else None
        return Reader(name, module, "in_proj_weight", "in_proj_bias", rows=rows)
    return f"feeds {name} ({type(module).__name__}), which is not linear or not plainly so"


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """id of a module or parameter -> who holds it, once for every place."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for thing in [*module._modules.values(), *module._parameters.values()]:
            if thing is not None:
                found.setdefault(id(thing), []).append(module)
    return found


def _shared(reader: Reader, calls: Mapping[int, int], owners: Mapping[int, list[nn.Module]]) -> str | None:
    """Why folding into this reader would change what something else computes, or None."""
    module = reader.module
    if calls[id(module)] > 1 or len(owners.get(id(module), [])) > 1:
        return f"feeds {reader.name}, which reads something else too"
    weight, bias = module._parameters.get(reader.weight), module._parameters.get(reader.bias)
    if weight is None:
        return f"feeds {reader.name}, whose weight is computed from something else"
    if any(p is not None and len(owners[id(p)]) > 1 for p in (weight, bias)):
        return f"tied weight: {reader.name} shares its weight with another layer"
    return None
