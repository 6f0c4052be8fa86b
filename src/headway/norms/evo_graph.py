"""Layers as graphs of elementary operations: the search space of EvoNorm (arXiv 2004.02967, section 3).

A graph begins with x, zero, and two learned vectors a number a channel, v0 (starting at 0) and v1 (at 1); every further node applies
an operation to earlier ones, and the last node, times gamma plus beta, is the output. Written as a formula:

    S0       div(mul(x, sigmoid(mul(v1, x))), std_whg(x))
    BN-ReLU  max(div(add(x, neg(mean_bwh(x))), std_bwh(x)), zero)

Roots and logarithms hold eps inside and keep the sign of what they are taken of; a division holds none, so that one by zero is seen.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPS = 1e-5
INITIAL = ("x", "zero", "v0", "v1")
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": lambda x: torch.sign(x) * torch.log(x.abs() + EPS),
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": lambda x: torch.sign(x) * torch.sqrt(x.abs() + EPS),
}
STATISTICS = tuple(f"{what}_{axes}" for what in ("mean", "std", "rms") for axes in ("bwh", "wh", "whc", "whg"))
Node = tuple[str, tuple[int, ...]]


def operations(batch_free: bool = False) -> list[str]:
    """Every operation; without those over the batch where it has to be free of them."""
    return [*BINARY, *UNARY, *(s for s in STATISTICS if not (batch_free and s.endswith("bwh")))]


@dataclass(frozen=True)
class LayerGraph:
    """Nodes after the four initial ones, each an operation and the numbers of its predecessors; the last is the output."""

    nodes: tuple[Node, ...]

    @classmethod
    def random(cls, draw: random.Random, nodes: int = 10, batch_free: bool = False) -> LayerGraph:
        """Operation and predecessors drawn uniformly, node by node."""
        return cls(tuple(_draw(draw, len(INITIAL) + i, batch_free) for i in range(nodes)))

    def mutate(self, draw: random.Random, batch_free: bool = False) -> LayerGraph:
        """One node, drawn uniformly, with another operation and predecessors."""
        at = draw.randrange(len(self.nodes))
        fresh = _draw(draw, len(INITIAL) + at, batch_free)
        return LayerGraph((*self.nodes[:at], fresh, *self.nodes[at + 1 :]))

    @property
    def formula(self) -> str:
        """The output as nested operations: dead nodes are gone, and operands that may trade places stand in one order."""
        written: list[str] = list(INITIAL)
        for op, at in self.nodes:
            parts = [written[i] for i in at]
            written.append(f"{op}({', '.join(sorted(parts) if op in ('add', 'mul', 'max') else parts)})")
        return written[-1]

    @classmethod
    def from_formula(cls, formula: str) -> LayerGraph:
        """The graph of a formula; what is written twice becomes one node.

        Raises:
            ValueError: an operation or name that does not exist, a wrong number of operands, or no operation at all.
        """
        nodes: list[Node] = []

        def visit(node: ast.expr) -> int:
            if isinstance(node, ast.Name) and node.id in INITIAL:
                return INITIAL.index(node.id)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in operations():
                op = node.func.id
                if len(node.args) == (2 if op in BINARY else 1) and not node.keywords:
                    new = op, tuple(visit(each) for each in node.args)
                    if new not in nodes:
                        nodes.append(new)
                    return len(INITIAL) + nodes.index(new)
            raise ValueError(
                f"{ast.unparse(node)!r} is no part of a formula: the names are {', '.join(INITIAL)}, the operations "
                f"{', '.join(operations())}, with two operands for {', '.join(BINARY)} and one for the others"
            )

        try:
            parsed = ast.parse(formula.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"{formula!r} is no formula: {error.msg}") from None
        if visit(parsed) < len(INITIAL):
            raise ValueError(f"the formula {formula!r} holds no operation")
        return cls(tuple(nodes))

    def to_module(self, num_features: int, groups: int = 8, momentum: float = 0.1) -> GraphLayer:
        """The layer for so many channels."""
        return GraphLayer(self, num_features, groups, momentum)


def _draw(draw: random.Random, earlier: int, batch_free: bool) -> Node:
    op = draw.choice(operations(batch_free))
    return op, tuple(draw.randrange(earlier) for _ in range(2 if op in BINARY else 1))


class GraphLayer(nn.Module):
    """A layer graph in plain torch, with gamma and beta after it; statistics over the batch have running means for evaluation.

    Args:
        graph: the graph; its dead nodes are left out.
        num_features: channels.
        groups: for statistics over groups; lowered until it divides the channels.
        momentum: the share of the new batch in the running means.

    Shapes:
        input and output: (B, C, *space).
    """

    signal_kind = "post"

    def __init__(self, graph: LayerGraph, num_features: int, groups: int = 8, momentum: float = 0.1) -> None:
        super().__init__()
        self.graph = LayerGraph.from_formula(graph.formula)
        self.groups = next(g for g in range(min(groups, num_features), 0, -1) if num_features % g == 0)
        self.momentum = momentum
        self.weight, self.bias = (nn.Parameter(torch.full((num_features,), value)) for value in (1.0, 0.0))
        used = {i for _, at in self.graph.nodes for i in at}
        self.v0 = nn.Parameter(torch.zeros(num_features)) if 2 in used else None
        self.v1 = nn.Parameter(torch.ones(num_features)) if 3 in used else None
        for i, (op, _) in enumerate(self.graph.nodes):
            if op.endswith("_bwh"):
                start = torch.zeros(num_features) if op.startswith("mean") else torch.ones(num_features)
                self.register_buffer(f"running_{i}", start)

    def _statistic(self, op: str, i: int, value: Tensor, x: Tensor) -> Tensor:
        what, axes = op.split("_")
        if axes == "bwh" and not self.training:
            return getattr(self, f"running_{i}")[:, None]
        a = value.expand_as(x)
        if axes == "whg":
            a = a.reshape(len(a), self.groups, -1)
        dims = {"bwh": (0, 2), "wh": (2,), "whc": (1, 2), "whg": (2,)}[axes]
        if what == "mean":
            found = a.mean(dims, keepdim=True)
        else:
            square = a.var(dims, correction=0, keepdim=True) if what == "std" else a.square().mean(dims, keepdim=True)
            found = torch.sqrt(square + EPS)
        if axes == "whg":
            found = found.repeat_interleave(x.shape[1] // self.groups, 1)
        if axes == "bwh":
            with torch.no_grad():
                getattr(self, f"running_{i}").lerp_(found.flatten(), self.momentum)
        return found

    def forward(self, x: Tensor) -> Tensor:
        a = x.flatten(2)
        values: list[Tensor | None] = [a, a.new_zeros(1, 1, 1)]
        values += [None if v is None else v[:, None] for v in (self.v0, self.v1)]
        for i, (op, at) in enumerate(self.graph.nodes):
            given: list[Tensor] = [values[j] for j in at]  # type: ignore[misc]
            if op in BINARY:
                values.append(BINARY[op](*given))
            else:
                values.append(UNARY[op](*given) if op in UNARY else self._statistic(op, i, given[0], a))
        y = self.weight[:, None] * values[-1] + self.bias[:, None]  # type: ignore[operator]
        return y.expand_as(a).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self.graph.formula}"
