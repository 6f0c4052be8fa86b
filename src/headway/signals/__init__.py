"""See: what every layer does to the signal and to its gradient."""

from headway._lazy import attach as _attach

_NAMES = {
    "probe": "headway.signals.probe",
    "watch": "headway.signals.watch",
    "Monitor": "headway.signals.watch",
    "Flow": "headway.signals.flow",
    "compare_normalizers": "headway.signals.comparison",
    "mean_cosine": "headway.signals.statistics",
    "stable_rank": "headway.signals.statistics",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
