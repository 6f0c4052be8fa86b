"""Makes an optimiser follow a model whose parameters have changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from headway._edits import Edit


def owners_in(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> dict[int, int]:
    """id(parameter) -> index of its group, for the parameters of the model that the optimiser holds.

    Raises:
        ValueError: it holds none of them.
    """
    if optimizer is None:
        return {}
    mine = {id(parameter) for parameter in model.parameters()}
    owners = {
        id(parameter): index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) in mine
    }
    if not owners:
        raise ValueError("optimizer= holds no parameter of this model; pass the optimiser that was built from it")
    return owners


def repoint(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    edits: Sequence[Edit],
    owners: dict[int, int],
    back: bool = False,
) -> None:
    """Moves groups and state to the parameters that stand there now; drops what left the model; adds what is new to the group
    of what was there before. A place whose parameters the optimiser did not hold (frozen ones) is left out.

    Args:
        model: after the edits (with ``back``: after they were taken back).
        owners: :func:`owners_in` of the model before.
        back: the edits were taken back.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for edit in edits:
        pairs = edit.moved()
        moved.update({new: old for old, new in pairs.items()} if back else pairs)
    alive = {id(parameter) for parameter in model.parameters()}
    handled: set[int] = set()
    for group in optimizer.param_groups:
        fresh: list[nn.Parameter] = []
        for parameter in group["params"]:
            target = parameter
            while target in moved:
                target = moved[target]
            if id(parameter) in owners and id(target) not in alive:
                optimizer.state.pop(parameter, None)
                continue
            if target is not parameter and parameter in optimizer.state:
                optimizer.state[target] = optimizer.state.pop(parameter)
            if id(target) not in handled:
                handled.add(id(target))
                fresh.append(target)
        group["params"] = fresh
    places = [edit.parameters() for edit in edits]
    places = [(after, before) for before, after in reversed(places)] if back else places
    former = {id(parameter) for gone, _ in places for parameter in gone}
    for gone, come in places:
        groups = [owners[id(parameter)] for parameter in gone if id(parameter) in owners]
        if gone and not groups:
            continue
        for parameter in come:
            if id(parameter) in alive and id(parameter) not in handled and id(parameter) not in former:
                handled.add(id(parameter))
                optimizer.param_groups[groups[0] if groups else 0]["params"].append(parameter)
