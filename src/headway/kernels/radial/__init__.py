"""The steps of AdamP and SGDP over whole lists of parameters, and their projection alone.

The C++ bodies read and write each number twice a step whatever the tensor's size: one pass over p, g and the moments gathers the
sums that decide, the next one recomputes the update and writes p. Tensors that fit the second-level cache are done one by one, so
that the second pass finds them there. :mod:`.reference` is the truth they are tested against, and what ``torch.compile`` fuses.

Operators, all in place, returning what was done to every tensor (int8: 0 none, 1 channel, 2 layer): ``adamp_``, ``sgdp_``,
and ``radial_step_``, the end of a step whose
updates are given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels.library import define, load
from headway.kernels.radial import reference

built = load("radial")
"""Whether the C++ bodies are there."""
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _kinds(params, *_) -> Tensor:
    return torch.empty(len(params), dtype=torch.int8, device=params[0].device)


adamp_ = define(
    "adamp_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, float delta, float wd_ratio, bool nesterov, "
    "bool maximize) -> Tensor",
    reference.adamp_,
    _kinds,
)
sgdp_ = define(
    "sgdp_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, float lr, float momentum, float dampening, float eps, "
    "float weight_decay, float delta, float wd_ratio, bool nesterov, bool maximize, bool official_inplace) -> Tensor",
    reference.sgdp_,
    _kinds,
)
radial_step_ = define(
    "radial_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] updates, float[] steps, float decay, float delta, "
    "float wd_ratio, float eps, bool keep) -> Tensor",
    reference.radial_step_,
    _kinds,
)


def runs_of_rows(p: Tensor, *others: Tensor) -> bool:
    """Whether every row of ``p`` (its first axis) is one run of memory, whatever the order of the other axes, and ``others``
    lie alike: what the C++ bodies take."""
    if p.is_contiguous() and all(other.is_contiguous() and other.dtype == p.dtype for other in others):
        return True
    if any(other.dtype != p.dtype or other.stride() != p.stride() for other in others):
        return False
    sizes = sorted((step, size) for step, size in zip(p.stride(), p.shape, strict=True) if size > 1)
    expected = 1
    for step, size in sizes:
        if step != expected:
            return False
        expected *= size
    return p.shape[0] < 2 or p.stride(0) == max(p.stride())


def lie_alike(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors of all lists are contiguous, the usual case, found with as few Python steps as there are."""
    return all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists)


def native(p: Tensor) -> bool:
    """Whether the C++ bodies serve a parameter of this kind: built, on the CPU, real, one of four floating types."""
    return built and p.device.type == "cpu" and p.dtype in _TYPES
