"""Takes channels whose gain is zero out of a network for good: what they add is a constant, and the next layer takes it over.

    conv -> norm -> f -> next layer:    channel c gives k_c = f(beta_c) everywhere
    next linear map, or convolution without padding:    bias += sum_c W[:, c] k_c
    next convolution with padding:      at the borders k_c meets zeros, so one channel stays to carry  sum_c W[:, c] k_c / k

where gamma_c is zero or, below a threshold, is taken for zero. The network computes the same for exact zeros, borders included. Norms
that feed a residual addition, are shared, or are read by anything else stay whole. For networks trained by
:class:`headway.learning.BatchNormOnly` or with a penalty on gains; "Training BatchNorm and Only BatchNorm" (2020, arXiv 2003.00152).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.learning.batchnorm_only.choose import graph_of
from headway.learning.batchnorm_only.layers import CONVOLUTIONS, _Kin
from headway.surgery import Edit, Plan, Site, Swap, Technique, apply
from headway.weights.invariance import ACTIVATIONS

_PASS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_CALLS: dict[str, Any] = {"relu": torch.relu, "relu_": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu,
                          "tanh": torch.tanh, "sigmoid": torch.sigmoid}  # fmt: skip


@dataclass(frozen=True)
class _Chain:
    """A convolution, its norm, what acts on every entry after it, and the layer that reads the result."""

    conv: str
    norm: str
    acts: tuple[Any, ...]
    reader: str
    pooled: bool


def _chains(model: nn.Module) -> Iterator[_Chain]:
    graph = graph_of(model)
    if graph is None:
        raise ValueError(
            "torch.fx cannot trace this model, so what reads its norms is not known; prune a traceable model"
        )
    modules = dict(model.named_modules())
    calls: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[id(modules[node.target])] = calls.get(id(modules[node.target]), 0) + 1

    def module_of(node: fx.Node | None) -> Any:
        if node is None or node.op != "call_module":
            return None
        module = modules[str(node.target)]
        # an activation without parameters may serve several places
        return module if calls[id(module)] == 1 or not any(True for _ in module.parameters()) else None

    for node in graph.nodes:
        norm = module_of(node)
        if not isinstance(norm, _BatchNorm) or norm.weight is None or norm.bias is None:
            continue
        before: Any = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        conv = module_of(before)
        if not isinstance(conv, CONVOLUTIONS) or conv.groups != 1 or len(before.users) != 1:
            continue
        chain = _follow(node, str(before.target), module_of)
        if chain is not None:
            yield chain


def _follow(start: fx.Node, conv: str, module_of: Any) -> _Chain | None:
    acts: list[Any] = []
    pooled, node = False, start
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = module_of(node)
        word = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if isinstance(module, ACTIVATIONS) and not isinstance(module, nn.PReLU):
            acts.append(module)
        elif isinstance(module, _PASS):
            continue
        elif (isinstance(module, _POOLS) and set(_tuple(module.output_size)) == {1}) or _is_spatial_mean(node):
            pooled = True
        elif pooled and (isinstance(module, nn.Flatten) or word == "flatten"):
            continue
        elif isinstance(module, nn.Linear) and pooled:
            return _Chain(conv, str(start.target), tuple(acts), str(node.target), True)
        elif isinstance(module, CONVOLUTIONS) and module.groups == 1 and module.padding_mode == "zeros":
            return _Chain(conv, str(start.target), tuple(acts), str(node.target), pooled)
        elif node.op in ("call_function", "call_method") and word in _CALLS and len(node.all_input_nodes) == 1:
            acts.append(_CALLS[word])
        else:
            return None
    return None


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _is_spatial_mean(node: fx.Node) -> bool:
    """``x.mean((2, 3))``: the mean over all positions of images, without keeping their axes."""
    word = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    axes = node.args[1] if len(node.args) == 2 else None
    return word == "mean" and not node.kwargs and isinstance(axes, tuple | list) and set(axes) in ({2, 3}, {-1, -2})


class _Cut:
    """What stays of one layer: its output channels, its input channels, and its tensors with constants taken over."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.weight: Tensor = self.module.weight.detach().clone()
        self.bias = None if self.module.bias is None else self.module.bias.detach().clone()
        self.outputs: Tensor | None = None
        self.inputs: Tensor | None = None

    def made(self) -> nn.Module:
        """A shallow copy of the module with the smaller tensors."""
        old = self.module
        kind: Any = type(old)
        new = kind.__new__(kind)
        new.__dict__.update(old.__dict__)
        new.__dict__["_parameters"], new.__dict__["_buffers"] = dict(old._parameters), dict(old._buffers)
        weight, bias = self.weight, self.bias
        if self.inputs is not None:
            weight = weight[:, self.inputs]
        if self.outputs is not None:
            weight = weight[self.outputs]
            bias = None if bias is None else bias[self.outputs]
            for key, buffer in old._buffers.items():
                if buffer is not None and buffer.dim() == 1:
                    new._buffers[key] = buffer[self.outputs]
        new._parameters["weight"] = nn.Parameter(weight.contiguous(), old.weight.requires_grad)
        wants = old.weight.requires_grad if old.bias is None else old.bias.requires_grad
        new._parameters["bias"] = None if bias is None else nn.Parameter(bias.contiguous(), wants)
        if isinstance(old, _BatchNorm):
            new.num_features = len(weight)
        elif isinstance(old, nn.Linear):
            new.out_features, new.in_features = weight.shape
        else:
            new.out_channels, new.in_channels = weight.shape[:2]
        return new


