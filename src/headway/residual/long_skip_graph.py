"""Finds long skips by tracing a network with torch.fx, and rewrites the forward passes that combine them.

A concatenation or sum of two values is a long skip where one of them, x, is also what the other, u, was computed from, and u lies more
than ``min_span`` modules deeper. Long skips are nested (what is kept last is used first), short residuals follow one another: the longest
nested family is the network's. Sums count only where nothing is concatenated, and not where all of u is computed inside the block that
adds (a residual block).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from headway.residual.equivalence import unpacked
from headway.residual.long_skip_sites import Host, Network, prefix, with_shapes

_CAT = (torch.cat, torch.concat, torch.concatenate)
_ADD = (operator.add, operator.iadd, torch.add)
SPANS = {"cat": 2, "sum": 8}


class OwnForward(fx.Tracer):
    """Traces one module's own forward; all it calls stays a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Through(fx.Tracer):
    """Traces through every module but torch's own and those given."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)


def kind(node: fx.Node) -> str:
    """ "cat" or "sum" of two values, or "" for any other operation."""
    if node.op == "call_function" and node.target in _CAT:
        return "cat" if len(operands(node)) == 2 else ""
    adds = (node.op == "call_function" and node.target in _ADD) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return "sum" if adds and len(operands(node)) == 2 else ""


def operands(node: fx.Node) -> list[fx.Node]:
    """The values a concatenation or sum combines."""
    given: Any = node.args[:2]
    if node.target in _CAT:
        given = node.args[0] if node.args else node.kwargs.get("tensors", ())
    return [part for part in given if isinstance(part, fx.Node)] if isinstance(given, tuple | list) else []


def merges(graph: fx.Graph, path: str | None = None) -> list[fx.Node]:
    """The concatenations and sums of two values in order; ``path`` names the module whose own they must be."""
    return [node for node in graph.nodes if kind(node) and (path is None or _path(node) == path)]


def _path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


@dataclass(frozen=True)
class _Candidate:
    merge: fx.Node
    operand: int
    source: int
    span: int


def traced_networks(model: nn.Module, min_span: int | None, inputs: Any, name: str = "") -> list[Network]:
    """The long skips of a model, or of the outermost parts of it that can be traced."""
    graph = trace(model)
    if graph is None:
        return [
            network
            for key, child in model.named_children()
            if any(True for _ in child.children())
            for network in traced_networks(child, min_span, None, f"{prefix(name)}{key}")
        ]
    family = _family(graph, model, min_span)
    if not family:
        return []
    n, rows, order = len(family), {}, []
    for k, candidate in enumerate(family):
        path = _path(candidate.merge)
        own, whole = merges(OwnForward().trace(model.get_submodule(path))), merges(graph, path)
        if len(own) != len(whole):
            raise ValueError(
                f"{prefix(name)}{path} runs several times in a forward pass, so its skip has no one number i"
            )
        if path not in rows:
            order.append(path)
        rows.setdefault(path, []).append((n - k, (whole.index(candidate.merge), candidate.operand)))
    hosts = tuple(
        Host(
            f"{prefix(name)}{path}" if path else name,
            model.get_submodule(path),
            tuple(i for i, _ in rows[path]),
            operands=tuple(place for _, place in rows[path]),
        )
        for path in order
    )
    skips = [operands(c.merge)[c.operand] for c in reversed(family)]
    encoders = tuple(prefix(name) + _name(_module_before(skip)) for skip in skips)
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    network = Network(name, model, hosts, encoders, None, "channel" if convolves else "token")
    return [network if inputs is None else with_shapes(network, _shapes(model, graph, skips, inputs))]


def trace(model: nn.Module) -> fx.Graph | None:
    """The graph, with modules that cannot be traced left as calls; None where the model's own forward is one of them."""
    try:
        return _Through(set()).trace(model)
    except Exception:  # tracing runs the user's code on proxies, which may raise anything
        opaque = {m for m in model.modules() if any(True for _ in m.children()) and not _traceable(m)}
    if model in opaque:
        return None
    try:
        return _Through(opaque).trace(model)
    except Exception:
        return None


