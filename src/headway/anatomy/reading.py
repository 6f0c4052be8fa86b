"""Reads a model's stacks off its module names: which layers form one list, and what stands around each list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from headway.anatomy.description import Block, Stack
from headway.anatomy.families import has, pattern_of, placement_of
from headway.anatomy.pattern import Pattern

Layer = tuple[str, nn.Module, Pattern]


def layer_lists(model: nn.Module) -> dict[tuple[str, str], list[Layer]]:
    """The known layers, by the name of the list that holds them and their name within its entries."""
    found: dict[tuple[str, str], list[Layer]] = {}
    outer: str | None = None
    for name, module in model.named_modules():
        if outer is not None and (not outer or name.startswith(outer + ".")):
            continue
        if (pattern := pattern_of(module)) is None:
            continue
        outer = name
        parts = name.split(".")
        at = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
        found.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), []).append((name, module, pattern))
    return found


class Surroundings:
    """Finds what stands around the lists of layers of one model."""

    def __init__(self, model: nn.Module, inside: tuple[str, ...], homes: list[str]) -> None:
        self.modules = {
            name: module for name, module in model.named_modules(remove_duplicate=False) if not name.startswith(inside)
        }
        parameters = model.named_parameters(remove_duplicate=False)
        self.parameters = [name for name, _ in parameters if not name.startswith(inside)]
        self.homes = homes
        self.scopes = [self._scope(home) for home in homes]

    def _scope(self, home: str) -> str:
        """The widest module around a list of layers that holds no other list."""
        others = [other for other in self.homes if other != home]
        parts = home.split(".")
        for i in range(len(parts) + 1):
            scope = ".".join(parts[:i])
            if not any(_within(other, scope) for other in others):
                return scope
        return home

    def _search(self, index: int, wanted: Iterable[str], names: Iterable[str], without_scope: int) -> tuple[str, ...]:
        """The names that end in a wanted one and belong to this stack; those in no stack's scope to ``without_scope``."""
        found = []
        names = list(names)
        for entry in wanted:
            part, _, end = entry.rpartition(":")
            if part and part not in self.homes[index].split("."):
                continue
            for name in names:
                if name != end and not name.endswith("." + end):
                    continue
                free = not any(_within(name, scope) for scope in self.scopes)
                if _within(name, self.scopes[index]) or (free and (part or index == without_scope)):
                    found.append(name)
        return tuple(dict.fromkeys(found))

    def _final_norm(self, index: int, owner: str, wanted: Iterable[str]) -> str | None:
        for entry in wanted:
            place = owner.split(".") if owner else []
            for part in entry.split("/"):
                place = place[:-1] if part == ".." else [*place, part]
            name = ".".join(place)
            mine = _within(name, self.scopes[index]) or index == len(self.homes) - 1
            if mine and not isinstance(self.modules.get(name, nn.Identity()), nn.Identity):
                return name
        return None

    def stack(self, index: int, home: str, layers: list[Layer]) -> Stack:
        pattern, last = layers[0][2], len(self.homes) - 1
        blocks = tuple(_block(name, i, module, kind) for i, (name, module, kind) in enumerate(layers))
        owner = home.rpartition(".")[0]
        writer: Any = layers[0][1].get_submodule(_relative(blocks[0].sublayers[0].writer, layers[0][0]))
        width = _outputs(writer) or 0
        norms = self._search(index, pattern.embedding_norm, self.modules, 0)
        embeddings = self._search(index, pattern.embeddings, self.modules, 0)
        heads = self._search(index, pattern.heads, self.modules, last)
        return Stack(
            name=owner,
            family=pattern.family,
            hidden_size=width,
            blocks=blocks,
            embeddings=tuple(name for name in embeddings if _outputs(self.modules[name]) in (None, width)),
            parameters=self._search(index, pattern.parameters, self.parameters, 0),
            bent=self._search(index, pattern.bent, self.modules, 0),
            embedding_norm=next((n for n in norms if not isinstance(self.modules[n], nn.Identity)), None),
            final_norm=self._final_norm(index, owner, pattern.final_norm),
            heads=tuple(name for name in heads if getattr(self.modules[name], "in_features", width) == width),
            dropouts=self._search(index, pattern.dropouts, self.modules, 0),
            dropout_rates=tuple(
                f"{owner}.{rate}".lstrip(".")
                for rate in pattern.dropout_rates
                if isinstance(getattr(self.modules.get(owner), rate, None), float | int)
            ),
        )


def _within(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(scope + ".")


def _relative(name: str, layer: str) -> str:
    return name.removeprefix(layer + ".") if layer else name


def _outputs(module: nn.Module) -> int | None:
    """How many channels a writer writes, None where its class does not tell."""
    # transformers' Conv1D keeps its weight as (in, out)
    for attribute in ("embedding_dim", "out_features", "out_channels", "nf"):
        if isinstance(size := getattr(module, attribute, None), int):
            return size
    return None


def _block(name: str, index: int, module: nn.Module, pattern: Pattern) -> Block:
    prefix = name + "." if name else ""

    def full(parts: Iterable[str]) -> tuple[str, ...]:
        return tuple(prefix + part for part in parts if has(module, part))

    def one(part: str | None) -> str | None:
        there = part is not None and has(module, part) and not isinstance(module.get_submodule(part), nn.Identity)
        return f"{prefix}{part}" if there else None

    sublayers = tuple(
        replace(
            sublayer,
            function=one(sublayer.function),
            norm=one(sublayer.norm),
            # a layer that was given output norms carries them under these names
            output_norm=one(sublayer.output_norm) or one(f"{sublayer.kind}_output_norm"),
            readers=full(sublayer.readers),
            memory_readers=full(sublayer.memory_readers),
            writer=prefix + sublayer.writer,
            gain=one(sublayer.gain),
            dropouts=full(sublayer.dropouts),
            dropout_rates=tuple(prefix + rate for rate in sublayer.dropout_rates),
        )
        for sublayer in pattern.sublayers
        if has(module, sublayer.writer)
    )
    return Block(name, index, placement_of(module, pattern), sublayers)
