"""Finds the long skips of a network: which decoder block takes which encoder's feature, counted from the outermost.

Networks that say so are asked: headway's own :class:`~headway.residual.long_skip.LongSkips`; diffusers' UNets, whose up blocks take a
tuple of residuals, every entry a long skip; decoder blocks with an argument ``skip`` or ``skip_connection`` (U-ViT, HunyuanDiT,
segmentation-models). Any other network is traced with torch.fx (:mod:`headway.residual.long_skip_graph`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headway.residual.equivalence import output_of, unpacked
from headway.residual.long_skip import LongSkips

TUPLE, ARGUMENTS = "res_hidden_states_tuple", ("skip", "skip_connection")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Host:
    """A module that combines long skips with the decoder's feature.

    Attributes:
        name, module: where it stands.
        at: the number i of every skip it takes, in the order it takes them; None for an entry it never reads.
        argument: the argument of its forward that carries them; empty where its own forward concatenates or adds.
        operands: then, for each of ``at``: (which concatenation or sum of its forward, which operand).
    """

    name: str
    module: nn.Module
    at: tuple[int | None, ...]
    argument: str = ""
    operands: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Network:
    """All long skips of one network.

    Attributes:
        name, module: the module that owns encoder and decoder.
        hosts: decoder blocks; empty for a ``LongSkips`` layer, which is ``module`` itself.
        encoders: the name of what each skip comes from, outermost first ("" where it is not known).
        features: tokens or channels of each skip, outermost first, where they are known.
        axis: "token" or "channel".
    """

    name: str
    module: nn.Module
    hosts: tuple[Host, ...]
    encoders: tuple[str, ...]
    features: tuple[int, ...] | None
    axis: str

    @property
    def n(self) -> int:
        return len(self.encoders)


def find_networks(model: nn.Module, min_span: int | None = None, example_inputs: Any = None) -> list[Network]:
    """Every network with long skips inside ``model``; see :class:`headway.residual.scale_long.ScaleLong` for the arguments."""
    from headway.residual.long_skip_graph import traced_networks

    return stated_networks(model, example_inputs) or traced_networks(model, min_span, example_inputs)


def stated_networks(model: nn.Module, example_inputs: Any = None) -> list[Network]:
    """Those that say themselves which their long skips are, so that none of their code has to run."""
    own = [
        Network(name, m, (), ("",) * m.n, None if m.features is None else tuple(m.features), m.axis)
        for name, m in model.named_modules()
        if isinstance(m, LongSkips)
    ]
    return own or _up_blocks(model, example_inputs) or _by_argument(model, example_inputs)


def prefix(name: str) -> str:
    return f"{name}." if name else ""


def _parameter(module: nn.Module, name: str) -> inspect.Parameter | None:
    return _parameters(type(module)).get(name)


@cache
def _parameters(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


def _up_blocks(model: nn.Module, inputs: Any) -> list[Network]:
    """diffusers: the tuple of residuals runs from the outermost to the innermost, and every block is given the end of it."""
    found = []
    for name, owner in model.named_modules():
        blocks: Any = getattr(owner, "up_blocks", None)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not all(_parameter(b, TUPLE) for b in blocks):
            continue
        sizes = [1 if "1D" in type(block).__name__ else len(block.resnets) for block in blocks]  # type: ignore[arg-type]
        end = sum(sizes)
        sources, features = _sources(owner), _channels(owner, blocks)
        sources = sources if len(sources) == end else [""] * end
        hosts, kept = [], []
        for j, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
            # K blocks are given as many residuals as they have layers and read the last alone
            read = [k == size - 1 or not type(block).__name__.startswith("K") for k in range(size)]
            kept = [end - size + k for k in range(size) if read[k]] + kept
            hosts.append(
                (f"{prefix(name)}up_blocks.{j}", block, [end - size + k if read[k] else None for k in range(size)])
            )
            end -= size
        number = {place: i for i, place in enumerate(kept, 1)}
        network = Network(
            name,
            owner,
            tuple(Host(n, b, tuple(number.get(p) for p in places), TUPLE) for n, b, places in hosts),  # type: ignore[arg-type]
            tuple(prefix(name) + sources[p] if sources[p] else "" for p in kept),
            features if features and len(features) == len(kept) else None,
            "channel",
        )
        found.append(network if inputs is None else _measured(model, network, inputs))
    return found


def _sources(owner: Any) -> list[str]:
    """What diffusers' down blocks keep, outermost first."""
    blocks: Any = getattr(owner, "down_blocks", ())
    if any("1D" in type(block).__name__ for block in blocks):
        return [f"down_blocks.{j}" for j in range(len(blocks))]
    found = ["conv_in"]
    for j, block in enumerate(blocks):
        layers = "attentions" if getattr(block, "attentions", None) else "resnets"
        found += [f"down_blocks.{j}.{layers}.{k}" for k in range(len(block.resnets))]
        if getattr(block, "downsamplers", None) is not None:
            found.append(f"down_blocks.{j}.downsamplers.0")
    return found


def _channels(owner: Any, blocks: Any) -> tuple[int, ...] | None:
    """Channels of every skip, outermost first: what a layer takes in beyond what the layer before it puts out."""
    try:
        before = (owner.mid_block or owner.down_blocks[-1]).resnets[-1].out_channels
        found = []
        for layer in (layer for block in blocks for layer in block.resnets):
            found.append(layer.in_channels - before)
            before = layer.out_channels
    except (AttributeError, IndexError, TypeError):
        return None
    return tuple(reversed(found)) if all(size > 0 for size in found) else None


