"""Whether two models compute the same: by how much their outputs differ, and as an edit that refuses a change that made them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.surgery import Edit

# what rounding alone may move the output by, in units of the output's own spread
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def unpacked(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments from a tuple or list, a mapping, or a single argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def output_of(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """The main tensor of a model's output in evaluation mode and without gradients; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return main_tensor(model(*inputs, **named))
    finally:
        for module, training in modes:
            module.training = training


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where only one of the two is a number."""
    if a.shape != b.shape:
        raise ValueError(f"the outputs differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    difference = torch.where(a.isnan() & b.isnan(), 0.0, (a - b).abs()).nan_to_num(float("inf"), float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def verify_equivalence(original: nn.Module, converted: nn.Module, *inputs: Any, **named: Any) -> float:
    """The largest absolute difference between the outputs of two models, both in evaluation mode (put back afterwards).

    Of a structured output the logits are compared, else the last hidden state, else the first tensor.
    """
    return largest_difference(output_of(original, *inputs, **named), output_of(converted, *inputs, **named))


class Verified(Edit):
    """Runs the changed model and compares; it changes nothing itself.

    Args:
        model: still unchanged.
        inputs: see :func:`unpacked`.
        atol: what the outputs may differ by, relative to their standard deviation; by their type (:data:`TOLERANCE`) if None.

    Raises:
        ValueError: when the edit is done, the model cannot be run any more or its output has moved by more than that.
    """

    def __init__(self, model: nn.Module, inputs: Any, atol: float | None = None) -> None:
        self.model, self.inputs, self.name = model, unpacked(inputs), "(output)"
        self.before = self._output()
        finite = self.before[self.before.isfinite()].double()
        spread = finite.std().item() if finite.numel() > 1 else 1.0
        self.atol = (TOLERANCE.get(self.before.dtype, 1e-5) if atol is None else atol) * (spread or 1.0)
        self.max_abs_diff = 0.0

    def _output(self) -> Tensor:
        return output_of(self.model, *self.inputs[0], **self.inputs[1])

    def do(self) -> None:
        try:
            after = self._output()
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"the changed model cannot be run on the example inputs, so the change was taken back: {error}"
            ) from error
        self.max_abs_diff = largest_difference(self.before, after)
        # a model keeps what was done to it: not the batch as well
        self.inputs, self.before = ((), {}), self.before[:0]
        if self.max_abs_diff > self.atol:
            raise ValueError(
                f"the outputs on the example inputs differ by up to {self.max_abs_diff:.2g} after the change, more than "
                f"{self.atol:.2g} allowed (atol is relative to their standard deviation), so the change was taken back"
            )

    def undo(self) -> None:
        pass

    def describe(self) -> tuple[str, str]:
        return "as it was", f"the same within {self.max_abs_diff:.2g} ({self.atol:.2g} allowed)"


def main_tensor(output: Any) -> Tensor:
    """The tensor by which two models are compared: the logits, else the last hidden state, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("logits", "logits_per_image", "last_hidden_state"):
            if isinstance(found := output.get(key), Tensor):
                return found
        output = tuple(output.values())
    for part in output if isinstance(output, tuple | list) else ():
        if isinstance(part, Tensor):
            return part
    raise TypeError("the model's output holds no tensor that could be compared")
