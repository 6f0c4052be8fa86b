"""Takes the statistics while a model runs: forward hooks for the signal, tensor hooks on the outputs for its gradient.

The statistics of an output are taken inside the forward hook, before an in-place successor can overwrite it, and the
gradient through ``output.register_hook`` (full backward hooks fail with in-place successors). No activation outlives its
hook. All numbers stay on the device until :meth:`Recorder.rows`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.moments import moments
from headway.signals.calls import Call, Settings, measure
from headway.signals.layout import Layouts, first_tensor
from headway.signals.points import Point
from headway.signals.reading import read, scale_of
from headway.signals.row import Row
from headway.signals.saved import SavedBytes
from headway.signals.statistics import exact
from headway.signals.sync import synchronise
from headway.signals.weights import Weights


@dataclass
class Recorder:
    """Attaches to the points of a model for one pass.

    >>> with Recorder(points, settings) as recorder:
    ...     loss = model(x).sum(); recorder.begin_backward(); loss.backward()
    >>> rows = recorder.rows()
    """

    points: Sequence[Point]
    settings: Settings = field(default_factory=Settings)
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.calls: list[Call] = []
        self._handles: list[Any] = []
        self._layouts = Layouts(self.settings.batch_dim, self.settings.channel_dim)
        self._weights = Weights(self.optimizer)
        self._saved = SavedBytes()
        self._in_backward = False
        self._scale = 1.0
        self._waiting: dict[int, list[Call]] = {}
        self._last: tuple[weakref.ref[Tensor], int, Call] | None = None

    def __enter__(self) -> Recorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def saved_total(self) -> int:
        """Bytes kept for backward so far."""
        return self._saved.total

    def attach(self) -> None:
        """Registers the hooks; on an error none is left."""
        try:
            for point in self.points:
                self._handles.append(point.module.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(point.module.register_forward_hook(self._hook(point), with_kwargs=True))
                for parameter in self._weights.of(point.module) if self.settings.backward else ():
                    if parameter.requires_grad and parameter.is_leaf:
                        keep = parameter.register_post_accumulate_grad_hook(self._weights.on_gradient)
                        self._handles.append(keep)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Removes every hook; raises RuntimeError if one could not be removed."""
        self._saved.stop()
        self._saved.forget_open()
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._last = None
        left = [h for h in handles if (hooks := h.hooks_dict_ref()) is not None and h.id in hooks]
        if left:
            raise RuntimeError(
                f"{len(left)} hooks of the probe could not be removed; rebuild or reload the model before training"
            )

    def count_saved(self, model: nn.Module) -> None:
        """From here on, counts what autograd keeps for backward, until :meth:`begin_backward`."""
        if self.settings.saved and self.settings.backward:
            self._saved.start(model)

    def begin_backward(self) -> None:
        """Modules that run from here on are recomputed by checkpointing; they add gradients, not rows."""
        self._saved.stop()
        # now: a GradScaler may move on before the rows are read
        self._scale = scale_of(self.settings.grad_scale)
        self._in_backward = True
        self._last = None

    def rows(self) -> list[Row]:
        """The rows in order of execution; brings the numbers over from the device."""
        calls = self._confirmed()
        if self.settings.sync:
            synchronise(calls)
        return read(calls, self._weights, self._scale)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._saved.enter(module)

    def _hook(self, point: Point) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            saved = self._saved.leave(module)
            chosen = self.settings.select(point.name, output) if self.settings.select else output
            tensor = first_tensor(chosen)
            if tensor is None or isinstance(tensor, nn.UninitializedParameter):
                return
            with torch.no_grad(), exact(tensor.device):
                call = self._recomputed(point, tensor) if self._in_backward else self._record(point, tensor)
            if call is None:
                return
            if not self._in_backward:
                call.saved = saved
                source = first_tensor(args)
                source = first_tensor(kwargs) if source is None else source
                call.keeps_shape = source is not None and source.shape == tensor.shape
            if tensor.requires_grad and torch.is_grad_enabled() and self.settings.backward:
                tensor.register_hook(call.on_gradient)

        return hook

    def _record(self, point: Point, tensor: Tensor) -> Call:
        last, version = self._last, tensor._version if not tensor.is_inference() else 0
        same = last[2] if last is not None and last[0]() is tensor and last[1] == version else None
        call = measure(point, tensor, self.settings, self._layouts, same)
        self.calls.append(call)
        self._last = (weakref.ref(tensor), version, call)
        if self.settings.backward and not tensor.requires_grad:
            self._waiting.setdefault(id(point.module), []).append(call)
        return call

    def _recomputed(self, point: Point, tensor: Tensor) -> Call | None:
        """The call whose first, gradient-free pass made this very tensor (a reentrant checkpoint runs it again)."""
        waiting = [c for c in self._waiting.get(id(point.module), ()) if c.shape == tuple(tensor.shape)]
        if not waiting:
            return None
        if len(waiting) > 1:
            scalars, _ = moments(tensor, self._layouts.channel(point.module, tensor))
            waiting.sort(key=lambda c: float((c.scalars - scalars).abs().sum()))
        self._waiting[id(point.module)].remove(waiting[0])
        return waiting[0]

    def _confirmed(self) -> list[Call]:
        """Without the tentative blocks whose stack mostly changes the shape of what it is given; what long skips carry stays."""
        tentative = [call for call in self.calls if call.point.tentative]
        if not tentative or sum(call.keeps_shape for call in tentative) * 2 >= len(tentative):
            return self.calls
        for call in tentative:
            if call.point.carried:
                call.point = replace(call.point, kind="skip", tentative=False)
        return [call for call in self.calls if not call.point.tentative]
