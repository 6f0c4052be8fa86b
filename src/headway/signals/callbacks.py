"""The monitor inside other people's training loops: Hugging Face ``Trainer`` and Lightning."""

from __future__ import annotations

import importlib
from typing import Any

from headway.signals.watch import Monitor

HEADLINES = ("explosion", "gradient_ratio")


def trainer_callback(every: int = 50, **settings: Any) -> Any:
    """A ``transformers.TrainerCallback`` that watches the model; ``callback.monitor`` holds the records.

    ``every`` and the other settings are those of :class:`headway.signals.watch.Monitor`. Whenever the trainer logs, the
    newest growth and gradient ratio are added to its log as ``signal/...``. Raises ImportError where transformers is not installed.
    """
    from transformers import TrainerCallback

    class SignalCallback(TrainerCallback):
        def __init__(self) -> None:
            self.monitor: Monitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()
            given = {"optimizer": kwargs.get("optimizer"), **settings}
            self.monitor = Monitor(kwargs["model"], every=every, **given).attach()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs is not None and self.monitor is not None:
                logs.update(_headlines(self.monitor))
                # the trainer has already written its own history when callbacks are asked
                if state.log_history:
                    state.log_history[-1].update(_headlines(self.monitor))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return SignalCallback()


def lightning_callback(every: int = 50, **settings: Any) -> Any:
    """A Lightning ``Callback`` that watches the module it trains; ``callback.monitor`` holds the records.

    ``every`` and the other settings are those of :class:`headway.signals.watch.Monitor`. Raises ImportError where neither
    ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    try:
        base = importlib.import_module("lightning.pytorch").Callback
    except ImportError:
        base = importlib.import_module("pytorch_lightning").Callback

    class SignalCallback(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.monitor: Monitor | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            # the training step may call children of the module without calling the module itself: watch what is called
            model = getattr(pl_module, "model", None)
            self.monitor = Monitor(model if model is not None else pl_module, every=every, **settings).attach()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._close()

        def _close(self) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return SignalCallback()


def _headlines(monitor: Monitor) -> dict[str, float]:
    if not monitor._flows:
        return {}
    law = monitor._flows[-1][1].growth
    return {f"signal/{name}": float(getattr(law, name)) for name in HEADLINES}
