"""Which layer reads a concatenation with a long skip, and its weight with the skip's constant in it.

W [u, s x] = W_u u + (s W_x) x:  the columns of x are multiplied by s
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from headway.residual.equivalence import output_of, unpacked
from headway.residual.long_skip_graph import kind, merges, operands, trace
from headway.residual.long_skip_hosts import ScaledHost, plain_twin
from headway.surgery import Edit, SetParameter


def folded(model: nn.Module, name: str, host: ScaledHost, inputs: Any) -> list[Edit]:
    """The edits that put a block's constants into its readers; ValueError where one cannot be."""
    layer = host.long_skip_layer
    if layer.mode == "ls":
        raise ValueError(f"{name}: gates depend on the input, so that no weight can take them in; only constants fold")
    numbers = [i for i in host.host_at if i is not None]
    if all(layer.scales[i - 1] == 1 for i in numbers):
        return []
    shapes = _shapes(model, host, inputs)
    found: list[Edit] = []
    for i, (merge, operand) in zip(numbers, _places(name, host), strict=True):
        scale = layer.scales[i - 1]
        if scale == 1:
            continue
        place, reader = _reader(name, host, merge)
        weight: Tensor = reader.weight
        width = None
        if i in shapes:
            width = shapes[i][-1 if isinstance(reader, nn.Linear) else 1]
        elif layer.features and layer.axis == "channel" and not isinstance(reader, nn.Linear):
            width = layer.features[i - 1]
        elif isinstance(reader, nn.Linear) and weight.shape[1] == 2 * weight.shape[0]:
            width = weight.shape[0]
        if width is None:
            raise ValueError(f"{name}: how many inputs of {place} are the skip's is not known; give example_inputs=...")
        every = model.named_modules(remove_duplicate=False)
        if sum(any(p is weight for p in m._parameters.values()) for _, m in every) > 1:
            raise ValueError(f"{name}: the weight of {place} is shared, so that it cannot take one skip's factor in")
        columns = slice(0, width) if operand == 0 else slice(weight.shape[1] - width, None)
        new = weight.detach().double().clone()
        new[:, columns] *= scale
        fresh = nn.Parameter(new.to(weight.dtype), weight.requires_grad)
        found.append(SetParameter(reader, "weight", fresh, f"{name}.{place}.weight"))
    return found


def _places(name: str, host: ScaledHost) -> list[tuple[fx.Node, int]]:
    """The merge and the operand of each of the block's skips, in the order of their numbers."""
    graph = trace(plain_twin(host))
    if graph is None:
        raise ValueError(f"{name}: torch.fx cannot trace how its skips are read, so that nothing folds")
    own = merges(graph, "")
    if not host.argument:
        return [(own[ordinal], operand) for ordinal, operand in host.host_operands]
    given = next((node for node in graph.nodes if node.op == "placeholder" and node.target == host.argument), None)
    found = [(m, k) for m in own for k, operand in enumerate(operands(m)) if operand is given]
    if len(found) != 1 or given is None or len(given.users) != 1:
        raise ValueError(f"{name}: its skips are not read by one concatenation of its own, so that nothing folds")
    return found


def _reader(name: str, host: nn.Module, merge: fx.Node) -> tuple[str, Any]:
    """The name and module of the one layer that reads a concatenation along the axis over which it sums."""
    if kind(merge) != "cat":
        raise ValueError(
            f"{name}: its skip is added and not concatenated, so that no columns of a weight read it alone"
        )
    users = list(merge.users)
    calls = [node for node in merge.graph.nodes if node.op == "call_module" and node.target == users[0].target]
    module: Any = host.get_submodule(str(users[0].target)) if calls else None
    dim = merge.args[1] if len(merge.args) > 1 else merge.kwargs.get("dim", 0)
    convolution = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed and module.groups == 1
    axes = (1, -1 - len(module.kernel_size)) if convolution else (-1,)
    if len(users) != 1 or len(calls) > 1 or not (convolution or isinstance(module, nn.Linear)) or dim not in axes:
        what = type(module).__name__ if module is not None else str(users[0].target)
        raise ValueError(
            f"{name}: the concatenation is read by {what if len(users) == 1 else f'{len(users)} operations'}; only one linear "
            "layer (of the last axis) or plain convolution (of the channels), called once, can take a factor in"
        )
    return str(users[0].target), module


def _shapes(model: nn.Module, host: ScaledHost, inputs: Any) -> dict[int, torch.Size]:
    """i -> the shape of skip i on these inputs."""
    if inputs is None:
        return {}
    seen: dict[int, torch.Size] = {}
    handle = host.long_skip_layer.register_forward_pre_hook(lambda _, args: seen.update({args[1]: args[0].shape}))
    args, kwargs = unpacked(inputs)
    try:
        output_of(model, *args, **kwargs)
    finally:
        handle.remove()
    return seen
