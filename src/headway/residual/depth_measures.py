"""How much the layers of a deep model do: angular distance, performance drop, gradient norm by layer.

The three measures of Mix-LN (Li, Yin, Liu, 2024, arXiv 2412.13795); the angular distance is that of Gromov et al., 2024
(arXiv 2403.17887): ``d(l) = mean over tokens of arccos(cos(x_l, x_{l+n})) / pi``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headway.anatomy import describe


def _stacks(model: nn.Module) -> list[list[nn.Module]]:
    return [[model.get_submodule(block.name) for block in stack.blocks] for stack in describe(model).stacks]


def _layers(model: nn.Module) -> list[nn.Module]:
    return [layer for stack in _stacks(model) for layer in stack]


def call(model: nn.Module, batch: Any) -> Any:
    """``model`` called with a batch: one input, a tuple of them, or a dict of keywords."""
    return model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _entering(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def angular_distance(model: nn.Module, batch: Any, n: int = 1) -> Tensor:
    """The angle, as a share of pi, by which ``n`` layers turn the stream: 0 for identity layers, 0.5 for an orthogonal map.

    Args:
        model: a model of a known family, in the mode it is to be measured in.
        batch: what the model is called with, see :func:`call`.
        n: how many layers lie between the two ends compared.

    Returns:
        L - n + 1 numbers, the mean over tokens from each layer's input on; of a model with several stacks, one after the other.

    Raises:
        ValueError: n is not between 1 and the number of layers of the shortest stack.
        UnknownFamily: the model holds no layer of a known family.
    """
    stacks = _stacks(model)
    shortest = min(len(layers) for layers in stacks)
    if not 1 <= n <= shortest:
        raise ValueError(f"n must lie between 1 and the number of layers, {shortest}; {n} was given")
    streams: list[list[Tensor]] = [[] for _ in stacks]
    handles = []
    for layers, stream in zip(stacks, streams, strict=True):

        def first(_: nn.Module, args: tuple, kwargs: dict, stream: list[Tensor] = stream) -> None:
            stream.append(_entering(args, kwargs).detach())

        def after(_: nn.Module, _args: tuple, out: Any, stream: list[Tensor] = stream) -> None:
            stream.append(_first(out).detach())

        handles.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
        handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    distances = []
    for a, b in ((a, b) for stream in streams for a, b in zip(stream[:-n], stream[n:], strict=True)):
        a, b = (t.double().flatten(0, -2) for t in (a, b))
        a, b = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-300) for t in (a, b))
        # 2 atan2(|a - b|, |a + b|) is exact near 0 and pi, where arccos of a rounded cosine is not
        angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
        distances.append(angle.mean() / torch.pi)
    return torch.stack(distances)


@torch.no_grad()
def performance_drop(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> Tensor:
    """``evaluate(model with layer l bypassed) - evaluate(model)`` for every layer: shape (L,).

    A bypassed layer, its norms included, hands its input on; the model is not copied and is as before afterwards.
    """
    whole = float(evaluate(model))
    drops = []
    for layer in _layers(model):
        inputs: list[Tensor] = []

        def keep(_: nn.Module, args: tuple, kwargs: dict, inputs: list[Tensor] = inputs) -> None:
            inputs.append(_entering(args, kwargs))

        def pass_on(_: nn.Module, _args: tuple, out: Any, inputs: list[Tensor] = inputs) -> Any:
            x = inputs.pop()
            return (x, *out[1:]) if isinstance(out, tuple) else x

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True), layer.register_forward_hook(pass_on)]
        try:
            drops.append(float(evaluate(model)) - whole)
        finally:
            for handle in handles:
                handle.remove()
    return torch.tensor(drops)


def layer_grad_norms(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """Frobenius norm of the gradient over the weight matrices of every layer: shape (L,); ``.grad`` fields are left alone."""
    groups = [[p for p in layer.parameters() if p.dim() > 1 and p.requires_grad] for layer in _layers(model)]
    flat = [p for group in groups for p in group]
    grads = dict(zip(flat, torch.autograd.grad(loss(model), flat, allow_unused=True), strict=True))
    squares = [
        sum(
            (g.double().square().sum() for p in group if (g := grads[p]) is not None),
            torch.zeros((), dtype=torch.double),
        )
        for group in groups
    ]
    return torch.stack(squares).sqrt()