class _Smaller(Swap):
    """Puts a layer with fewer channels in the place of another, and says in the plan how many are left."""

    def __init__(self, model: nn.Module, name: str, cut: _Cut) -> None:
        super().__init__(model, name, cut.module, cut.made(), untie=True)
        self.cut = cut

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        return {}

    def describe(self) -> tuple[str, str]:
        return _size(self.old), _size(self.new)


def _size(module: Any) -> str:
    if isinstance(module, _BatchNorm):
        return f"{module.num_features} channels"
    rows, columns = module.weight.shape[:2]
    return f"{columns} -> {rows} channels" + ("" if module.bias is None else " and a bias")


@dataclass(frozen=True)
class PruneDisabled(Technique):
    """Removes the channels of convolutions whose norm has a gain below a threshold, where the layer behind can take them over.

    Args:
        threshold: on |gamma|; at 0 only gains of exactly zero go, and the network computes what it did before.

    One channel of a layer always stays. The same outputs are those of evaluation mode.

    Raises:
        NothingToChange: no channel can go.
        ValueError: the model cannot be traced, or the threshold is negative.
    """

    threshold: float = 1e-2

    looks_for: ClassVar[str] = "convolutions whose batch norm has gains below the threshold and one linear reader"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold is a size of gains, 0 or above; it is {self.threshold}")

    @torch.no_grad()
    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        allowed = {site.name for site in sites}
        modules = dict(model.named_modules())
        owners = _owners(model)
        cuts: dict[str, _Cut] = {}
        for chain in _chains(model):
            names = (chain.conv, chain.norm, chain.reader)
            tied = any(owners[id(p)] > 1 for name in names for p in modules[name].parameters())
            if not set(names) <= allowed or tied or any(not _whole(modules[name]) for name in names):
                continue
            self._cut(chain, modules, cuts)
        return [_Smaller(model, name, cut) for name, cut in cuts.items()]

    def _cut(self, chain: _Chain, modules: dict[str, nn.Module], cuts: dict[str, _Cut]) -> None:
        norm: Any = modules[chain.norm]
        off = norm.weight.abs() <= self.threshold if self.threshold == 0 else norm.weight.abs() < self.threshold
        if not off.any():
            return
        value = norm.bias.detach().clone()
        for act in chain.acts:
            value = act(value)
        reader = cuts.get(chain.reader) or _Cut(modules[chain.reader])
        shape = (1, -1, *(1,) * (reader.weight.dim() - 2))
        taken = reader.weight * value.view(shape)  # what each channel adds, place by place of the kernel
        keep = ~off
        if _padded(modules[chain.reader]) and not chain.pooled:
            carried = off & (value != 0)
            if carried.any():
                carrier = int((value.abs() * carried).argmax())
                reader.weight[:, carrier] = taken[:, carried].sum(1) / value[carrier]
                keep[carrier] = True
        else:
            added = taken[:, off].flatten(1).sum(1)
            reader.bias = added if reader.bias is None else reader.bias + added
            if not keep.any():  # something has to stay; it adds nothing twice
                keep[0] = True
                reader.weight[:, 0] = 0
        if not keep.any():
            keep[0] = True
        if keep.all():
            return
        kept = keep.nonzero()[:, 0]
        for name in (chain.conv, chain.norm):
            cuts.setdefault(name, _Cut(modules[name])).outputs = kept
        stays = cuts[chain.norm]
        stays.weight = torch.where(off, 0, stays.weight)
        reader.inputs = kept
        cuts[chain.reader] = reader


def _padded(module: Any) -> bool:
    return isinstance(module, CONVOLUTIONS) and any(module._reversed_padding_repeated_twice)


def _whole(module: nn.Module) -> bool:
    """One of torch's own layers or a relative that shares its state, whose tensors may be cut."""
    kind: Any = type(module)
    kind = kind.original if issubclass(kind, _Kin) else kind
    return kind in (*CONVOLUTIONS, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm) and (
        module._parameters.get("weight") is not None
    )


def _owners(model: nn.Module) -> dict[int, int]:
    found: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                found[id(p)] = found.get(id(p), 0) + 1
    return found


def prune_disabled(model: nn.Module, threshold: float = 1e-2) -> Plan:
    """:class:`PruneDisabled` applied in place; what was removed where. ``hw.undo`` gives the channels back."""
    from headway.surgery import history

    apply(model, PruneDisabled(threshold))
    return history(model)[-1]
