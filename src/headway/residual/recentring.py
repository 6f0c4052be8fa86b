"""Takes the mean over the channels out of whatever writes to a residual stream: of a weight, or of what a module computes.

    P = I - (1/d) 1 1^T          W <- P W,  b <- P b          table <- table P          x <- P x

Then the stream stays at zero mean, and LN0(x) = RMS0(P x) = RMS0(x). The mean of a weight runs over its OUTPUT axis: the first of
``nn.Linear`` and of convolutions, the last of Hugging Face's ``Conv1D`` and of tables. Baked once, this serves inference; inside
the graph (:class:`Recentre`) the raw weight keeps the gradient it has under layer norm, P times that of the RMS norm, and so the
whole trajectory of Pre-LN training under any optimiser. Paper: "Pre-RMSNorm and Pre-CRMSNorm Transformers" (Jiang et al.), 2023,
arXiv 2305.14858.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headway.residual.stream import is_conv1d
from headway.surgery import Edit


def recentred(tensor: Tensor, axis: int) -> Tensor:
    """``tensor`` less its mean over ``axis``, computed in float64 and returned in the dtype of ``tensor``."""
    wide = tensor.detach().double()
    return (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)


def output_axis(module: nn.Module) -> int | None:
    """The axis of ``module.weight`` along which the output channels lie; None for what is no linear layer, convolution or table."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 0
    return -1 if isinstance(module, nn.Embedding) or is_conv1d(module) else None


@torch.no_grad()
def recentre_linear_(linear: nn.Module) -> nn.Module:
    """Takes the mean over the outputs off the weight and bias of a linear layer, in place and in float64; returns the layer.

    Args:
        linear: ``nn.Linear``, ``nn.Conv1d``/``2d``/``3d`` (over its output channels), or transformers' ``Conv1D``.

    Raises:
        TypeError: any other module, whose output axis is not known.
    """
    axis = output_axis(linear)
    if axis is None or isinstance(linear, nn.Embedding):
        raise TypeError(
            f"the output axis of {type(linear).__name__} is not known, so it cannot be recentred; "
            "linear layers and convolutions can"
        )
    for key, along in (("weight", axis), ("bias", 0)):
        if (parameter := linear._parameters.get(key)) is not None:
            parameter.copy_(recentred(parameter, along))
    return linear


@torch.no_grad()
def recentre_embedding_(embedding: nn.Embedding) -> nn.Embedding:
    """Takes the mean off every row of a table, in place and in float64; returns it. A head tied to it changes too: untie it first."""
    embedding.weight.copy_(recentred(embedding.weight, -1))
    return embedding


