"""Prove: the same task, the same seeds, several arms, side by side."""

from headway._lazy import attach as _attach

_NAMES = {
    "compare": "headway.trials.compare",
    "Comparison": "headway.trials.comparison",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
