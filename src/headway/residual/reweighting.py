"""Weight surgery as edits: changes to single tensors are collected, done in float64 one after the other, and cast once.

A norm's gain g and bias beta go into what reads it, W' = W diag(g), b' = b + W beta; a writer is recentred, W' = P W; of a stream
without its last channel, writers lose their last output and readers read it as minus the sum of the others,
W' = W[:, :d-1] - W[:, d-1:].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headway.residual.recentring import recentred
from headway.residual.stream import Place, Reader, is_conv1d
from headway.surgery import Edit, SetAttribute, SetParameter, Swap

Change = Callable[[Tensor], Tensor]


class Reweighting:
    """Changes to the tensors of a model, each known by its module and attribute, in the order they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._changes: dict[tuple[int, str], dict[tuple, tuple[str, Change]]] = {}
        self._names: dict[int, tuple[str, nn.Module]] = {}

    def change(self, owner: str, attribute: str, label: str, change: Change, key: object = None) -> None:
        """Adds a change. What carries the same label and key, of a module known under several names as well, is done once."""
        module = self.model.get_submodule(owner)
        self._names.setdefault(id(module), (owner, module))
        self._changes.setdefault((id(module), attribute), {}).setdefault((label, key), (label, change))

    def labels(self, owner: str) -> list[str]:
        """What is done to the tensors of a module."""
        module = self.model.get_submodule(owner)
        found = [known for (key, _), listed in self._changes.items() if key == id(module) for known in listed]
        return list(dict.fromkeys(label for label, _ in found))

    def changed(self, owner: str, attribute: str) -> nn.Parameter | Tensor | None:
        """The tensor after all its changes; one that is not there and gets an addition starts at zero."""
        module = self.model.get_submodule(owner)
        before = module._parameters.get(attribute, module._buffers.get(attribute))
        listed = self._changes.get((id(module), attribute), {}).values()
        if not listed:
            return before
        wide = before.detach().double() if before is not None else torch.zeros((), dtype=torch.float64)
        for _, change in listed:
            wide = change(wide)
        like: Any = before if before is not None else next(module.parameters(recurse=False))
        new = wide.to(like.device, like.dtype).contiguous()
        return nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new

    def fold(self, norm: Any, name: str, reader: Reader) -> None:
        """Moves the gain and bias of a norm into a layer that reads it."""
        owner: Any = self.model.get_submodule(reader.owner)
        label, gain, shift = f"with the gain of {name}", norm.weight, norm.bias
        rows = slice(*reader.rows) if reader.rows else slice(None)

        def scale(weight: Tensor) -> Tensor:
            scaled = weight.clone()
            if reader.axis:
                scaled[rows] *= gain.detach().double()
            else:
                scaled[:, rows] *= gain.detach().double()[:, None]
            return scaled

        if shift is not None:
            raw = getattr(owner, reader.weight).detach()

            def add(bias: Tensor) -> Tensor:
                wide = raw.double() if reader.axis else raw.double().t()
                added = wide.new_zeros(wide.shape[0]) + bias
                added[rows] += wide[rows] @ shift.detach().double()
                return added

            self.change(reader.owner, reader.bias, label, add, reader.rows)
        if gain is not None:
            self.change(reader.owner, reader.weight, label, scale, reader.rows)

    def recentre(self, place: Place) -> None:
        """Recentres a writer, after the gain on its output has gone into it."""
        if place.gate is not None:
            gate: Any = getattr(self.model.get_submodule(place.gate[0]), place.gate[1])

            def scale(tensor: Tensor) -> Tensor:
                flat = gate.detach().double().reshape(-1)
                axis = place.axis % tensor.dim()
                return tensor * flat.reshape([-1 if i == axis else 1 for i in range(tensor.dim())])

            self.change(place.owner, place.attribute, f"with the gain of {'.'.join(place.gate)}", scale)
            self.change(*place.gate, "moved into what it scales", torch.ones_like)
        self.change(place.owner, place.attribute, "recentred", lambda tensor: recentred(tensor, place.axis))

    def cut(self, place: Place) -> None:
        """Leaves out a writer's last output."""
        if place.gate is not None:
            self.change(*place.gate, "without its last channel", lambda tensor: tensor[..., :-1])
        self.change(
            place.owner,
            place.attribute,
            "without its last channel",
            lambda tensor: tensor.narrow(place.axis, 0, tensor.shape[place.axis] - 1),
        )

    def read_cut(self, reader: Reader) -> None:
        """Lets a reader take the channel left out as minus the sum of the others."""

        def narrow(weight: Tensor) -> Tensor:
            kept = weight.narrow(reader.axis, 0, weight.shape[reader.axis] - 1)
            return kept - weight.narrow(reader.axis, weight.shape[reader.axis] - 1, 1)

        self.change(reader.owner, reader.weight, "reading one channel less", narrow)

    def edits(self, without: Sequence[nn.Module] = ()) -> list[Edit]:
        """Everything asked for, as edits; ``without`` are modules that another edit takes care of."""
        left_out = {id(module) for module in without}
        tables: dict[int, list[tuple[str, int, str]]] = {}
        for name, module in self.model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    tables.setdefault(id(parameter), []).append((f"{name}.{key}".lstrip("."), id(module), key))
        fresh: dict[tuple, Any] = {}
        found: list[Edit] = []
        for key, (name, module) in self._names.items():
            attributes = [attribute for owner, attribute in self._changes if owner == key]
            if key in left_out:
                continue
            new: dict[str, Any] = {}
            others: list[str] = []
            for attribute in attributes:
                old = module._parameters.get(attribute)
                labels = tuple(self._changes[key, attribute])
                shared = (id(old) if old is not None else (key, attribute), labels)
                if shared not in fresh:
                    fresh[shared] = self.changed(name, attribute)
                new[attribute] = fresh[shared]
                for other, owner, slot in tables.get(id(old), []):
                    if tuple(self._changes.get((owner, slot), ())) != labels:
                        others.append(other)
            found += self._put(name, module, new, list(dict.fromkeys(others)))
        untied = any(isinstance(edit, _Reweighted) and edit.others for edit in found)
        return found + (forget_ties(self.model) if untied else [])

    def _put(self, name: str, module: nn.Module, new: dict[str, Any], others: list[str]) -> list[Edit]:
        labels = ", ".join(self.labels(name))
        if any(True for _ in module.children()) or not name:
            found: list[Edit] = []
            for attribute, tensor in new.items():
                where = f"{name}.{attribute}".lstrip(".")
                if isinstance(tensor, nn.Parameter):
                    found.append(_NewParameter(module, attribute, tensor, where, labels, bool(others)))
                else:
                    found.append(_NewBuffer(module, attribute, tensor, where, labels))
            return found
        changed = twin(module)
        changed._parameters.update({key: value for key, value in new.items() if isinstance(value, nn.Parameter)})
        changed._buffers.update({key: value for key, value in new.items() if not isinstance(value, nn.Parameter)})
        resize(changed)
        return [_Reweighted(self.model, name, module, changed, labels, others)]


