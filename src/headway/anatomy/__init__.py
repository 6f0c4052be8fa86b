"""Where a known model keeps its residual stream: who writes to it, who reads it, and through which norms.

>>> describe(model).blocks[0].sublayers[0].writer
'transformer.h.0.attn.c_proj'
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from headway.anatomy.description import Anatomy, Block, Sublayer
from headway.anatomy.families import PATTERNS, Pattern, pattern_of, placement_of

__all__ = ["Anatomy", "Block", "Pattern", "Sublayer", "UnknownFamily", "describe", "families", "register"]


class UnknownFamily(TypeError):
    """No part of the model is a layer of a known family; the message lists the families."""


def families() -> list[str]:
    """The names of the known families."""
    return sorted({pattern.family for pattern in PATTERNS.values()})


def register(layer_class: str, pattern: Pattern) -> None:
    """Makes the layers of the class named ``layer_class`` known, e.g. ``register("MyBlock", Pattern("mine", "pre", (...)))``."""
    PATTERNS[layer_class] = pattern


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a model that holds one stack of layers of a known family.

    Where a model holds several stacks (an encoder and a decoder), all their layers are listed in order; the embedding,
    the final norm and the heads are those of the first.

    Raises:
        UnknownFamily: no layer of a known family was found.
    """
    modules = dict(model.named_modules())
    found = [(name, module, pattern) for name, module in modules.items() if (pattern := pattern_of(module))]
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()} - {"ModuleList", "Sequential"})[:12]
        raise UnknownFamily(
            f"this model holds no layer of a known family ({', '.join(families())}); it is built of {', '.join(kinds)}; "
            "headway.anatomy.register makes another layer class known"
        )
    pattern = found[0][2]
    blocks = tuple(_block(name, index, module, kind) for index, (name, module, kind) in enumerate(found))
    stack = found[0][0].rpartition(".")[0].rpartition(".")[0]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    inside = tuple(block.name + "." for block in blocks)

    def search(wanted: tuple[str, ...], names: object) -> tuple[str, ...]:
        outside = [name for name in names if not name.startswith(inside)]  # type: ignore[attr-defined]
        return tuple(name for part in wanted for name in outside if name == part or name.endswith("." + part))

    final = tuple(name for name in search(pattern.final_norm, modules) if name.rpartition(".")[0] == stack)
    first = modules[blocks[0].sublayers[0].writer]
    weight = getattr(first, "weight", None)
    # transformers' Conv1D keeps its weight as (in, out)
    width = int(weight.shape[-1 if type(first).__name__ == "Conv1D" else 0]) if weight is not None else 0
    places: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        places.setdefault(id(parameter), []).append(name)
    return Anatomy(
        family=pattern.family,
        hidden_size=width,
        blocks=blocks,
        embeddings=search(pattern.embeddings, modules),
        parameters=search(pattern.parameters, parameters),
        embedding_norm=next(iter(search(pattern.embedding_norm, modules)), None),
        final_norm=next(iter(final), None),
        heads=search(pattern.heads, modules),
        tied=tuple((names[0], other) for names in places.values() for other in names[1:]),
    )


def _block(name: str, index: int, module: nn.Module, pattern: Pattern) -> Block:
    inner = dict(module.named_modules())
    prefix = name + "." if name else ""

    def full(part: str | None) -> str | None:
        return None if part is None or part not in inner else prefix + part

    sublayers = tuple(
        replace(
            sublayer,
            function=full(sublayer.function),
            norm=full(sublayer.norm),
            output_norm=full(sublayer.output_norm),
            readers=tuple(prefix + reader for reader in sublayer.readers if reader in inner),
            writer=prefix + sublayer.writer,
            dropouts=tuple(prefix + drop for drop in sublayer.dropouts if drop in inner),
        )
        for sublayer in pattern.sublayers
    )
    return Block(name, index, placement_of(module, pattern), sublayers)
