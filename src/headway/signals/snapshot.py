"""The part of a model's state that one pass moves, and how to put it back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import nn


class Snapshot:
    """Buffers, gradients and training modes of a model, and the states of the random generators (torch, Python, NumPy)."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, key, buffer, buffer.detach().clone())
            for module in model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and not isinstance(buffer, nn.UninitializedBuffer) and not buffer.is_inference()
        ]
        self._gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        for parameter, _ in self._gradients:
            parameter.grad = None
        devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type == "cuda"}
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Puts everything back."""
        for module, training in self._modes:
            module.training = training
        with torch.no_grad():
            for module, key, buffer, value in self._buffers:
                # native batch norm moves its running statistics without counting a version
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                module._buffers[key] = buffer
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        torch.set_rng_state(self._torch)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
