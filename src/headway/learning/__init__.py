"""Rules of learning other than plain back-propagation."""

from headway._lazy import attach as _attach

_NAMES = {
    "NoProp": "headway.learning.no_prop.stack",
    "NoPropDT": "headway.learning.no_prop.discrete",
    "NoPropCT": "headway.learning.no_prop.continuous",
    "NoPropFM": "headway.learning.no_prop.continuous",
    "BackpropStack": "headway.learning.no_prop.stack",
    "CosineSchedule": "headway.learning.no_prop.schedules",
    "LearnedSchedule": "headway.learning.no_prop.schedules",
    "ConditionalBlock": "headway.learning.no_prop.blocks",
    "conv_encoder": "headway.learning.no_prop.blocks",
    "dense_encoder": "headway.learning.no_prop.blocks",
    "noprop_from": "headway.learning.no_prop.blocks",
    "fit_noprop": "headway.learning.no_prop.fit",
    "NoPropClassifier": "headway.learning.no_prop.classifier",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