def _traceable(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return True
    try:
        OwnForward().trace(module)
    except Exception:
        return False
    return True


def _family(graph: fx.Graph, model: nn.Module, min_span: int | None) -> list[_Candidate]:
    """The long skips in the order in which they are combined: the innermost first."""
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    depth: dict[fx.Node, int] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    image = next((node for node in graph.nodes if node.op == "placeholder"), None)
    for node in graph.nodes:
        before = node.all_input_nodes
        ancestors[node] = set(before).union(*(ancestors[n] for n in before))
        weight = 0
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            weight = max(1, sum(not any(True for _ in m.children()) for m in module.modules()))
        depth[node] = weight + max((depth[n] for n in before), default=0)
    found: dict[str, list[_Candidate]] = {"cat": [], "sum": []}
    for node in merges(graph):
        pair = operands(node)
        for k, (x, u) in enumerate(((pair[0], pair[1]), (pair[1], pair[0]))):
            source = _module_before(x)
            if source not in ancestors[u] or not (source is image or image in ancestors[source]):
                continue
            what, span = kind(node), depth[u] - depth[x]
            path = _path(node)
            inside = all(
                _path(n).startswith(path) for n in ancestors[u] - ancestors[source] - {source} if n.op == "call_module"
            )
            if span > (SPANS[what] if min_span is None else min_span) and not (what == "sum" and path and inside):
                found[what].append(_Candidate(node, k, order[source], span))
    return _nested(found["cat"] or found["sum"])


def _module_before(node: fx.Node) -> fx.Node:
    """The module whose output a value is, through functions of one value such as a crop."""
    while node.op in ("call_function", "call_method") and not kind(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _name(node: fx.Node) -> str:
    """The module whose output a value is, or whose forward computes it."""
    return str(node.target) if node.op in ("call_module", "placeholder") else _path(node) or node.name


def _nested(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The longest family whose sources go backwards while the merges go forwards; of equals the one that spans most."""
    best: list[tuple[int, int, int]] = []
    for k, one in enumerate(candidates):
        fits = [j for j in range(k) if candidates[j].source > one.source]
        former = max(fits, key=lambda j: best[j][:2], default=-1)
        length, total = best[former][:2] if former >= 0 else (0, 0)
        best.append((length + 1, total + one.span, former))
    family: list[_Candidate] = []
    at = max(range(len(best)), key=lambda j: best[j][:2], default=-1)
    while at >= 0:
        family.insert(0, candidates[at])
        at = best[at][2]
    return family


def _shapes(model: nn.Module, graph: fx.Graph, skips: Sequence[fx.Node], inputs: Any) -> list[torch.Size]:
    args, kwargs = unpacked(inputs)
    bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    bound.apply_defaults()
    given = [bound.arguments[str(node.target).lstrip("*")] for node in graph.nodes if node.op == "placeholder"]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ShapeProp(fx.GraphModule(model, graph)).propagate(*given)
    finally:
        for module, training in modes:
            module.training = training
    return [skip.meta["tensor_meta"].shape for skip in skips]


def rewritten(
    module: nn.Module, places: Sequence[tuple[int, int]], at: Sequence[int], scaler: str
) -> Callable[..., Any]:
    """The module's own forward with ``self.<scaler>(x, i)`` in the place of every long skip x; ``_unscaled_forward`` is traced."""
    tracer = OwnForward()
    tracer.traced_func_name = "_unscaled_forward"
    graph = tracer.trace(module)
    own = merges(graph)
    for (ordinal, operand), i in zip(places, at, strict=True):
        merge = own[ordinal]
        x = operands(merge)[operand]
        with graph.inserting_before(merge):
            scaled = graph.create_node("call_module", scaler, (x, i))
        merge.replace_input_with(x, scaled)
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<{type(module).__name__} with scaled long skips>", "exec"), names)
    return names["forward"]
