"""Which batch norms may take the ReLU behind them along: those whose output goes into one ReLU module and nowhere else in training.

Told from the traced graph. A model that torch.fx cannot trace has none, and its norms and ReLUs stay apart; so do a ReLU called as a
function and one behind a residual addition.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.learning.batchnorm_only.choose import graph_of


def norms_before_relu(model: nn.Module) -> set[int]:
    """Ids of such batch norms. One that is called several times needs a ReLU behind every call."""
    graph = _graph_in_training(model)
    if graph is None:
        return set()
    modules = dict(model.named_modules(remove_duplicate=False))

    def called(node: fx.Node) -> Any:
        return modules[str(node.target)] if node.op == "call_module" else None

    found: dict[int, bool] = {}
    for node in graph.nodes:
        norm = called(node)
        if isinstance(norm, _BatchNorm):
            readers = list(node.users)
            alone = len(readers) == 1 and isinstance(called(readers[0]), nn.ReLU)
            found[id(norm)] = alone and found.get(id(norm), True)
    return {key for key, alone in found.items() if alone}


def _graph_in_training(model: nn.Module) -> fx.Graph | None:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = True
        return graph_of(model)
    finally:
        for module, mode in modes:
            module.training = mode
