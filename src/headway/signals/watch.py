"""Watches a model while it trains: every so many steps the probe's statistics of that very step, at no cost in between.

    with hw.watch(model, every=50) as log:
        for batch in loader:
            loss = ...; loss.backward(); optimizer.step()
    print(log)                      # one line a watched step
    log.save("watch.html")

One hook on the model counts its forward passes; hooks on the layers exist during a watched step only. The training itself is
untouched: same outputs, losses and gradients, bit for bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headway.signals.calls import Settings
from headway.signals.findings import findings
from headway.signals.flow import Flow, aligned
from headway.signals.growth import growth
from headway.signals.hooks import Recorder
from headway.signals.long_skips import long_skips
from headway.signals.points import KINDS, Layers, anatomy_of, find, unwrapped
from headway.signals.probe import is_compiled, traits

if TYPE_CHECKING:
    import plotly.graph_objects


class Monitor:
    """Keeps the flows of the last watched steps of a training run.

    Args:
        model: the model that is trained.
        every: watch the first of every so many training steps (forward passes in training mode with gradients on).
        keep: how many flows to keep; older ones are dropped.
        layers, kinds, max_samples, max_features, centered, batch_dim, channel_dim, select: as in ``probe``.
        optimizer: for effective learning rates.
        grad_scale: a number or the GradScaler in use; gradients are divided by it.
        saved: count the bytes kept for backward.
        collapse_at: mean cosine above which samples count as collapsed.

    Attributes:
        records: (step, :class:`Flow`) of the watched steps, oldest first.
        step: how many training steps have been seen.

    Raises:
        ValueError: ``every`` or ``keep`` below 1, or a ``layers`` filter without a match.
        TypeError: the model is compiled (watch the plain model and compile it after, or probe it between steps).
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        keep: int = 200,
        layers: Layers | None = None,
        kinds: Sequence[str] = KINDS,
        max_samples: int = 64,
        max_features: int = 65536,
        centered: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        grad_scale: Any = None,
        batch_dim: Any = 0,
        channel_dim: int | None = None,
        select: Any = None,
        saved: bool = True,
        collapse_at: float = 0.95,
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep count steps and must be at least 1, not {every} and {keep}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"a torch.nn.Module was expected, not {type(model).__name__}")
        if is_compiled(model):
            raise TypeError("the model is compiled, and compiled code runs no hooks; watch a run of the plain model")
        self.model, self.every, self.step = model, every, 0
        core = unwrapped(model)
        anatomy, skips = anatomy_of(core), long_skips(core)
        self._points = find(core, layers, kinds, anatomy, skips)
        self._settings = Settings(
            max_samples,
            max_features,
            centered,
            batch_dim=batch_dim,
            channel_dim=channel_dim,
            select=select,
            grad_scale=grad_scale,
            saved=saved,
        )
        self._optimizer, self._collapse_at = optimizer, collapse_at
        self._traits = traits(core, anatomy, skips)
        self._flows: deque[tuple[int, Flow]] = deque(maxlen=keep)
        self._root: list[Any] = []
        self._recorder: Recorder | None = None
        self._recorded_step = 0

    def attach(self) -> Monitor:
        """Starts counting steps. Attaching twice is the same as once."""
        if not self._root:
            self._root = [
                self.model.register_forward_pre_hook(self._before, prepend=True),
                self.model.register_forward_hook(self._after, always_call=True),
            ]
        return self

    def close(self) -> None:
        """Takes in what is still open and removes every hook."""
        for handle in self._root:
            handle.remove()
        self._root = []
        self._take_in()

    def __enter__(self) -> Monitor:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _before(self, module: nn.Module, args: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if self._recorder is not None:
            self._take_in()
        due = self.step % self.every == 0
        self.step += 1
        if due:
            self._recorded_step = self.step - 1
            self._recorder = Recorder(self._points, self._settings, self._optimizer)
            self._recorder.attach()
            self._recorder.count_saved(self.model)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recorder is not None:
            self._recorder.begin_backward()

    def _take_in(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        recorder.detach()
        rows = recorder.rows()
        law = growth(rows, self._collapse_at)
        found = findings(rows, law, self._traits, self._collapse_at, recorder.saved_total)
        flow = Flow(rows, law, found, objective="the training loss", saved_bytes=recorder.saved_total)
        flow.model = type(unwrapped(self.model)).__name__
        self._flows.append((self._recorded_step, flow))

    @property
    def records(self) -> list[tuple[int, Flow]]:
        """(step, flow) of every watched step that is kept. Reading it ends the watch of a step still under way."""
        if self._recorder is not None:
            self._take_in()
        return list(self._flows)

    @property
    def last(self) -> Flow:
        """The newest flow; IndexError if none was recorded yet."""
        records = self.records
        if not records:
            raise IndexError("no step was watched yet; run a training step with the monitor attached")
        return records[-1][1]

    def history(self, name: str, column: str = "rms") -> list[tuple[int, float]]:
        """(step, value) of one column of one row over the watched steps; KeyError for a row of no such name."""
        return [(step, getattr(flow[name], column)) for step, flow in self.records]

    def table(self) -> str:
        """One line a watched step: growth, gradient ratio, likeness of the last row, and the worst finding."""
        lines = [["step", "rows", "growth", "explosion", "grad first/last", "cos last", "worst finding"]]
        for step, flow in self.records:
            law = flow.growth
            series = flow.of(law.kind)
            worst = flow.findings[0] if flow.findings else None
            values = [law.explosion, law.gradient_ratio, series[-1].cos if series else math.nan]
            words = f"{worst.severity}: {worst.problem}" if worst else "-"
            lines.append([str(step), str(len(flow)), law.law, *(f"{value:.3g}" for value in values), words])
        return aligned(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON."""
        return {
            "every": self.every,
            "steps": self.step,
            "records": [{"step": s, **flow.to_dict()} for s, flow in self.records],
        }

    def plot(self) -> plotly.graph_objects.Figure:
        """Signal, gradient and likeness of every layer over the steps, as heat maps."""
        from headway.signals.plot import history_figure

        return history_figure(self.records)

    def save(self, path: str | Path) -> Path:
        """Writes one self-contained HTML page and returns its path."""
        from headway.signals.page import write_history

        return write_history(self.records, path)


def watch(model: nn.Module, every: int = 50, **settings: Any) -> Monitor:
    """Watches a model while it trains; see :class:`Monitor` for the settings.

    >>> with hw.watch(model, every=50) as log:
    ...     train()
    >>> print(log)
    """
    return Monitor(model, every=every, **settings)
