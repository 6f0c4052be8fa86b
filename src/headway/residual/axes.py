"""Where the channels of a stream lie on the other side of an operation: which input, and along which axis.

One table of the operations that keep "mean zero along the channels" (arXiv 2305.14858): they pick, copy, lay out, add or scale whole
channel vectors. Whatever is not listed mixes channels, or is not known to leave them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

Source = tuple[fx.Node, int]


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's value; () for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def operation(node: fx.Node) -> str:
    """The name of the operator without its overload: "add", "layer_norm"."""
    if node.op != "call_function":
        return node.op
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).rstrip("_") if not str(name).startswith("_") else str(name)


def _same(node: fx.Node, axis: int) -> list[Source]:
    return [(node.args[0], axis)]  # type: ignore[list-item]


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _elsewhere(node: fx.Node, axis: int) -> list[Source] | None:
    """One axis is cut or picked from; it must not be that of the channels."""
    dim = _argument(node, 1, "dim", 0)
    return None if dim % len(shape_of(node.args[0])) == axis else _same(node, axis)


def _pieces(node: fx.Node, axis: int) -> list[Source] | None:
    """``x.split(...)[i]``: the pieces of another axis."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or operation(source) not in ("split", "split_with_sizes", "chunk", "unbind"):
        return None
    whole = source.args[0]
    dim = _argument(source, 1 if operation(source) == "unbind" else 2, "dim", 0) % len(shape_of(whole))
    if operation(source) == "unbind":
        axis = axis + (axis >= dim)
    return None if dim == axis else [(whole, axis)]  # type: ignore[list-item]


def _select(node: fx.Node, axis: int) -> list[Source]:
    dim = node.args[1] % len(shape_of(node.args[0]))  # type: ignore[operator]
    return [(node.args[0], axis + (axis >= dim))]  # type: ignore[list-item]


def _unsqueeze(node: fx.Node, axis: int) -> list[Source] | None:
    dim = node.args[1] % len(shape_of(node))  # type: ignore[operator]
    return None if dim == axis else [(node.args[0], axis - (axis > dim))]  # type: ignore[list-item]


def _transpose(node: fx.Node, axis: int) -> list[Source]:
    rank = len(shape_of(node))
    a, b = (node.args[1] % rank, node.args[2] % rank) if len(node.args) > 2 else (0, 1)  # type: ignore[operator]
    return [(node.args[0], b if axis == a else a if axis == b else axis)]  # type: ignore[list-item]


def _permute(node: fx.Node, axis: int) -> list[Source]:
    rank = len(shape_of(node))
    return [(node.args[0], node.args[1][axis] % rank)]  # type: ignore[index, list-item]


def _expand(node: fx.Node, axis: int) -> list[Source] | None:
    before, after = shape_of(node.args[0]), shape_of(node)
    old = axis - (len(after) - len(before))
    return [(node.args[0], old)] if old >= 0 and before[old] == after[axis] else None  # type: ignore[list-item]


def _view(node: fx.Node, axis: int) -> list[Source] | None:
    """Axes are merged or cut, and that of the channels is left whole."""
    before, after = shape_of(node.args[0]), shape_of(node)

    def inner(shape: tuple[int, ...], i: int) -> int:
        found = 1
        for size in shape[i + 1 :]:
            found *= size
        return found

    for old, size in enumerate(before):
        if size == after[axis] and inner(before, old) == inner(after, axis):
            return [(node.args[0], old)]  # type: ignore[list-item]
    return None


def _cat(node: fx.Node, axis: int) -> list[Source] | None:
    dim = _argument(node, 1, "dim", 0) % len(shape_of(node))
    return None if dim == axis else [(part, axis) for part in node.args[0]]  # type: ignore[union-attr, misc]


def _stack(node: fx.Node, axis: int) -> list[Source] | None:
    dim = _argument(node, 1, "dim", 0) % len(shape_of(node))
    return None if dim == axis else [(part, axis - (axis > dim)) for part in node.args[0]]  # type: ignore[union-attr, misc]


def _pool(node: fx.Node, axis: int) -> list[Source] | None:
    """Means and sums over positions."""
    dims, keep = _argument(node, 1, "dim"), _argument(node, 2, "keepdim", False)
    if dims is None:
        return None
    rank = len(shape_of(node.args[0]))
    pooled = {dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])}
    kept = [i for i in range(rank) if keep or i not in pooled]
    return None if kept[axis] in pooled else [(node.args[0], kept[axis])]  # type: ignore[list-item]


def _index(node: fx.Node, axis: int) -> list[Source] | None:
    """``x[rows, columns]`` where the channels are the last axis and not picked from."""
    rank = len(shape_of(node.args[0]))
    picked = list(node.args[1])  # type: ignore[union-attr]
    last = axis == len(shape_of(node)) - 1 and (len(picked) < rank or picked[-1] is None)
    return [(node.args[0], rank - 1)] if last else None  # type: ignore[list-item]


def _add(node: fx.Node, axis: int) -> list[Source] | None:
    found: list[Source] = []
    for side in node.args[:2]:
        shape = shape_of(side)
        own = axis - (len(shape_of(node)) - len(shape))
        # one number added to all channels is a mean
        if own < 0 or shape[own] != shape_of(node)[axis]:
            return None
        found.append((side, own))  # type: ignore[arg-type]
    return found


def _scale(node: fx.Node, axis: int) -> list[Source] | None:
    """A product with one number for all channels of a vector."""
    sides: list[Source] = []
    for side in node.args[:2]:
        shape = shape_of(side)
        own = axis - (len(shape_of(node)) - len(shape))
        if own >= 0 and shape[own] != 1:
            sides.append((side, own))  # type: ignore[arg-type]
    if not sides and shape_of(node)[axis] == 1:
        return None
    # the second factor of a quotient divides
    return sides if len(sides) == 1 and (operation(node) == "mul" or sides[0][0] is node.args[0]) else None


def _where(node: fx.Node, axis: int) -> list[Source] | None:
    condition = shape_of(node.args[0])
    own = axis - (len(shape_of(node)) - len(condition))
    if own >= 0 and condition[own] != 1:
        return None
    sides = [(side, axis - (len(shape_of(node)) - len(shape_of(side)))) for side in node.args[1:3]]
    return sides if all(i >= 0 and shape_of(side)[i] == shape_of(node)[axis] for side, i in sides) else None  # type: ignore[return-value]


_KEEP: dict[str, Callable[[fx.Node, int], list[Source] | None]] = {
    **dict.fromkeys(
        ("to", "_to_copy", "contiguous", "clone", "alias", "detach", "neg", "dropout", "lift_fresh_copy"), _same
    ),
    **dict.fromkeys(("slice", "narrow", "index_select"), _elsewhere),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "_unsafe_view"), _view),
    **dict.fromkeys(("mean", "sum"), _pool),
    **dict.fromkeys(("mul", "div"), _scale),
    **dict.fromkeys(("add", "sub"), _add),
    "getitem": _pieces,
    "select": _select,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "t": _transpose,
    "permute": _permute,
    "expand": _expand,
    "cat": _cat,
    "stack": _stack,
    "index": _index,
    "where": _where,
}


def sources(node: fx.Node, axis: int) -> list[Source] | None:
    """The inputs that must have mean zero along an axis for ``node`` to have it along ``axis``; None where nothing is known."""
    rule = _KEEP.get(operation(node))
    return None if rule is None else rule(node, axis)
