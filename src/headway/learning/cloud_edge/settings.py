"""How a cloud adapts, and the two networks made ready for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from headway.learning.cloud_edge.affine import class_count, named_affine_parameters
from headway.learning.cloud_edge.renorm import BatchRenorm

Transform = Callable[[Any], Any]
BatchNormMode = Literal["renorm", "batch", "frozen"]


@dataclass(frozen=True)
class Settings:
    """How a cloud adapts.

    Attributes:
        batch_size: B_c, uploaded samples a step.
        replay, replay_start: samples the buffer holds, and how many it must hold before any is drawn; 0 replays nothing.
        edge_lr, cloud_lr, momentum: of SGD on the edge network's and the foundation model's affine parameters; with ``cloud_lr`` 0 the
            foundation model stays as it is.
        alpha, beta, gamma, tau: of :class:`~headway.learning.cloud_edge.distillation.SelectiveEntropyDistillation`.
        bn: how batch norms train: "renorm" (:class:`~headway.learning.cloud_edge.renorm.BatchRenorm`), "batch" (as batch norm does)
            or "frozen" (running statistics, which never move).
        reset_stats: with "renorm", the first batch defines the statistics, as in the released code.
        idle_replay: a message that fills no batch is followed by a step on 4 B_c replayed samples.
        transform, foundation_transform: from what is uploaded to what each network takes.
        autocast: type of the forward passes; losses stay float32.
        seed: of the draws from the buffer.
    """

    batch_size: int = 32
    replay: int = 10_000
    replay_start: int = 256
    edge_lr: float = 2.5e-3
    cloud_lr: float = 2.5e-4
    momentum: float = 0.9
    alpha: float = 3.0
    beta: float = 3.0
    gamma: float = 1.0
    tau: float = 1.0
    bn: BatchNormMode = "renorm"
    reset_stats: bool = False
    idle_replay: bool = False
    transform: Transform | None = None
    foundation_transform: Transform | None = None
    autocast: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.replay < 0 or self.replay_start < 1:
            raise ValueError(
                "batch_size and replay_start are at least 1, replay at least 0; they are "
                f"{self.batch_size}, {self.replay_start} and {self.replay}"
            )
        if self.bn not in ("renorm", "batch", "frozen"):
            raise ValueError(f'bn is "renorm", "batch" or "frozen"; it is {self.bn!r}')
        if self.edge_lr <= 0 or self.cloud_lr < 0:
            raise ValueError(
                f"edge_lr must be above 0 and cloud_lr at least 0; they are {self.edge_lr} and {self.cloud_lr}"
            )


def prepare(edge_model: nn.Module, foundation_model: nn.Module, settings: Settings) -> tuple[nn.Module, nn.Module]:
    """Frozen copies of both networks, with batch norms as the settings want them, from which adapters are made.

    Raises:
        ValueError: one of them has no affine normalisation, or they tell different numbers of classes.
    """
    classes = class_count(edge_model), class_count(foundation_model)
    if None not in classes and classes[0] != classes[1]:
        raise ValueError(
            f"the edge model tells {classes[0]} classes and the foundation model {classes[1]}; distillation needs the same"
        )
    made = []
    for model, adapts in ((edge_model, True), (foundation_model, settings.cloud_lr > 0)):
        if adapts:
            named_affine_parameters(model)
        model = copy.deepcopy(model).requires_grad_(False)
        made.append(BatchRenorm.convert(model) if settings.bn == "renorm" else model)
    return made[0].eval(), made[1].eval()


def own_norms(model: nn.Module) -> nn.Module:
    """A copy that shares all parameters but the affine ones, so that a server holds many without many times the memory."""
    try:
        own = {id(parameter) for parameter in named_affine_parameters(model).values()}
    except ValueError:
        own = set()
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
