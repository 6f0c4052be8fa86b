"""From what a user holds (a tensor, a tuple, a mapping, a BatchEncoding; a loss or none) to a call and a scalar to go back from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.signals.layout import first_tensor


def call_model(model: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> Any:
    """``model(*inputs)``, with a single mapping spread over the keywords and a single tuple over the positions."""
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return model(**inputs[0], **keywords)
    if len(inputs) == 1 and isinstance(inputs[0], tuple | list) and not hasattr(inputs[0], "_fields"):
        return model(*inputs[0], **keywords)
    return model(*inputs, **keywords)


def split_targets(inputs: tuple, loss: Any, targets: Any) -> tuple[tuple, Any]:
    """Takes the targets out of a single batch (x, ..., y) when the loss wants them and they were not given apart."""
    if targets is not None or loss is None or len(inputs) != 1 or not isinstance(inputs[0], tuple | list):
        return inputs, targets
    if len(inputs[0]) < 2 or required_arguments(loss) < 2:
        return inputs, targets
    return tuple(inputs[0][:-1]), inputs[0][-1]


def required_arguments(function: Callable[..., Any]) -> int:
    """How many positional arguments a call must give."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return 2
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in signature.parameters.values())


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def check_batch(inputs: tuple, keywords: dict[str, Any]) -> None:
    """Raises ValueError for a batch without samples."""
    first = next(tensors((inputs, keywords)), None)
    if first is not None and first.dim() and first.shape[0] == 0:
        raise ValueError(
            f"the batch holds no samples (shape {tuple(first.shape)}); give at least one, better 16 or more"
        )


def objective(
    output: Any, loss: Callable[..., Tensor] | None, targets: Any, backward: bool, seed: int
) -> tuple[Tensor | None, str, tuple[Tensor, Tensor] | None]:
    """The scalar to differentiate, what it is in words, and, for the random projection, (tensor, its gradient) to start from.

    Raises:
        ValueError: the loss is no scalar, or no gradient can flow from it.
    """
    if loss is not None:
        if required_arguments(loss) == 0 and output is None:
            value = loss()
        elif targets is not None:
            value = loss(output, targets)
        else:
            value = loss(output)
        words = getattr(loss, "__name__", type(loss).__name__)
        words = "the given loss" if "<" in words else words
    else:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        words = "the model's own loss"
        if not isinstance(value, Tensor) and isinstance(output, Tensor) and output.dim() == 0:
            value, words = output, "the model's output"
        if not isinstance(value, Tensor):
            return _projection(output, backward, seed)
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be one number, not {given}; take its mean")
    if backward and not value.requires_grad:
        raise ValueError(
            "the loss carries no gradient (everything is frozen or detached); pass backward=False to probe forward only"
        )
    return value, words, None


def _projection(output: Any, backward: bool, seed: int) -> tuple[Tensor | None, str, tuple[Tensor, Tensor] | None]:
    tensor = first_tensor(output)
    if tensor is None:
        if backward:
            raise ValueError(
                f"the output ({type(output).__name__}) holds no floating tensor; give loss= or backward=False"
            )
        return None, "", None
    if not backward:
        return None, "", None
    if not tensor.requires_grad:
        raise ValueError(
            "the output carries no gradient (everything is frozen or detached); pass backward=False to probe forward only"
        )
    direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device, tensor.dtype)
    value = torch.dot(tensor.detach().flatten(), direction.flatten())
    return value, "the output times a fixed random vector", (tensor, direction)
