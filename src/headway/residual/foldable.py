"""The residual streams of any model, found in the graph of its operations: which layer norms can become RMS norms.

A layer norm is foldable where what it reads can be made zero-mean by recentring weights. That is asked backwards, from the norm
through additions, concatenation along tokens, slices, permutations (:mod:`headway.residual.axes`) to linear maps, convolutions,
tables and tokens; a per-channel gain on a branch goes into its writer. Where a stream comes from something that cannot be
recentred (the input of the model, a nonlinearity, another norm), it is recentred where it enters the first module that reads it.
Then it is asked forwards: everything else that reads a stream must not notice its mean, which only norms do not.

The graph detection follows "Enjoy Your Layer Normalization with the Computational Efficiency of RMSNorm" (arXiv 2605.14521), the
conversion arXiv 2305.14858.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from headway.residual.axes import operation, shape_of, sources
from headway.residual.graph import SIZES, Graph
from headway.residual.stream import NotPreNormError, Place, Reader, ReadingNorm, Stream, is_layer_norm


class _Blocked(Exception):
    """Why something cannot be made zero-mean, in words."""


@dataclass
class _Walk:
    """What making the input of one norm zero-mean needs.

    Attributes:
        asked: the values that become zero-mean, and along which axis.
        through: which inputs a value passes the demand on to.
        writers: the tensors to be recentred, and the operation each one is used in.
        entries: values that are recentred themselves, and the modules they enter.
    """

    asked: dict[fx.Node, int] = field(default_factory=dict)
    through: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    writers: list[tuple[fx.Node, Place, fx.Node]] = field(default_factory=list)
    entries: dict[fx.Node, str] = field(default_factory=dict)

    def copy(self) -> _Walk:
        return _Walk(dict(self.asked), dict(self.through), list(self.writers), dict(self.entries))


def foldable(model: nn.Module, inputs: Any, training: bool = False, refuse_dropout: bool = True) -> Stream | None:
    """The streams of a model whose layer norms can become RMS norms; None where it calls no layer norm.

    Args:
        model: any module; it is traced in the mode it is in, on fake tensors, so nothing is computed.
        inputs: what it is called with: a tuple, a mapping, or one tensor.
        training: recentre streams where they enter their first module, and after dropout, rather than in the weights.
        refuse_dropout: otherwise, whether dropout that is active now is an obstacle.

    Raises:
        NotPreNormError: no layer norm can be converted, or the model cannot be traced; the first obstacle is named.
    """
    graph = Graph(model, inputs)
    norms = [node for node in graph.nodes if operation(node) == "layer_norm"]
    if not norms:
        return None
    return _Search(graph, norms, training, refuse_dropout).run()


class _Search:
    def __init__(self, graph: Graph, norms: Sequence[fx.Node], training: bool, refuse_dropout: bool) -> None:
        self.graph, self.norms, self.training, self.refuse_dropout = graph, norms, training, refuse_dropout
        self.reasons: dict[fx.Node, str] = {}
        self.given_up: dict[fx.Node, str] = {}

    def run(self) -> Stream:
        walks: dict[fx.Node, _Walk] = {}
        for norm in self.norms:
            walk = _Walk()
            try:
                self._module(norm)
                source: Any = norm.args[0]
                self._require(walk, source, len(shape_of(norm)) - 1, None, None)
                walks[norm] = walk
            except _Blocked as error:
                self.reasons[norm] = str(error)
        blocked = list(self.reasons)
        while (bad := self._read_otherwise(walks)) is not None:
            node, reason = bad
            for norm in [norm for norm, walk in walks.items() if node in walk.asked]:
                self.reasons[norm] = reason
                self.given_up.update(dict.fromkeys(walks.pop(norm).asked, reason))
        residual = {node for norm, walk in walks.items() if self._deep(norm) for node in walk.asked}
        for norm in [norm for norm, walk in walks.items() if not residual & walk.asked.keys()]:
            self.reasons[norm] = f"{self.graph.path(norm)} reads no residual stream that could be recentred"
            del walks[norm]
        if not walks:
            # what could not be recentred explains more than what then read it, and small norms (of queries) explain nothing
            widest = max(shape_of(norm)[-1] for norm in self.norms)
            telling = [norm for norm in blocked if shape_of(norm)[-1] == widest] or list(self.reasons)
            raise NotPreNormError(self.reasons[self.graph.first(telling)])
        return self._stream(walks)

    def _deep(self, norm: fx.Node) -> bool:
        """Whether a branch with a norm of its own has been added to what a norm reads."""
        return not self.graph.before(norm).isdisjoint(self.norms)

    def _stream(self, walks: dict[fx.Node, _Walk]) -> Stream:
        calls: dict[str, list[fx.Node]] = {}
        for norm in walks:
            calls.setdefault(self.graph.path(norm), []).append(norm)
        skipped = {self.graph.path(norm): reason for norm, reason in self.reasons.items()}
        for path in [path for path in calls if path in skipped]:
            del calls[path]
        writers: dict[tuple, Place] = {}
        for walk in walks.values():
            for _, place, _ in walk.writers:
                writers[place.owner, place.attribute] = place
        entries = dict.fromkeys(entry for walk in walks.values() for entry in walk.entries.values())
        return Stream(
            norms=tuple(ReadingNorm(path, self._readers(path, nodes)) for path, nodes in calls.items()),
            writers=tuple(writers.values()),
            entries=tuple(entries),
            skipped=tuple(skipped.items()),
        )

    def _module(self, norm: fx.Node) -> None:
        path = self.graph.path(norm)
        if not is_layer_norm(self.graph.model.get_submodule(path)):
            raise _Blocked(
                f"{path or 'the model'} calls a layer norm that is no module over the last axis, so nothing can be put in its place"
            )

    def _where(self, node: fx.Node) -> str:
        return self.graph.path(node) or "the model's own forward"

    def _require(self, walk: _Walk, node: fx.Node, axis: int, gate: tuple[str, str] | None, after: str | None) -> None:
        """Asks for a value with mean zero along an axis; raises :class:`_Blocked` where that cannot be had."""
        if node in walk.asked:
            if walk.asked[node] != axis:
                raise _Blocked(f"what {self._where(node)} computes is read along two different axes")
            return
        walk.asked[node] = axis
        walk.through[node] = set()
        entry = self._entry(node, axis) if gate is None and after is None else None
        if entry is not None and self.training:
            walk.entries[node] = entry
            return
        before = walk.copy()
        try:
            self._descend(walk, node, axis, gate, after)
        except _Blocked:
            if entry is None:
                raise
            walk.asked, walk.through, walk.writers, walk.entries = (
                before.asked,
                before.through,
                before.writers,
                before.entries,
            )
            walk.through[node] = set()
            walk.entries[node] = entry

    def _descend(self, walk: _Walk, node: fx.Node, axis: int, gate: tuple[str, str] | None, after: str | None) -> None:
        kind, rank = operation(node), len(shape_of(node))
        if kind == "placeholder":
            raise _Blocked(f"the stream is the input {node.name!r} of the model, and enters no module as a whole")
        if kind == "embedding" and axis == rank - 1:
            walk.writers.append(self._writer(node.args[0], node, 1, gate, after))
        elif kind in ("linear", "addmm", "matmul", "mm") and axis == rank - 1:
            weighted = node.args[1] if kind == "addmm" else node.args[0]
            found = self.graph.reader(node, weighted)  # type: ignore[arg-type]
            if found is None or found[0].rows is not None:
                raise _Blocked(f"{self._where(node)} writes to the stream with a weight that is no whole parameter")
            for tensor, along in zip(found[1], (1 - found[0].axis, 0), strict=False):
                walk.writers.append(self._writer(tensor, node, along, gate, after))
        elif kind in ("conv1d", "conv2d", "conv3d", "convolution") and axis == 1:
            for tensor in node.args[1:3]:
                if tensor is not None:
                    walk.writers.append(self._writer(tensor, node, 0, gate, after))
        elif kind in ("zeros", "new_zeros", "zeros_like"):
            pass
        elif kind == "mul" and (scaled := self._gate(node, axis)) is not None:
            value, held, module = scaled
            if gate is not None:
                raise _Blocked(f"{self._where(node)} scales a branch of the stream a second time")
            walk.through[node] = {value}
            self._require(walk, value, axis, held, module or after)
        else:
            if kind == "dropout":
                after = self._dropout(node, after)
            found = sources(node, axis)
            if found is None:
                raise _Blocked(f"{kind} in {self._where(node)} writes to the stream and cannot be recentred")
            walk.through[node] = {source for source, _ in found}
            for source, along in found:
                if self.graph.is_tensor(source):
                    walk.writers.append(self._writer(source, node, along, gate, after))
                else:
                    self._require(walk, source, along, gate, after)

    def _writer(
        self, tensor: Any, use: fx.Node, axis: int, gate: tuple[str, str] | None, after: str | None
    ) -> tuple[fx.Node, Place, fx.Node]:
        held = self.graph.tensor(tensor, use)
        if held is None:
            raise _Blocked(f"{self._where(use)} writes to the stream with a weight that is no parameter of its own")
        if any(operation(user) != operation(use) for user in self.graph.users(tensor, held)):
            raise _Blocked(
                f"{'.'.join(held)} writes to the stream, and {self._where(use)} uses it in another way as well"
            )
        module: Any = self.graph.model.get_submodule(held[0])
        if getattr(module, "max_norm", None) is not None:
            raise _Blocked(f"{held[0]} writes to the stream and changes its rows by itself (max_norm)")
        return tensor, Place(*held, axis=axis, gate=gate, after=after), use

    def _gate(self, node: fx.Node, axis: int) -> tuple[fx.Node, tuple[str, str], str | None] | None:
        """For a product with one gain a channel: what is scaled, the gain, and the module whose output this is."""
        for value, factor in (node.args[:2], node.args[1::-1]):
            tensor = self.graph.laid_out(factor)
            if tensor is None or not isinstance(value, fx.Node) or shape_of(value) != shape_of(node):
                continue
            shape = shape_of(factor)
            own = axis - (len(shape_of(node)) - len(shape))
            if (
                own >= 0
                and shape[own] == shape_of(node)[axis] > 1
                and all(s == 1 for i, s in enumerate(shape) if i != own)
            ):
                held = self.graph.tensor(tensor, next(iter(tensor.users)))
                # a gain used elsewhere cannot be moved into one writer
                if (
                    held is not None
                    and len(tensor.users) == 1
                    and held[1] in self.graph.model.get_submodule(held[0])._parameters
                ):
                    return value, held, self._whole(node)
        return None

    def _whole(self, node: fx.Node) -> str | None:
        """The module whose output a value is, and which gives nothing else."""
        path = self.graph.path(node)
        inside = any(f"{self.graph.path(user)}.".startswith(f"{path}.") for user in node.users)
        return path if path and not inside else None

    def _dropout(self, node: fx.Node, after: str | None) -> str | None:
        rate, active = float(node.args[1]), bool(node.args[2])  # type: ignore[arg-type]
        if rate == 0:
            return after
        name = self.graph.path(node)
        if self.training:
            if not isinstance(self.graph.model.get_submodule(name), nn.Dropout):
                raise _Blocked(
                    f"{name or 'the model'} drops entries of the stream by a function, so nothing can be recentred after it; "
                    "set its rate to 0"
                )
            return after or name
        if active and self.refuse_dropout:
            raise _Blocked(
                f"{name} drops entries of the stream in training mode, which gives it a mean; call model.eval() first"
            )
        return after

    def _entry(self, node: fx.Node, axis: int) -> str | None:
        """The module that a value enters as a whole, if it is the last axis and what no norm of the same stream has led to."""
        if axis != len(shape_of(node)) - 1 or not node.users:
            return None
        own = self.graph.path(node) if node.op != "placeholder" else None
        readers = [user for user in node.users if operation(user) not in SIZES and user.op != "output"]
        if len(readers) < sum(operation(user) not in SIZES for user in node.users):
            return None
        paths = [self.graph.path(user).split(".") for user in readers]
        shared = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        module = ".".join(shared)
        if own is not None and (not module or f"{own}.".startswith(f"{module}.")):
            return None
        if own is None and (self.graph.is_tensor(node) or (not module and node is not self.graph.first_input)):
            return None
        if not self.graph.called_once(module):
            return None
        # a norm may lie behind it as the last step of an embedding, and not as the first of a branch
        trunk, waiting = {node}, [(node, axis)]
        while waiting:
            for source, along in sources(*waiting.pop()) or ():
                if source not in trunk:
                    trunk.add(source)
                    waiting.append((source, along))
        past = self.graph.before(node)
        return None if any(norm in past and norm not in trunk for norm in self.norms) else module

    def _read_otherwise(self, walks: dict[fx.Node, _Walk]) -> tuple[fx.Node, str] | None:
        """The first value of a stream that something reads which would notice its mean, and what that is."""
        asked: dict[fx.Node, int] = {}
        through: dict[fx.Node, set[fx.Node]] = {}
        uses: dict[tuple[fx.Node, tuple[str, str]], set[fx.Node]] = {}
        places: dict[tuple[str, str], Place] = {}
        for walk in walks.values():
            for node, axis in walk.asked.items():
                if asked.setdefault(node, axis) != axis:
                    return node, f"what {self._where(node)} computes is read along two different axes"
                through.setdefault(node, set()).update(walk.through[node])
            for tensor, place, use in walk.writers:
                if places.setdefault((place.owner, place.attribute), place) != place:
                    between = ".".join(place.gate) if place.gate else place.after or "a gain"
                    return use, f"{between} acts on the stream itself, which is read before and after it"
                uses.setdefault((tensor, (place.owner, place.attribute)), set()).add(use)
        for node in sorted(asked, key=self.graph._order.__getitem__):
            for user in node.users:
                inner = (
                    operation(user) == "layer_norm" and user.args[0] is node and asked[node] == len(shape_of(node)) - 1
                )
                if inner or operation(user) in SIZES or node in through.get(user, ()):
                    continue
                if user in self.given_up:
                    return node, self.given_up[user]
                reader = self._first_reader(node, asked[node], user)
                if reader.op == "output":
                    return node, "the stream itself is an output of the model, without a final norm"
                return node, f"{self._where(reader)} reads the stream without a norm ({operation(reader)})"
        for (tensor, slot), known in uses.items():
            users = [user for user in self.graph.users(tensor, slot) if operation(user) not in SIZES]
            if others := [user for user in users if user not in known]:
                node = self.graph.first(one for one in known if one in asked)
                return node, f"{'.'.join(slot)} also serves {self._where(others[0])}, which is no writer"
        return None

    def _first_reader(self, node: fx.Node, axis: int, user: fx.Node) -> fx.Node:
        """The first operation that does something else with a stream than to go on as one."""
        while user.op != "output" and (along := self._forwards(user, node, axis)) is not None:
            further = [one for one in user.users if operation(one) not in (*SIZES, "layer_norm")]
            if not further:
                break
            node, axis, user = user, along, further[0]
        return user

    def _readers(self, path: str, norms: Sequence[fx.Node]) -> tuple[Reader, ...] | None:
        """Every linear map that reads a norm's output; None where anything else does."""
        norm: Any = self.graph.model.get_submodule(path)
        found: dict[tuple, Reader] = {}
        parameters: set[tuple[fx.Node, Any]] = set()
        reading: set[fx.Node] = set()
        waiting: list[tuple[fx.Node, int]] = [(node, len(shape_of(node)) - 1) for node in norms]
        while waiting:
            node, axis = waiting.pop()
            for user in node.users:
                if operation(user) in SIZES:
                    continue
                read = self.graph.reader(user, node)
                if read is not None and axis == len(shape_of(node)) - 1:
                    if norm.bias is not None and not read[0].bias:
                        return None
                    found[read[0].owner, read[0].weight, read[0].rows] = read[0]
                    parameters.update((tensor, self.graph.tensor(tensor, user)) for tensor in read[1])
                    reading.add(user)
                    continue
                # adding or scaling is no longer the norm's output alone, and dropout is not linear in the bias
                if (
                    user.op == "output"
                    or len(user.all_input_nodes) > 1
                    or operation(user) in ("dropout", "mul", "div", "add", "sub")
                ):
                    return None
                moved = self._forwards(user, node, axis)
                if moved is None:
                    return None
                waiting.append((user, moved))
        for tensor, slot in parameters:
            for user in self.graph.users(tensor, slot):
                if not (set(self._ends(user)) <= reading or self._cut_apart(user)):
                    return None
        return tuple(found.values()) if found else None

    def _ends(self, node: fx.Node) -> list[fx.Node]:
        """The operations that a parameter reaches through being transposed."""
        if operation(node) in ("t", "transpose"):
            return [end for user in node.users for end in self._ends(user)]
        return [node]

    def _cut_apart(self, user: fx.Node) -> bool:
        """Whether a use takes rows of its own (the keys and values of a cross-attention)."""
        return operation(user) in ("split", "split_with_sizes", "chunk", "slice")

    def _forwards(self, user: fx.Node, node: fx.Node, axis: int) -> int | None:
        """The axis of ``user`` along which the channels of ``node`` lie."""
        for candidate in range(len(shape_of(user))):
            if (node, axis) in (sources(user, candidate) or ()):
                return candidate
        return None