def twin(module: nn.Module) -> Any:
    """Another module of the same class that holds the very same children, parameters and buffers in tables of its own."""
    new = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)
    for table in ("_modules", "_parameters", "_buffers"):
        new.__dict__[table] = dict(module.__dict__[table])
    return new


def resize(module: Any) -> None:
    """Makes the sizes that a layer notes beside its weight agree with the weight."""
    if not isinstance(getattr(module, "weight", None), Tensor):
        return
    shape = module.weight.shape
    if is_conv1d(module):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.out_channels = shape[0]


class _Reweighted(Swap):
    """Swaps a layer for its twin with changed weights, and says so in the plan."""

    def __init__(
        self, model: nn.Module, name: str, old: nn.Module, new: nn.Module, labels: str, others: list[str]
    ) -> None:
        # who else holds a parameter is looked after here, tie by tie
        super().__init__(model, name, old, new, untie=True)
        self.labels, self.others = labels, others

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        return {} if self.others else super().moved()

    def describe(self) -> tuple[str, str]:
        before, after = super().describe()
        if not self.others:
            return before, f"{after} {self.labels}"
        owners = ", ".join(dict.fromkeys(other.rpartition(".")[0] for other in self.others))
        return f"{before} tied to {owners}", f"{after} {self.labels}, untied from {owners}"


class _NewParameter(SetParameter):
    """Puts a changed tensor behind a parameter's name, and says so in the plan."""

    def __init__(
        self, owner: nn.Module, attribute: str, new: nn.Parameter, name: str, labels: str, untied: bool
    ) -> None:
        super().__init__(owner, attribute, new, name)
        self._labels, self._untied = labels, untied

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        return {} if self._untied else super().moved()

    def describe(self) -> tuple[str, str]:
        before, after = super().describe()
        return before, f"{after} {self._labels}"


class _NewBuffer(Edit):
    """Puts a changed tensor behind a buffer's name."""

    def __init__(self, owner: nn.Module, attribute: str, new: Tensor, name: str, labels: str) -> None:
        self.owner, self.attribute, self.new, self.name, self._labels = owner, attribute, new, name, labels
        self.old = owner._buffers[attribute]

    def do(self) -> None:
        self.owner._buffers[self.attribute] = self.new

    def undo(self) -> None:
        self.owner._buffers[self.attribute] = self.old

    def describe(self) -> tuple[str, str]:
        return f"buffer {tuple(self.old.shape)}", f"buffer {tuple(self.new.shape)} {self._labels}"  # type: ignore[union-attr]


def forget_ties(model: nn.Module) -> list[Edit]:
    """Keeps Hugging Face models from tying head and table again when they are saved, loaded or resized."""
    found: list[Edit] = []
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        found.append(SetAttribute(config, "tie_word_embeddings", False, name="config.tie_word_embeddings"))
    if getattr(model, "all_tied_weights_keys", None):
        found.append(SetAttribute(model, "all_tied_weights_keys", {}, name="all_tied_weights_keys"))
    return found
