"""Takes the mean over the channels out of whatever writes to a residual stream.

    P = I - (1/d) 1 1^T          W <- P W,  b <- P b          table <- table P

Then the stream stays at zero mean, and LN0(x) = RMS0(P x) = RMS0(x). The mean of a weight runs over its OUTPUT axis: the first of
``nn.Linear`` and of convolutions, the last of Hugging Face's ``Conv1D`` and of tables. Paper: "Pre-RMSNorm and Pre-CRMSNorm
Transformers" (Jiang et al.), 2023, arXiv 2305.14858.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headway.surgery import Edit


def recentred(tensor: Tensor, axis: int) -> Tensor:
    """``tensor`` less its mean over ``axis``, computed in float64 and returned in the dtype of ``tensor``."""
    wide = tensor.detach().double()
    return (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)


def output_axis(module: nn.Module) -> int:
    """The axis of ``module.weight`` along which the output channels lie.

    Raises:
        TypeError: the module is no linear layer, convolution or table.
    """
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 0
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        return -1
    raise TypeError(
        f"{type(module).__name__} writes to the residual stream and cannot be recentred; "
        "linear layers, convolutions and embeddings can"
    )


@torch.no_grad()
def recentre_linear_(linear: nn.Module) -> nn.Module:
    """Recentres weight and bias of a linear layer, convolution or ``Conv1D`` in place and returns it."""
    weight: Any = linear.weight
    weight.copy_(recentred(weight, output_axis(linear)))
    bias: Any = getattr(linear, "bias", None)
    if bias is not None:
        bias.copy_(recentred(bias, -1))
    return linear


@torch.no_grad()
def recentre_embedding_(embedding: nn.Embedding) -> nn.Embedding:
    """Recentres every row of a table in place and returns it. A head tied to the table changes with it: untie it first."""
    embedding.weight.copy_(recentred(embedding.weight, -1))
    return embedding


def shallow(module: nn.Module) -> nn.Module:
    """A module of the same class that holds the very same parameters and children in dictionaries of its own."""
    new = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = dict(module.__dict__[name])
    return new


def baked(module: nn.Module) -> nn.Module:
    """A recentred copy of a writer, with parameters of its own."""
    new = shallow(module)
    for name, axis in (("weight", output_axis(module)), ("bias", -1)):
        old = module._parameters.get(name)
        if old is not None:
            new._parameters[name] = nn.Parameter(recentred(old, axis), old.requires_grad)
    return new


class Recentre(nn.Module):
    """The parametrisation ``W -> W - mean(W, axis)``, inside the graph: the raw weight keeps the trajectory of Pre-LN."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(self.axis, keepdim=True)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


def parametrized(module: nn.Module) -> nn.Module:
    """A writer that shares the raw parameters of ``module`` and recentres them at every forward."""
    new = shallow(module)
    for name, axis in (("weight", output_axis(module)), ("bias", -1)):
        if module._parameters.get(name) is not None:
            parametrize.register_parametrization(new, name, Recentre(axis))
    return new


@torch.no_grad()
def finalize(model: nn.Module) -> nn.Module:
    """Bakes every recentring parametrisation of ``model`` into plain weights, in place, and returns the model."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            if any(isinstance(step, Recentre) for step in module.parametrizations[name]):  # type: ignore[index]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def _centre_first(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (_centred(args[0]), *args[1:]), kwargs
    name = next(name for name in ("hidden_states", "src", "tgt", "x") if name in kwargs)
    return args, {**kwargs, name: _centred(kwargs[name])}


def _centred(x: Tensor) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)


class CentreEntry(Edit):
    """Takes the mean out of the stream where it enters its first block: tied tables stay tied, embedding dropout stays legal."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self.block, self.name = block, name

    def do(self) -> None:
        self._handle = self.block.register_forward_pre_hook(_centre_first, with_kwargs=True)

    def undo(self) -> None:
        self._handle.remove()

    def describe(self) -> tuple[str, str]:
        return "stream as embedded", "stream less its mean over the channels (the tables stay as they are, and tied)"