def _by_argument(model: nn.Module, inputs: Any) -> list[Network]:
    """Decoder blocks with an argument for the skip, by the module that owns them; they stand in the order in which they run."""
    groups: dict[str, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        argument = next((a for a in ARGUMENTS if _parameter(module, a) is not None), None)
        if argument is None or (hasattr(module, "skip_linear") and module.skip_linear is None):
            continue
        owner = name
        while owner and (owner == name or isinstance(model.get_submodule(owner), CONTAINERS)):
            owner = owner.rpartition(".")[0]
        groups.setdefault(owner, []).append((name, module, argument))
    if inputs is not None and groups:
        groups = _called(model, groups, inputs)
    found = []
    for owner, group in groups.items():
        part = model.get_submodule(owner)
        sizes = _pyramid(model, part)
        if sizes is not None and len(group) in (len(sizes), len(sizes) + 1):
            group, sources = group[: len(sizes)], [f"encoder, feature {k}" for k in range(1, len(sizes) + 1)]
        else:
            sizes, sources = None, _mirrored(owner, part, group)
        sure = inputs is not None or sizes is not None or all(_needs_skip(m, a) for _, m, a in group)
        if not sure and not all(sources):
            continue  # blocks that may be called without a skip, and no encoder of as many blocks
        n = len(group)
        position = getattr(part, "pos_embed", None)
        if sizes is None and isinstance(position, Tensor) and position.dim() == 3:
            sizes = [position.shape[1]] * n
        convolves = any(isinstance(m, nn.modules.conv._ConvNd) for _, host, _ in group for m in host.modules())
        hosts = tuple(Host(name, m, (n - k,), a) for k, (name, m, a) in enumerate(group))
        axis = "channel" if convolves else "token"
        network = Network(owner, part, hosts, tuple(sources), None if sizes is None else tuple(sizes), axis)
        found.append(network if inputs is None else _measured(model, network, inputs))
    return found


def _needs_skip(module: Any, argument: str) -> bool:
    parameter = _parameter(module, argument)
    return hasattr(module, "skip_linear") or (parameter is not None and parameter.default is parameter.empty)


def _pyramid(model: nn.Module, decoder: nn.Module) -> list[int] | None:
    """segmentation-models: the encoder tells its channels, from the image to the innermost feature; the ends are no skips."""
    for module in model.modules():
        encoder: Any = getattr(module, "encoder", None)
        if getattr(module, "decoder", None) is decoder and isinstance(getattr(encoder, "out_channels", None), Sequence):
            return list(encoder.out_channels)[1:-1]
    return None


def _mirrored(owner: str, part: nn.Module, group: Sequence[tuple[str, nn.Module, str]]) -> list[str]:
    """The encoder's blocks, outermost first: another list of as many blocks, or the first blocks of the decoder's own list."""
    n, own = len(group), group[0][0][len(prefix(owner)) :].partition(".")[0]
    lists = {key: child for key, child in part.named_children() if isinstance(child, nn.ModuleList)}
    key = next((key for key, child in lists.items() if key != own and len(child) == n), None)
    if key is None and own in lists and len(lists[own]) >= 2 * n:
        key = own
    return [f"{prefix(owner)}{key}.{k}" for k in range(n)] if key is not None else [""] * n


def observed(model: nn.Module, hosts: Sequence[tuple[nn.Module, str]], inputs: Any) -> list[tuple[nn.Module, Any]]:
    """(module, the argument it was given) for every call of one forward pass in evaluation mode, without gradients."""
    seen: list[tuple[nn.Module, Any]] = []

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = dict(zip(list(inspect.signature(type(module).forward).parameters)[1:], args, strict=False)) | kwargs
            seen.append((module, given.get(name)))

        return hook

    handles = [m.register_forward_pre_hook(listen(argument), with_kwargs=True) for m, argument in hosts]
    args, kwargs = unpacked(inputs)
    try:
        output_of(model, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _called(model: nn.Module, groups: dict[str, Any], inputs: Any) -> dict[str, Any]:
    """The groups in the order of their calls, without blocks that are given no skip."""
    by_module = {id(row[1]): (owner, row) for owner, group in groups.items() for row in group}
    found: dict[str, Any] = {}
    for module, value in observed(model, [(row[1], row[2]) for group in groups.values() for row in group], inputs):
        if isinstance(value, Tensor):
            owner, row = by_module[id(module)]
            if row in found.setdefault(owner, []):
                raise ValueError(f"{row[0]} runs several times in a forward pass, so its skip has no one number i")
            found[owner].append(row)
    return found


def _measured(model: nn.Module, network: Network, inputs: Any) -> Network:
    """The network with the number of tokens or channels that its skips have on ``inputs``."""
    shapes: dict[int, torch.Size] = {}
    for module, value in observed(model, [(host.module, host.argument) for host in network.hosts], inputs):
        host = next(h for h in network.hosts if h.module is module)
        parts = value if isinstance(value, tuple | list) else (value,)
        shapes |= {i: part.shape for i, part in zip(host.at, parts, strict=True) if i is not None}
    return with_shapes(network, [shapes[i] for i in range(1, network.n + 1)])


def with_shapes(network: Network, shapes: Sequence[torch.Size]) -> Network:
    """The network whose skips have these shapes, outermost first."""
    axis = network.axis if all(len(shape) == 3 for shape in shapes) else "channel"
    return replace(network, features=tuple(shape[1] for shape in shapes), axis=axis)
