"""The cloud's two steps on a batch: the foundation model adapts itself, then teaches its copy of the edge network.

    1. f: norms in training mode, statistics moved once; SGD on mean_i exp(E_max(0) - H_i) H_i over the fresh samples
    2. g_w: teacher's norms in evaluation mode, the edge network's in training mode; SGD on the distillation loss over the fresh
       samples and the replayed ones

Only scales and shifts of norms move. Several processes that each hold a part of the batch do the same step together: a few kilobytes
of gradients are added up, each part weighing as much as it has samples, and norms take their statistics from all parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.learning.cloud_edge.affine import (
    Samples,
    count,
    install,
    logits_of,
    named_affine_parameters,
    only_norms_train,
    travelling,
)
from headway.learning.cloud_edge.distillation import TEACHER_NOT_FINITE, SelectiveEntropyDistillation, entropy_loss
from headway.learning.cloud_edge.renorm import BatchRenorm
from headway.learning.cloud_edge.settings import Settings, own_norms


class NotFinite(ValueError):
    """A loss, or what the teacher says, is not finite. All processes of a group raise it at the same point, or none does."""


class Steps:
    """A pair of networks, their optimisers, and the step by which a batch moves them.

    Args:
        edge, foundation: from :func:`~headway.learning.cloud_edge.settings.prepare`; everything but what adapts is shared with them.
        e_max0: the initial threshold in nats, which weighs every loss here.
        together: this is one of the processes of torch's default group, and every batch a part of theirs.
    """

    def __init__(
        self, edge: nn.Module, foundation: nn.Module, e_max0: float, settings: Settings, together: bool = False
    ) -> None:
        self.settings, self.e_max0, self._together = settings, e_max0, together
        self.edge, self.foundation = own_norms(edge), own_norms(foundation)
        self.loss = SelectiveEntropyDistillation(settings.alpha, settings.beta, settings.gamma, settings.tau, e_max0)
        self.optimizers = {"edge": self._sgd(self.edge, settings.edge_lr)}
        if settings.cloud_lr:
            self.optimizers["foundation"] = self._sgd(self.foundation, settings.cloud_lr)
        self._forget_statistics()

    def _sgd(self, model: nn.Module, lr: float) -> torch.optim.SGD:
        parameters = list(named_affine_parameters(model).values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        return torch.optim.SGD(parameters, lr, self.settings.momentum)

    # --- the step

    def step(self, fresh: Samples | None, union: Samples) -> None:
        """Adapts the foundation model to ``fresh``, if that is given, and teaches the edge network on ``union``."""
        if fresh is not None and "foundation" in self.optimizers:
            self._adapt_foundation(fresh)
        self._distil(union)

    def _adapt_foundation(self, samples: Samples) -> None:
        only_norms_train(self.foundation, self.settings.bn != "frozen")
        with torch.enable_grad():
            loss = entropy_loss(self._logits("foundation", samples), self.e_max0)
        self._descend("foundation", loss, count(samples))
        self.foundation.eval()

    def _distil(self, samples: Samples) -> None:
        self.foundation.eval()
        with torch.no_grad():
            teacher = self._logits("foundation", samples)
        if self._sum(torch.isfinite(teacher).logical_not().sum().double()):
            raise NotFinite(TEACHER_NOT_FINITE)
        only_norms_train(self.edge, self.settings.bn != "frozen")
        with torch.enable_grad():
            loss = self.loss(self._logits("edge", samples), teacher)
        self._descend("edge", loss, count(samples))
        self.edge.eval()

    def _descend(self, which: str, loss: Tensor, samples: int) -> None:
        sums = self._sum(torch.stack([loss.detach().double() * samples, loss.new_tensor(samples).double()]))
        whole, total = sums.tolist()
        if not math.isfinite(whole):
            raise NotFinite(
                f"the loss of the {which} model is {whole / total}; lower its rate or look at what is uploaded"
            )
        optimizer = self.optimizers[which]
        optimizer.zero_grad(set_to_none=True)
        if self._together:
            (loss * (samples / total)).backward()  # a sample counts the same wherever it is
            self._add_up([parameter for group in optimizer.param_groups for parameter in group["params"]])
        else:
            loss.backward()
        optimizer.step()

    def _add_up(self, parameters: list[nn.Parameter]) -> None:
        """Gives every process the sum of their gradients, in one message; what no process has a gradient of stays without."""
        reached = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = self._sum(torch.cat([reached.double(), *[g.flatten().double() for g in gradients]]))
        parts = whole[len(parameters) :].split([p.numel() for p in parameters])
        for p, part, one in zip(parameters, parts, whole[: len(parameters)].tolist(), strict=True):
            p.grad = part.view_as(p).to(p.dtype) if one else None

    def _sum(self, value: Tensor) -> Tensor:
        """Added up over all processes."""
        if self._together:
            dist.all_reduce(value)
        return value

    def _logits(self, which: str, samples: Samples) -> Tensor:
        model: nn.Module = getattr(self, which)
        like = next(model.parameters())
        transform = self.settings.transform if which == "edge" else self.settings.foundation_transform
        moved = {key: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for key, t in samples.items()}
        if transform is not None:
            made = transform(moved.get("", moved))
            moved = {"": made} if isinstance(made, Tensor) else dict(made)
        with torch.autocast(like.device.type, self.settings.autocast, enabled=self.settings.autocast is not None):
            return logits_of(model, moved)

    # --- what a step changes

    def _models(self) -> dict[str, nn.Module]:
        return {which: getattr(self, which) for which in self.optimizers}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all that a step changes."""
        found = {}
        for which, model in self._models().items():
            found |= {f"{which}/{name}": tensor.clone() for name, tensor in travelling(model).items()}
            for name, parameter in named_affine_parameters(model).items():
                momentum = self.optimizers[which].state.get(parameter, {}).get("momentum_buffer")
                if momentum is not None:
                    found[f"{which} momentum/{name}"] = momentum.clone()
        return found

    def restore(self, tensors: Mapping[str, Tensor], unseen: bool = False) -> None:
        """The inverse of :meth:`tensors`. ``unseen``: statistics that the first batch was to define are still to be defined."""
        for which, model in self._models().items():
            install(model, under(tensors, which))
            momenta, optimizer = under(tensors, f"{which} momentum"), self.optimizers[which]
            optimizer.state.clear()
            for name, parameter in named_affine_parameters(model).items():
                if name in momenta:
                    optimizer.state[parameter] = {"momentum_buffer": momenta[name].to(parameter).clone()}
        if unseen:
            self._forget_statistics()

    @property
    def unseen(self) -> bool:
        """Whether a norm still waits for the batch that defines its statistics."""
        return any(isinstance(m, BatchRenorm) and m.undefined for m in self.edge.modules())

    def _forget_statistics(self) -> None:
        if self.settings.bn == "renorm" and self.settings.reset_stats:
            for module in [*self.edge.modules(), *self.foundation.modules()]:
                if isinstance(module, BatchRenorm):
                    module.reset_statistics()


def under(tensors: Mapping[str, Tensor], folder: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``folder/``, without that."""
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.partition("/")[0] == folder}
