"""What travels between cloud and edge: scales, shifts and running statistics of norms; and how any classifier is called."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from headway.learning.cloud_edge.renorm import BatchRenorm
from headway.norms.statistics import RunningStatistics
from headway.weights.invariance import is_norm

Samples = dict[str, Tensor]
"""A batch: tensors whose first axis holds the samples, by the name of the model's argument; "" where it takes a single tensor."""
_STATISTICS = ("running_mean", "running_var")


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model's normalisations: torch's, this library's, and those named as one (LlamaRMSNorm)."""
    for name, module in model.named_modules():
        if is_norm(module) or isinstance(module, RunningStatistics):
            yield name, module


def named_affine_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales and shifts of every normalisation, by name.

    Raises:
        ValueError: the model has none.
    """
    found = {
        f"{name}.{key}" if name else key: parameter
        for name, module in norms(model)
        for key, parameter in module.named_parameters(recurse=False)
    }
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})[:12]
        raise ValueError(
            f"the model has no normalisation with a scale and a shift, which is all that adapts; it is built of {', '.join(kinds)}"
        )
    return found


def affine_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of every normalisation: all that is adapted. ValueError where the model has none."""
    return list(named_affine_parameters(model).values())


def travelling(model: nn.Module) -> Samples:
    """The tensors by which the cloud's copy of an edge network may differ from the edge's: affine parameters and the running
    statistics of batch norms, by name; not copies."""
    found: Samples = {name: parameter.data for name, parameter in named_affine_parameters(model).items()}
    for name, module in norms(model):
        if isinstance(module, _NormBase):
            for key in _STATISTICS:
                buffer = getattr(module, key)
                if buffer is not None:
                    found[f"{name}.{key}" if name else key] = buffer
    return dict(sorted(found.items()))


def is_statistic(name: str) -> bool:
    """Whether a travelling tensor is a running statistic and no parameter."""
    return name.rpartition(".")[2] in _STATISTICS


@torch.no_grad()
def install(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies values into the model's own tensors, in place: whatever was compiled for the model stays valid."""
    mine = travelling(model)
    for name, value in tensors.items():
        mine[name].copy_(value)
    for _, module in norms(model):
        if isinstance(module, BatchRenorm):
            module.statistics_loaded()


def only_norms_train(model: nn.Module, training: bool) -> None:
    """Puts everything in evaluation mode but the norms, which go in training mode if ``training``."""
    model.eval()
    for _, module in norms(model):
        module.train(training)


def architecture_hash(model: nn.Module) -> str:
    """A hash of the sorted names, shapes and types of all parameters and buffers."""
    lines = sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in model.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def checksum(tensors: Mapping[str, Tensor], start: str = "") -> int:
    """CRC-32 of ``start``, the names, and the bytes of all tensors in the order of their names."""
    value = zlib.crc32(start.encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        value = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().tobytes(), zlib.crc32(name.encode(), value))
    return value


def weights_checksum(model: nn.Module) -> int:
    """CRC-32 of all parameters and buffers but the counters of batches: edge and cloud must start from the same."""
    state = model.state_dict().items()
    return checksum({name: tensor for name, tensor in state if not name.endswith("num_batches_tracked")})


def class_count(model: nn.Module) -> int | None:
    """How many classes a classifier tells apart, by its configuration or its last linear layer; None where that cannot be seen."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels is not None:
        return int(labels)
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    return widths[-1] if widths else None


def logits_of(model: Any, samples: Samples) -> Tensor:
    """Calls a classifier on samples: on the tensor itself, or by keyword for the models of transformers; (n, C) logits."""
    out = model(samples[""]) if "" in samples else model(**samples)
    out = out["logits"] if isinstance(out, dict) else getattr(out, "logits", out)
    if not isinstance(out, Tensor) or out.dim() != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"a classifier must return logits (n, classes), or an object that has them; it returned {shape}"
        )
    return out


def as_samples(x: Any) -> Samples:
    """A tensor or a mapping of tensors as :data:`Samples`.

    Raises:
        ValueError: it is something else, or the first axes differ.
    """
    samples: Samples = {"": x} if isinstance(x, Tensor) else dict(x) if isinstance(x, Mapping) else {}
    sizes = {len(t) if isinstance(t, Tensor) and t.dim() else -1 for t in samples.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(
            "the input must be a tensor, or a mapping of tensors, whose first axis holds the samples; it is "
            f"{type(x).__name__} of {len(samples)} tensors with first axes {sorted(sizes)}"
        )
    return samples


def count(samples: Samples) -> int:
    """How many samples a batch holds."""
    return len(next(iter(samples.values())))


def rows(samples: Samples, which: Any) -> Samples:
    """Some of the samples: by a mask, indices or a slice."""
    return {key: tensor[which] for key, tensor in samples.items()}
