"""What every layer with running statistics needs: they stay in full precision, and they can be held still for a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headway.kernels.planes import together


class RunningStatistics(nn.Module):
    """A module whose floating point buffers stay float32 or wider and whose training passes can be told to move none of them.

    ``sync``: whether the statistics are those of all processes of the default group. ``exact``: buffers that keep their type whatever
    the module is cast to.
    """

    sync: bool = False
    exact: ClassVar[tuple[str, ...]] = ()
    _frozen: int = 0

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():  # model.half() leaves the statistics in float32
            new = self._buffers[name]
            if old is None or new is None or not new.is_floating_point() or new.dtype == old.dtype:
                continue
            if new.dtype.itemsize < 4 or name in self.exact:
                self._buffers[name] = old.to(new.device)
        return self

    @contextmanager
    def freeze_statistics(self) -> Iterator[None]:
        """Within it, a training pass computes what it would compute anyhow but moves no statistic, neither does its backward.

        With gradient checkpointing, freeze the first of the two passes, so that both start from the same state and the second
        one alone moves it: ``checkpoint(..., context_fn=lambda: (norm.freeze_statistics(), nullcontext()))``.
        """
        self._frozen += 1
        try:
            yield
        finally:
            self._frozen -= 1

    def _together(self) -> bool:
        """Whether this pass shares its sums with other processes; a single process needs no process group."""
        return together(self.sync)


def by_running_statistics(x: Tensor, norm: _BatchNorm) -> Tensor:
    """Batch norm's evaluation; parameters in half precision are taken in the type of the statistics."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    weight, bias = (p if p is None or p.dtype == mean.dtype else p.to(mean.dtype) for p in (norm.weight, norm.bias))
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)