def centred(x: Tensor) -> Tensor:
    """Activations less their mean over the last axis, in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)


class Recentre(nn.Module):
    """The parametrisation ``W -> W - mean(W, axis)`` inside the graph, in float32 at least, autocast or not.

    In evaluation mode without gradients the result is kept until the weight changes; training keeps nothing.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self._kept: tuple[tuple, Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            self._kept = None
            return self._recentred(weight)
        state = weight.data_ptr(), weight._version, weight.dtype, weight.device, weight.shape
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self._recentred(weight)
        return self._kept[1]

    def _recentred(self, weight: Tensor) -> Tensor:
        wide = weight if weight.dtype == torch.float64 else weight.float()
        return (wide - wide.mean(self.axis, keepdim=True)).to(weight.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class Parametrize(Edit):
    """Recentres one parameter of a module at every forward; the raw tensor stays the parameter, tied to whatever it was tied to."""

    def __init__(self, owner: nn.Module, attribute: str, axis: int, name: str) -> None:
        self.owner, self.attribute, self.axis, self.name = owner, attribute, axis, name
        self._order = list(owner._parameters)

    def do(self) -> None:
        parametrize.register_parametrization(self.owner, self.attribute, Recentre(self.axis).train(self.owner.training))

    def undo(self) -> None:
        # copies of a module share the class that torch made for it, and removing would break them
        shared = type(self.owner)
        own = {key: value for key, value in shared.__dict__.items() if key not in ("__dict__", "__weakref__")}
        alone: Any = type(shared.__name__, shared.__bases__, own)
        self.owner.__class__ = alone
        parametrize.remove_parametrizations(self.owner, self.attribute, leave_parametrized=False)
        table = self.owner._parameters
        ordered = {key: table[key] for key in self._order if key in table}
        table.update({key: table.pop(key) for key in list(ordered)})

    def describe(self) -> tuple[str, str]:
        raw: Any = self.owner._parameters.get(self.attribute)
        if raw is None:
            raw = self.owner.parametrizations[self.attribute].original  # type: ignore[index]
        return f"parameter {tuple(raw.shape)}", "recentred at every forward"


class Bake(Edit):
    """Puts a plain recentred parameter where :class:`Recentre` computed it at every forward."""

    def __init__(self, owner: nn.Module, attribute: str, name: str) -> None:
        self.owner, self.attribute, self.name = owner, attribute, name
        steps: Any = owner.parametrizations[attribute]  # type: ignore[index]
        self.raw: nn.Parameter = steps.original
        self._parametrize = Parametrize(owner, attribute, steps[0].axis, name)
        self.new = nn.Parameter(recentred(self.raw, steps[0].axis), self.raw.requires_grad)

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        return {self.raw: self.new}

    def do(self) -> None:
        self._parametrize.undo()
        self.owner._parameters[self.attribute] = self.new

    def undo(self) -> None:
        self.owner._parameters[self.attribute] = self.raw
        self._parametrize.do()

    def describe(self) -> tuple[str, str]:
        return "recentred at every forward", f"parameter {tuple(self.new.shape)} recentred"


def parametrized_places(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, owner, attribute) of every parameter that :class:`Recentre` acts on."""
    return [
        (f"{name}.{attribute}".lstrip("."), module, attribute)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute, steps in module.parametrizations.items()  # type: ignore[union-attr]
        if isinstance(steps[0], Recentre)
    ]


def _without_mean(x: Tensor, cut: bool) -> Tensor:
    return centred(x)[..., :-1] if cut else centred(x)


def centre_entry(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, cut: bool) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: takes the mean off the first argument of a module."""
    if args:
        return (_without_mean(args[0], cut), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
    return args, {**kwargs, name: _without_mean(kwargs[name], cut)}


def centre_exit(module: nn.Module, args: tuple, output: Tensor, *, cut: bool) -> Tensor:
    """Forward hook: takes the mean off the output of a module."""
    return _without_mean(output, cut)


class CentreActivation(Edit):
    """Takes the mean off what enters a module, or off what leaves it, at every forward.

    Args:
        model, name: the module, looked up when the edit is done, so that it may be one that an earlier edit put there.
        at: "entry" or "exit".
        cut: leave out the last channel as well.
    """

    def __init__(self, model: nn.Module, name: str, at: str, cut: bool = False) -> None:
        self.model, self.name, self.at, self.cut = model, name, at, cut

    def do(self) -> None:
        module = self.model.get_submodule(self.name)
        if self.at == "entry":
            hook = partial(centre_entry, cut=self.cut)
            self._handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            self._handle = module.register_forward_hook(partial(centre_exit, cut=self.cut))

    def undo(self) -> None:
        self._handle.remove()

    def describe(self) -> tuple[str, str]:
        what = "what enters it" if self.at == "entry" else "what leaves it"
        return what, f"{what}, recentred" + (", without its last channel" if self.cut else "")


class Uncentre(Edit):
    """Takes the centring hook off the output of a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def do(self) -> None:
        self._before = dict(self.module._forward_hooks)
        for key, hook in self._before.items():
            if getattr(hook, "func", None) is centre_exit:
                del self.module._forward_hooks[key]

    def undo(self) -> None:
        self.module._forward_hooks.clear()
        self.module._forward_hooks.update(self._before)

    def describe(self) -> tuple[str, str]:
        return "what leaves it, recentred", "what leaves it"
