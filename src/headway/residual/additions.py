"""Finds where a model adds a branch to its residual stream, and the module whose output is that branch.

Known layers are told by :mod:`headway.anatomy`; other models are traced by ``torch.fx``, whole or module by module. An addition
``a + b`` is residual where one side is an ancestor of the other (the skip), or where both leave one tensor and the shorter side is
a single projection (the shortcut of a staged CNN).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from headway.anatomy import UnknownFamily, describe

_ADD = (operator.add, operator.iadd, torch.add)
_PARAMETRIC = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


@dataclass(frozen=True)
class Addition:
    """One branch on a stream.

    Attributes:
        name, end: qualified name and module whose output is the branch; end is None where ``obstacle`` says why there is none.
        stage: index of the stretch of stream between two shortcut projections.
        activation_after: an activation acts on the sum.
        fast_path: a torch.nn encoder layer whose fused inference path must be off, or None.
        stream: index of the residual stream; an encoder and a decoder are two.
        obstacle: why no single module's output is this branch, or None.
    """

    name: str
    end: nn.Module | None
    stage: int = 0
    activation_after: bool = False
    fast_path: nn.Module | None = None
    stream: int = 0
    obstacle: str | None = None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer (torch's, this project's, or one whose class name ends in Norm)."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)
    return isinstance(module, kinds) or type(module).__name__.endswith("Norm")


def find_additions(model: nn.Module) -> list[Addition]:
    """Every residual addition, in order of the stream; empty where there is none (or none that can be traced)."""
    from headway.residual.depth import Residual

    own = [Addition(name, module) for name, module in model.named_modules() if isinstance(module, Residual)]
    if own:
        return own
    try:
        return _described(model)
    except UnknownFamily:
        pass
    return _graph_layers(model) or _traced(model)


def _described(model: nn.Module) -> list[Addition]:
    found = []
    stacks = describe(model).stacks
    for stream, block in ((i, block) for i, stack in enumerate(stacks) for block in stack.blocks):
        layer: Any = model.get_submodule(block.name)
        fast = layer if isinstance(layer, nn.TransformerEncoderLayer) else None
        for sublayer in block.sublayers:
            if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                # the output projection of MultiheadAttention is never called as a module; the dropout after it is
                name = sublayer.output_norm or sublayer.dropouts[0]
            else:
                name = sublayer.output_norm or sublayer.gain or sublayer.writer
            found.append(Addition(name, model.get_submodule(name), fast_path=fast, stream=stream))
    return found


def _graph_layers(model: nn.Module) -> list[Addition]:
    """PyTorch Geometric's DeepGCNLayer in its residual forms: the convolution (or activation) that ends the branch."""
    found = []
    for name, module in model.named_modules():
        layer: Any = module
        if type(module).__name__ != "DeepGCNLayer":
            continue
        kind = layer.block
        if kind not in ("res", "res+"):
            continue
        # "res+" ends in the convolution, "res" in the activation after the norm
        end = "conv" if kind == "res+" or layer.act is None else "act"
        found.append(Addition(f"{name}.{end}" if name else end, getattr(layer, end)))
    return found


def _traced(model: nn.Module, prefix: str = "") -> list[Addition]:
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # tracing runs the user's code on proxies, which may raise anything
        found: list[Addition] = []
        for name, child in model.named_children():
            inner = _traced(child, f"{prefix}{name}.") if any(True for _ in child.children()) else []
            base = found[-1].stage if found else 0
            found += [replace(a, stage=a.stage + base) for a in inner]
        return found
    return _additions(graph, model, prefix)


def _additions(graph: fx.Graph, model: nn.Module, prefix: str) -> list[Addition]:
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    calls: dict[str, int] = {}
    found: list[Addition] = []
    stage = 0
    for node in graph.nodes:
        ancestors[node] = set(node.all_input_nodes).union(*(ancestors[n] for n in node.all_input_nodes))
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in graph.nodes:
        adds = node.op == "call_function" and node.target in _ADD
        if not (adds or (node.op == "call_method" and node.target in ("add", "add_"))):
            continue
        sides = [side for side in node.args[:2] if isinstance(side, fx.Node)]
        if len(sides) != 2 or sides[0] is sides[1]:
            continue
        branch, projected = _branch(sides[0], sides[1], ancestors, model)
        if branch is None:
            continue
        if projected:
            stage += 1
        after = any(_is_activation(user, model) for user in node.users)
        end, obstacle = _end(branch, calls)
        module = None if obstacle else model.get_submodule(end)
        found.append(Addition(prefix + end, module, stage, after, obstacle=obstacle))
    return found


# what commutes with a factor, so that the module before it may carry it
_LINEAR = (
    "dropout",
    "view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "contiguous",
    "squeeze",
    "unsqueeze",
    "clone",
)


def _end(branch: fx.Node, calls: dict[str, int]) -> tuple[str, str | None]:
    """The name of the module whose output is the branch, or of what it ends in with the reason why nothing can carry a factor."""
    node = branch
    while node.op in ("call_function", "call_method"):
        kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        before = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if kind not in _LINEAR or len(before) != 1 or len(node.users) != 1:
            return node.name, f"ends in the function {kind}"
        node = before[0]
    name = str(node.target)
    if node.op != "call_module":
        return node.name, f"ends in {node.op} {name}"
    if calls[name] != 1:
        return name, f"ends in {name}, which is called {calls[name]} times"
    return name, None if len(node.users) == 1 else f"ends in {name}, whose output is used elsewhere too"


def _branch(
    a: fx.Node, b: fx.Node, ancestors: dict[fx.Node, set[fx.Node]], model: nn.Module
) -> tuple[fx.Node | None, bool]:
    """The side that is the branch (None for no residual addition), and whether the skip is a projection."""
    for skip, branch in ((a, b), (b, a)):
        if skip in ancestors[branch]:
            between = (ancestors[branch] | {branch}) - ancestors[skip] - {skip}
            return (branch, False) if _weighted(between, model) else (None, False)
    only_a = (ancestors[a] | {a}) - ancestors[b]
    only_b = (ancestors[b] | {b}) - ancestors[a]
    if not ancestors[a] & ancestors[b]:
        return None, False
    heavy_a, heavy_b = _weighted(only_a, model), _weighted(only_b, model)
    if heavy_a == 1 and heavy_b > 1:
        return b, True
    if heavy_b == 1 and heavy_a > 1:
        return a, True
    return None, False


def _weighted(nodes: set[fx.Node], model: nn.Module) -> int:
    modules = [model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    return sum(isinstance(module, _PARAMETRIC) or _owns(module) for module in modules)


def _owns(module: nn.Module) -> bool:
    return not is_norm(module) and any(True for _ in module.parameters())


def _is_activation(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__module__ == "torch.nn.modules.activation"
    return getattr(node.target, "__name__", str(node.target)) in ("relu", "relu_", "gelu", "silu", "tanh", "leaky_relu")
