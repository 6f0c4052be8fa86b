"""What the weights of a network are made of: projected back to the sphere they began on."""

from headway._lazy import attach as _attach

_NAMES = {
    "NaP": "headway.weights.project",
    "apply_nap": "headway.weights.project",
    "rescaled_lr": "headway.weights.project",
    "NormalizeAndProject": "headway.weights.normalize",
    "normalize_": "headway.weights.normalize",
    "find_scale_invariant": "headway.weights.invariance",
    "followed_by_norm": "headway.weights.invariance",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
