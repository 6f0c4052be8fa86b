"""From batch norm to micro-batches in one call, and a look at the channels that have died.

    model = hw.apply(model, hw.MicroBatch(), optimizer=optimizer)

Every ``nn.BatchNorm2d`` becomes a norm that works with one image a step (:mod:`headway.norms.batch_channel`), and the convolutions
in front of norms use standardised weights (:mod:`headway.weights.standardising`). Parameters, and the running statistics with them,
go on in the first stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from headway.norms.batch_channel import Affine, BatchChannelNorm2d, EstBatchNorm2d, fitting_groups
from headway.surgery import Edit, Site, Technique, apply
from headway.weights.invariance import is_norm
from headway.weights.standardising import StandardiseWeights

Norm = Literal["bcn", "gn", "estbn"]


@dataclass(frozen=True)
class MicroBatch(Technique):
    """Replaces every ``nn.BatchNorm2d`` and standardises the convolutions in front of norms.

    Attributes:
        norm: "bcn" (batch-channel), "gn" (group norm alone) or "estbn" (the estimated batch norm alone).
        ws: standardise the weights too.
        num_groups: groups of channels; a layer of few channels gets fewer. Give less than half the channels of the narrowest layer:
            groups of one channel each are instance norm, behind which the first stage has no effect, and bring a warning.
        estimate: False takes the batch's own statistics in "bcn", for large batches.
        moving_speed: of the estimates.
        channel_affine: gain and offset of the second stage, one a "group" or one a "channel".
        strict: raise where ``num_groups`` does not divide a layer's channels, rather than taking the nearest that does.
        sync: estimates from all processes.

    Raises:
        ValueError: a norm that does not exist, or groups that do not fit with ``strict``.
    """

    norm: Norm = "bcn"
    ws: bool = True
    num_groups: int = 32
    estimate: bool = True
    moving_speed: float = 0.1
    channel_affine: Affine = "group"
    strict: bool = False
    sync: bool = False

    looks_for: ClassVar[str] = "nn.BatchNorm2d"

    def __post_init__(self) -> None:
        if self.norm not in ("bcn", "gn", "estbn"):
            raise ValueError(f'norm is "bcn", "gn" or "estbn"; it is {self.norm!r}')

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        found: list[Edit] = super().edits(model, sites)
        self._warn_of_single_channels(sites)
        if self.ws and found:
            found += StandardiseWeights().edits(model, sites)
        return found

    def _warn_of_single_channels(self, sites: Sequence[Site]) -> None:
        widths = {site.name: site.module.num_features for site in sites if type(site.module) is nn.BatchNorm2d}
        alone = [name for name, width in widths.items() if fitting_groups(width, self.num_groups, False) == width > 1]
        if alone and self.norm != "estbn":
            warnings.warn(
                f"{len(alone)} norms get groups of one channel each ({', '.join(alone[:3])}), which is instance norm, where nothing of "
                f"the batch statistic is left: num_groups is {self.num_groups} and the narrowest has {min(widths.values())} channels; "
                "give num_groups so that several channels share a group",
                stacklevel=4,
            )

    def change(self, site: Site) -> nn.Module | None:
        old = site.module
        if type(old) is not nn.BatchNorm2d:
            return None
        channels = old.num_features
        if self.norm == "gn":
            new: Any = nn.GroupNorm(fitting_groups(channels, self.num_groups, self.strict), channels, old.eps)
            new.weight, new.bias = _parameters(old, new)
            return new
        if self.norm == "estbn":
            new = EstBatchNorm2d(channels, self.moving_speed, old.eps, sync=self.sync)
            first = new
        else:
            new = BatchChannelNorm2d(
                channels, self.num_groups, self.estimate, self.moving_speed, old.eps, self.channel_affine, self.strict, self.sync
            )  # fmt: skip
            first = new.batch
            if not self.estimate:
                first.momentum = old.momentum
        first.weight, first.bias = _parameters(old, first)
        for name, statistic in old.named_buffers():
            getattr(first, name).copy_(statistic)
        return new


def _parameters(old: nn.BatchNorm2d, new: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return (new.weight, new.bias) if old.weight is None else (old.weight, old.bias)


def convert_microbatch(
    model: nn.Module, norm: Norm = "bcn", ws: bool = True, num_groups: int = 32, **settings: Any
) -> nn.Module:
    """:class:`MicroBatch` applied in place: the model without batch norms, ready to train with one image a step."""
    return apply(model, MicroBatch(norm=norm, ws=ws, num_groups=num_groups, **settings))


@dataclass(frozen=True)
class DeadChannels:
    """Channels that are silent behind their ReLU.

    Attributes:
        share: of all channels, those that are active on less than the threshold of the positions.
        layers: that share, norm by norm.
        ratios: mean over standard deviation of every channel before the ReLU, norm by norm. Batch norm keeps it at bias / weight;
            the further below zero, the nearer the channel is to elimination.
    """

    share: float
    layers: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def dead_channel_report(model: nn.Module, loader: Iterable[Any], threshold: float = 1e-3) -> DeadChannels:
    """Counts channels whose norm's output is above zero on less than ``threshold`` of the positions, in evaluation mode.

    Args:
        loader: batches: inputs, (inputs, labels, ...), or mappings of arguments.

    Raises:
        ValueError: no norm gave an output with channels, or there was no batch.
    """
    sums: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            y = out.detach().double().transpose(0, 1).flatten(1)
            now = torch.stack(
                [y.sum(1), y.square().sum(1), (y > 0).sum(1).double(), torch.full_like(y[:, 0], y.shape[1])]
            )
            sums[name] = sums[name] + now if name in sums else now

        return hook

    whole = (BatchChannelNorm2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    inner = {id(m.batch) for m in model.modules() if isinstance(m, BatchChannelNorm2d)}
    watched = [(n, m) for n, m in model.named_modules() if (isinstance(m, whole) or is_norm(m)) and id(m) not in inner]
    modes = [(m, m.training) for m in model.modules()]
    handles = [module.register_forward_hook(look(name)) for name, module in watched]
    try:
        model.eval()
        for batch in loader:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, tuple | list) else batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not sums:
        raise ValueError("no norm of the model gave an output: there was no batch, or the model holds no norm")
    ratios, dead = {}, {}
    for name, (total, squares, active, count) in sums.items():
        mean = total / count
        ratios[name] = mean / (squares / count - mean.square()).clamp(min=1e-24).sqrt()
        dead[name] = active / count < threshold
    return DeadChannels(
        float(torch.cat(list(dead.values())).double().mean()),
        {n: float(d.double().mean()) for n, d in dead.items()},
        ratios,
    )
