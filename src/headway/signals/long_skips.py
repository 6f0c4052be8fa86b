"""The long skips of a network, as the probe sees them: which modules' outputs travel from the encoder to the decoder unscaled.

    1 + sum_i E|x_i|^2 / E|x_N|^2         x_i: what skip i carries, i = N the innermost, which the middle is given too

A sum of N skips over blocks that keep the variance has this second moment, out over in: N + 1 for features of one size. It grows with
every skip, and so do the gradient and the answer to noise in the input ("ScaleLong", 2023, arXiv 2310.13545).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from headway.signals.row import Row

_UPWARDS = (nn.Upsample, nn.PixelShuffle, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_JOINS, _ENLARGES = {"cat", "concat", "concatenate"}, {"interpolate", "upsample", "pixel_shuffle"}


def long_skips(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules whose outputs the unscaled long skips carry, outermost first; of several networks, those of the one
    with the most. Empty where there are none, where they are scaled, or where their modules cannot be told."""
    from headway.residual.long_skip import LongSkips
    from headway.residual.long_skip_sites import find_networks, stated_networks

    try:
        # tracing is worth its time for few models, and runs their own code on stand-ins
        with torch.random.fork_rng(devices=[]):
            networks = find_networks(_twin(model)) if _looks_like_unet(model) else stated_networks(model)
    except Exception:  # that code may raise anything; then nothing is known of the skips
        return ()
    found: list[tuple[str, ...]] = []
    for network in networks:
        names = network.encoders
        if isinstance(network.module, LongSkips):
            scaled = network.module.mode != "none"
            names = () if scaled else tuple(f"{network.name}#{k}" for k in range(network.n, 0, -1))
        found.append(names)
    most = max(found, key=len, default=())
    modules = {name for name, _ in model.named_modules() if name}
    return most if all(name.partition("#")[0] in modules for name in most) else ()


def _twin(model: nn.Module) -> nn.Module:
    """The same tree of modules with the same parameters, on which nothing that runs can leave a trace in the model."""
    twins: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        twin = object.__new__(type(module))
        for key, value in module.__dict__.items():
            value = type(value)() if key.endswith("_hooks") and isinstance(value, dict) else value
            twin.__dict__[key] = copy.copy(value) if isinstance(value, dict | list | set) else value
        twin.__dict__["_buffers"] = {key: None if b is None else b.clone() for key, b in module._buffers.items()}
        twins[module] = twin
    for module, twin in twins.items():
        twin.__dict__["_modules"] = {key: None if m is None else twins[m] for key, m in module._modules.items()}
    return twins[model]


def _looks_like_unet(model: nn.Module) -> bool:
    """Whether it convolves, enlarges its features again and concatenates: what tracing is worth its time for."""
    modules = list(model.modules())
    if not any(isinstance(module, nn.modules.conv._ConvNd) for module in modules):
        return False
    words = {word for module in modules for word in _words(type(module))}
    return bool(words & _JOINS) and (bool(words & _ENLARGES) or any(isinstance(m, _UPWARDS) for m in modules))


@cache
def _words(kind: type[nn.Module]) -> frozenset[str]:
    """What the forward passes of a class and its bases call."""
    own = [base for base in kind.__mro__ if "forward" in base.__dict__ and not base.__module__.startswith("torch.nn.")]
    codes = [getattr(inspect.unwrap(base.__dict__["forward"]), "__code__", None) for base in own]
    return frozenset(word for code in codes if code is not None for word in code.co_names)


def carried(rows: Sequence[Row], names: Sequence[str]) -> tuple[float, list[Row]]:
    """The second moment that the skips ``names`` add up to, over that of the innermost, and their rows, outermost first; NaN and
    no rows where one was not measured."""
    by_name = {row.name: row for row in rows}
    mine = [by_name[name] for name in names if name in by_name]
    if len(mine) < len(names) or not mine or not mine[-1].rms > 0:
        return float("nan"), []
    return 1 + sum((row.rms / mine[-1].rms) ** 2 for row in mine), mine
