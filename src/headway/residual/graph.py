"""A model as the graph of its operations: which parameter, module and value stands behind each node (``torch.export``)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from headway.norms.layer import LayerNorm
from headway.residual.axes import operation, shape_of
from headway.residual.equivalence import unpacked
from headway.residual.stream import NotPreNormError, Reader

# they look at the sizes of a value, not at its numbers
SIZES = (
    "_assert_tensor_metadata",
    "sym_size",
    "size",
    "numel",
    "zeros_like",
    "ones_like",
    "empty_like",
    "new_zeros",
    "new_ones",
)
_LAYOUT = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "contiguous", "to", "alias", "expand", "_unsafe_view")


Slot = tuple[str, str]


class Graph:
    """The operations of one forward pass.

    Args:
        model: in the mode in which it is to be looked at.
        inputs: a tuple of positional arguments, a mapping of keyword arguments, or one tensor.

    Raises:
        NotPreNormError: the forward pass cannot be traced.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        args, kwargs = unpacked(inputs)
        self.model = model
        with _as_plain_torch(model):
            try:
                program = torch.export.export(model, args, kwargs, strict=False)
            except Exception as error:  # tracing runs the user's code on fake tensors, which may raise anything
                raise NotPreNormError(
                    f"the forward pass could not be traced on the example inputs ({type(error).__name__}: {error}); "
                    "headway.anatomy.register makes its layers known without tracing"
                ) from error
        signature = program.graph_signature
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.tensors: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.inputs = set(signature.user_inputs)
        self.first_input = next((node for node in self.nodes if node.name in self.inputs), None)
        self._slots: dict[int, list[Slot]] = {}
        for name, module in model.named_modules():
            for attribute, held in (*module._parameters.items(), *module._buffers.items()):
                if held is not None:
                    self._slots.setdefault(id(held), []).append((name, attribute))
        self._order = {node: i for i, node in enumerate(self.nodes)}
        self._calls: dict[str, set[str]] = {}
        for node in self.nodes:
            for path, _ in node.meta.get("nn_module_stack", {}).values():
                self._calls.setdefault(_bare(path), set()).add(path)

    def is_tensor(self, node: Any) -> bool:
        """Whether a node is a parameter or a buffer of the model."""
        return isinstance(node, fx.Node) and node.name in self.tensors

    def tensor(self, node: Any, use: fx.Node) -> Slot | None:
        """(module, attribute) under which ``use`` takes a parameter or buffer.

        Tied tensors are one node: the module that runs ``use`` tells which of their names is meant. None where that is open, and
        for what is neither parameter nor buffer.
        """
        if not self.is_tensor(node):
            return None
        name = self.tensors[node.name]
        slots = self._slots.get(id(self._object(name)), [])
        own = [slot for slot in slots if slot[0] == self.path(use)]
        found = own or slots
        return found[0] if len(found) == 1 else None

    def users(self, node: fx.Node, slot: Slot) -> list[fx.Node]:
        """The operations that may take a tensor under one of its names."""
        return [user for user in node.users if self.tensor(node, user) in (slot, None)]

    def _object(self, name: str) -> Any:
        owner, _, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), attribute)

    def laid_out(self, node: Any) -> fx.Node | None:
        """The parameter or buffer behind a node that only lays it out anew."""
        while isinstance(node, fx.Node) and operation(node) in _LAYOUT:
            node = node.args[0]
        return node if self.is_tensor(node) else None

    def path(self, node: fx.Node) -> str:
        """The module whose forward runs the operation."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return _bare(stack[-1][0]) if stack else ""

    def called_once(self, path: str) -> bool:
        return len(self._calls.get(path, ())) <= 1

    def before(self, node: fx.Node) -> set[fx.Node]:
        """Everything the node depends on."""
        seen: set[fx.Node] = set()
        waiting = list(node.all_input_nodes)
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting += one.all_input_nodes
        return seen

    def first(self, nodes: Any) -> fx.Node:
        return min(nodes, key=self._order.__getitem__)

    def reader(self, node: fx.Node, source: fx.Node) -> tuple[Reader, list[fx.Node]] | None:
        """How ``node`` reads ``source`` as a linear map, and the nodes of its parameters; None for any other operation."""
        kind, args = operation(node), [*node.args, *node.kwargs.values()]
        if kind == "linear" and args[0] is source:
            weight, bias, axis = args[1], args[2] if len(args) > 2 else None, 1
        elif kind == "addmm" and args[1] is source and len(args) == 3:
            weight, bias, axis = args[2], args[0], 0
        elif kind in ("matmul", "mm") and args[0] is source:
            weight, bias, axis = args[1], None, 0
        else:
            return None
        rows = None
        if isinstance(weight, fx.Node) and operation(weight) in ("t", "transpose"):
            weight, axis = weight.args[0], 1 - axis
        if isinstance(weight, fx.Node) and (cut := self._rows(weight)) is not None:
            weight, rows = cut
            bias = self._rows(bias)[0] if isinstance(bias, fx.Node) and self._rows(bias) is not None else bias  # type: ignore[index]
        held = self.tensor(weight, node)
        if held is None or len(shape_of(weight)) != 2 or (rows is not None and axis == 0):
            return None
        owner, attribute = held
        module = self.model.get_submodule(owner)
        if bias is None:
            # torch's fused attention wants all of its biases or none, so it is given no new one
            name = "bias" if isinstance(module, nn.Linear) else ""
        else:
            held = self.tensor(bias, node)
            if held is None or held[0] != owner:
                return None
            name = held[1]
        return Reader(owner, attribute, name, axis, rows), [
            part for part in (weight, bias) if isinstance(part, fx.Node)
        ]

    def _rows(self, node: fx.Node) -> tuple[fx.Node, tuple[int, int]] | None:
        """The tensor of which a node is a stretch of rows, and which."""
        kind, whole = operation(node), node.args[0] if node.args else None
        if kind == "slice" and self.is_tensor(whole):
            dim, first, end = (*node.args[1:4], *(0, 0, None)[len(node.args) - 1 :])
            size = shape_of(whole)[0]
            if dim == 0 and len(node.args) < 5:
                return whole, (first or 0, size if end is None else min(end, size))  # type: ignore[return-value, type-var]
        if (
            kind == "getitem"
            and isinstance(whole, fx.Node)
            and operation(whole) in ("split", "split_with_sizes", "chunk")
        ):
            tensor = whole.args[0]
            if self.is_tensor(tensor) and (len(whole.args) < 3 or whole.args[2] == 0):
                first = sum(shape_of(piece)[0] for piece in whole.users if piece.args[1] < node.args[1])  # type: ignore[operator]
                return tensor, (first, first + shape_of(node)[0])  # type: ignore[return-value]
        return None


def _bare(path: str) -> str:
    """The second call of a module is told as "name@1"."""
    return re.sub(r"@\d+", "", path)


def _listen(module: nn.Module, args: tuple, output: Any) -> None:
    pass


@contextlib.contextmanager
def _as_plain_torch(model: nn.Module) -> Iterator[None]:
    """Layer norms of headway as torch's, no caches, no fused inference paths: what the graph then shows is the plain mathematics."""
    ours: list[Any] = [module for module in model.modules() if type(module) is LayerNorm and module.dims is None]
    config = getattr(model, "config", None)
    cached = [part for part in (config, getattr(config, "decoder", None)) if getattr(part, "use_cache", False)]
    fused = torch.backends.mha.get_fastpath_enabled()
    # a norm that is listened to is not fused away with the addition before it
    listeners = [m.register_forward_hook(_listen) for m in model.modules() if isinstance(m, nn.LayerNorm)]
    try:
        for module in ours:
            module.__class__ = nn.LayerNorm
        for part in cached:
            part.use_cache = False  # type: ignore[union-attr]
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.enable_grad():
            yield
    finally:
        for listener in listeners:
            listener.remove()
        for module in ours:
            module.__class__ = LayerNorm
        for part in cached:
            part.use_cache = True  # type: ignore[union-attr]
        torch.backends.mha.set_fastpath_enabled(fused)
