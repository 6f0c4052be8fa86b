"""The cloud's two steps on a batch of uploaded samples: the foundation model adapts itself, then teaches its copy of the edge network.

    1. f: norms in training mode, statistics moved once; SGD on mean_i exp(E_max(0) - H_i) H_i
    2. the batch and, once enough were uploaded, three times as many samples drawn from the buffer
    3. g_w: teacher's norms in evaluation mode, the edge network's in training mode; SGD on the distillation loss

Only scales and shifts of norms move. A step that goes wrong leaves everything as it was before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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
from headway.learning.cloud_edge.distillation import SelectiveEntropyDistillation, entropy_loss
from headway.learning.cloud_edge.renorm import BatchRenorm
from headway.learning.cloud_edge.settings import Settings, own_norms

log = logging.getLogger(__name__)


class Adapter:
    """One adapted pair of networks, with its optimisers, samples in waiting and replay buffer.

    Args:
        edge, foundation: from :func:`~headway.learning.cloud_edge.settings.prepare`; everything but what adapts is shared with them.
        e_max0: the initial threshold in nats, which weighs every loss here.
    """

    def __init__(self, edge: nn.Module, foundation: nn.Module, e_max0: float, settings: Settings) -> None:
        self.settings, self.e_max0 = settings, e_max0
        self.edge, self.foundation = own_norms(edge), own_norms(foundation)
        self.loss = SelectiveEntropyDistillation(settings.alpha, settings.beta, settings.gamma, settings.tau, e_max0)
        self.optimizers = {"edge": self._sgd(self.edge, settings.edge_lr)}
        if settings.cloud_lr:
            self.optimizers["foundation"] = self._sgd(self.foundation, settings.cloud_lr)
        self.waiting: list[Samples] = []
        self.buffer: list[Samples] = []
        self.steps = self.failures = 0
        self.last_error = ""
        self._draw = torch.Generator().manual_seed(settings.seed)
        self._source = self._tensors()
        self._forget_statistics()

    def _sgd(self, model: nn.Module, lr: float) -> torch.optim.SGD:
        parameters = list(named_affine_parameters(model).values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        return torch.optim.SGD(parameters, lr, self.settings.momentum)

    # --- what happens when samples come

    def receive(self, samples: Samples) -> Iterator[None]:
        """Takes uploaded samples and does the steps they make possible; yields after each that succeeded."""
        single = [{key: tensor[i] for key, tensor in samples.items()} for i in range(count(samples))]
        self.waiting += single
        if self.settings.replay:
            self.buffer += single
            del self.buffer[: -self.settings.replay]
        size, tried = self.settings.batch_size, False
        while len(self.waiting) >= size:
            fresh, self.waiting, tried = self.waiting[:size], self.waiting[size:], True
            if self._guarded(lambda fresh=fresh: self._step(fresh)):
                yield
        if self.settings.idle_replay and not tried and self._ready() and self._guarded(self._idle_step):
            yield

    def _ready(self) -> bool:
        return len(self.buffer) >= max(self.settings.replay_start, 3 * self.settings.batch_size)

    def _replayed(self, number: int) -> list[Samples]:
        return [self.buffer[i] for i in torch.randperm(len(self.buffer), generator=self._draw)[:number].tolist()]

    def _step(self, fresh: list[Samples]) -> None:
        if "foundation" in self.optimizers:
            self._adapt_foundation(stack(fresh))
        self._distil(stack(fresh + (self._replayed(3 * self.settings.batch_size) if self._ready() else [])))

    def _idle_step(self) -> None:
        self._distil(stack(self._replayed(4 * self.settings.batch_size)))

    def _adapt_foundation(self, samples: Samples) -> None:
        only_norms_train(self.foundation, self.settings.bn != "frozen")
        with torch.enable_grad():
            loss = entropy_loss(self._logits(self.foundation, samples), self.e_max0)
        self._descend("foundation", loss)
        self.foundation.eval()

    def _distil(self, samples: Samples) -> None:
        self.foundation.eval()
        with torch.no_grad():
            teacher = self._logits(self.foundation, samples)
        only_norms_train(self.edge, self.settings.bn != "frozen")
        with torch.enable_grad():
            loss = self.loss(self._logits(self.edge, samples), teacher)
        self._descend("edge", loss)
        self.edge.eval()

    def _descend(self, which: str, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of the {which} model is {loss.item()}; lower its rate or look at what is uploaded"
            )
        optimizer = self.optimizers[which]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def _logits(self, model: nn.Module, samples: Samples) -> Tensor:
        like = next(model.parameters())
        transform = self.settings.transform if model is self.edge else self.settings.foundation_transform
        moved = {key: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for key, t in samples.items()}
        if transform is not None:
            made = transform(moved.get("", moved))
            moved = {"": made} if isinstance(made, Tensor) else dict(made)
        with torch.autocast(like.device.type, self.settings.autocast, enabled=self.settings.autocast is not None):
            return logits_of(model, moved)

    def _guarded(self, step: Callable[[], None]) -> bool:
        """Does a step; one that fails, or leaves a network that is not finite, changes nothing and is counted."""
        before = self._tensors()
        try:
            step()
            if not all(torch.isfinite(tensor).all() for tensor in travelling(self.edge).values()):
                raise ValueError("the edge model's parameters are no longer finite; lower edge_lr")
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            self._restore(before)
            self.failures += 1
            self.last_error = f"{type(error).__name__}: {error}"
            log.warning("a step was taken back: %s", self.last_error)
            return False
        finally:
            self.edge.eval()
            self.foundation.eval()
        self.steps += 1
        return True

    # --- its state

    def _models(self) -> dict[str, nn.Module]:
        return {which: getattr(self, which) for which in self.optimizers}

    def _tensors(self) -> dict[str, Tensor]:
        """Copies of all that a step changes."""
        found = {}
        for which, model in self._models().items():
            found |= {f"{which}/{name}": tensor.clone() for name, tensor in travelling(model).items()}
            for name, parameter in named_affine_parameters(model).items():
                momentum = self.optimizers[which].state.get(parameter, {}).get("momentum_buffer")
                if momentum is not None:
                    found[f"{which} momentum/{name}"] = momentum.clone()
        return found

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        for which, model in self._models().items():
            install(model, _under(tensors, which))
            momenta, optimizer = _under(tensors, f"{which} momentum"), self.optimizers[which]
            optimizer.state.clear()
            for name, parameter in named_affine_parameters(model).items():
                if name in momenta:
                    optimizer.state[parameter] = {"momentum_buffer": momenta[name].to(parameter).clone()}
        if not self.steps:
            self._forget_statistics()

    def _forget_statistics(self) -> None:
        if self.settings.bn == "renorm" and self.settings.reset_stats:
            for module in [*self.edge.modules(), *self.foundation.modules()]:
                if isinstance(module, BatchRenorm):
                    module.reset_statistics()

    def roll_back(self) -> None:
        """Both networks as they were at the start, without momenta; what was uploaded stays."""
        self._restore(self._source)
        self._forget_statistics()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, as tensors and plain data."""
        tensors = {**self._tensors(), "generator": self._draw.get_state()}
        for name, samples in (("waiting", self.waiting), ("buffer", self.buffer)):
            if samples:
                tensors |= {f"{name}/{key}": tensor for key, tensor in stack(samples).items()}
        return tensors, {"e_max0": self.e_max0, "steps": self.steps, "failures": self.failures}

    def load_state(self, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.steps, self.failures = int(words["steps"]), int(words["failures"])
        self._restore(tensors)
        self._draw.set_state(tensors["generator"])
        for name in ("waiting", "buffer"):
            stacked = _under(tensors, name)
            length = count(stacked) if stacked else 0
            setattr(self, name, [{key: tensor[i] for key, tensor in stacked.items()} for i in range(length)])


def stack(samples: list[Samples]) -> Samples:
    """Single samples as a batch. Texts of different lengths (a mapping with an attention mask) are padded with zeros at the end.

    Raises:
        ValueError: other samples differ in shape, or in what they are made of.
    """
    keys = samples[0].keys()
    if any(sample.keys() != keys for sample in samples):
        raise ValueError("samples of one deployment must be made of the same tensors")
    found: Samples = {}
    for key in keys:
        tensors = [sample[key] for sample in samples]
        if "attention_mask" in keys and len({t.shape for t in tensors}) > 1 and {t.dim() for t in tensors} == {1}:
            longest = max(len(t) for t in tensors)
            tensors = [F.pad(t, (0, longest - len(t))) for t in tensors]
        if len({(t.shape, t.dtype) for t in tensors}) > 1:
            raise ValueError(f"samples of one deployment must have one shape and type; {key or 'they'} differ")
        found[key] = torch.stack(tensors)
    return found


def _under(tensors: Mapping[str, Tensor], folder: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.partition("/")[0] == folder}
