"""A task as a file: gains, shifts and running statistics of a network whose other weights are shared. arXiv 2003.00152."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway._files import write_bytes
from headway.learning.batchnorm_only.choose import Affine, affine_normalisers, output_layer


def task_modules(model: nn.Module, include_output: bool | str = False) -> list[tuple[str, nn.Module, list[str]]]:
    """(qualified name, module, names of its own tensors that make up a task), the output layer's modules last.

    Raises:
        ValueError: no normaliser has a gain or a shift, or the output layer cannot be told.
    """
    norms = affine_normalisers(model)
    if not norms:
        raise ValueError("the model has no normaliser with a gain or a shift, so there is nothing that makes up a task")
    found = [(norm.name, norm.module, _tensors(norm)) for norm in norms]
    if include_output:
        name, head = output_layer(model, include_output if isinstance(include_output, str) else None)
        done = {id(module) for _, module, _ in found}
        for inner, module in head.named_modules(prefix=name):
            own = [key for key, p in module._parameters.items() if p is not None]
            if own and id(module) not in done:
                found.append((inner, module, own))
    return found


def _tensors(norm: Affine) -> list[str]:
    kept = [key for key in (norm.gain, norm.shift) if key is not None]
    buffers = norm.module._buffers
    return kept + [
        key for key, b in buffers.items() if b is not None and key not in norm.module._non_persistent_buffers_set
    ]


def _named(model: nn.Module, include_output: bool | str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module, keys in task_modules(model, include_output):
        for key in keys:
            tensor: Any = module._parameters.get(key)
            tensor = module._buffers[key] if tensor is None else tensor
            found[f"{name}.{key}" if name else key] = tensor
    return found


def norm_state_dict(model: nn.Module, include_output: bool | str = False) -> dict[str, Tensor]:
    """Copies of every normaliser's gain, shift and running statistics, under their names in the model.

    Args:
        include_output: also the output layer (True, or its name).

    Raises:
        ValueError: nothing to keep, or an output layer that cannot be told.
    """
    return {name: tensor.detach().clone() for name, tensor in _named(model, include_output).items()}


def load_norm_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
) -> tuple[list[str], list[str]]:
    """Copies what :func:`norm_state_dict` gave into the model, in place; an output layer where ``state`` holds one.

    Returns:
        Names that ``state`` lacks, and names of it that the model lacks.

    Raises:
        ValueError: tensors of another shape; with ``strict`` also names that are missing or not known. Nothing is changed then.
    """
    wanted = _named(model, False)
    every = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in every]
    shapes = [
        f"{name} {tuple(tensor.shape)} for {tuple(every[name].shape)}"
        for name, tensor in state.items()
        if name in every and tensor.shape != every[name].shape
    ]
    if shapes or (strict and (missing or unknown)):
        parts = [("of another shape", shapes), ("missing", missing if strict else []), ("not in the model", unknown)]
        told = "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in parts if names)
        raise ValueError(
            f"the task does not fit the model: {told}; give a task of the same network (strict=False skips names)"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name in every:
                every[name].copy_(tensor)
    return missing, unknown


def save_norms(model: nn.Module, path: str | os.PathLike[str], include_output: bool | str = False) -> Path:
    """Writes :func:`norm_state_dict` as one safetensors file (a new file, then renamed) and returns its path."""
    return save_task(norm_state_dict(model, include_output), path)


def save_task(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Writes a task as one safetensors file: first a new file, flushed to the disk, then renamed."""
    from safetensors.torch import save

    return write_bytes(path, save({name: tensor.detach().contiguous() for name, tensor in state.items()}))


def load_norms(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> tuple[list[str], list[str]]:
    """Loads what :func:`save_norms` wrote; see :func:`load_norm_state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no safetensors file, or one that does not fit.
    """
    return load_norm_state_dict(model, read_task(path), strict)


def read_task(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: no file, or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; save_norms writes one")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); save_norms writes one") from None
