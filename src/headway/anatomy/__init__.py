"""Where a known model keeps its residual streams: who writes to them, who reads them, and through which norms.

>>> describe(model).stacks[0].blocks[0].sublayers[0].writer
'transformer.h.0.attn.c_proj'
"""

from __future__ import annotations

from torch import nn

from headway.anatomy.description import Anatomy, Block, Stack, Sublayer
from headway.anatomy.families import PATTERNS
from headway.anatomy.pattern import Pattern
from headway.anatomy.reading import Surroundings, layer_lists

__all__ = ["Anatomy", "Block", "Pattern", "Stack", "Sublayer", "UnknownFamily", "describe", "families", "register"]


class UnknownFamily(TypeError):
    """No part of the model is a layer of a known family; the message lists the families."""


def families() -> list[str]:
    """The names of the known families."""
    return sorted({pattern.family for pattern in PATTERNS.values()})


def register(layer_class: str, pattern: Pattern) -> None:
    """Makes the layers of the class named ``layer_class`` known, e.g. ``register("MyBlock", Pattern("mine", "pre", (...)))``."""
    PATTERNS[layer_class] = pattern


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a model: one :class:`Stack` for every list of layers of a known family.

    What stands around the layers is looked for near their own list; what belongs to none (a head on top of encoder and decoder)
    counts as written to the first stack or read from the last.

    Raises:
        UnknownFamily: no layer of a known family was found.
    """
    lists = layer_lists(model)
    if not lists:
        kinds = sorted({type(module).__name__ for module in model.modules()} - {"ModuleList", "Sequential"})[:12]
        raise UnknownFamily(
            f"this model holds no layer of a known family ({', '.join(families())}); it is built of {', '.join(kinds)}; "
            "headway.anatomy.register makes another layer class known"
        )
    inside = tuple(f"{name}." if name else "" for layers in lists.values() for name, _, _ in layers)
    surroundings = Surroundings(model, inside, [home for home, _ in lists])
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    stacks = tuple(surroundings.stack(i, home, layers) for i, ((home, _), layers) in enumerate(lists.items()))
    return Anatomy(stacks, tuple((names[0], other) for names in places.values() for other in names[1:]))
