"""Optimisers, with ``torch.optim``'s signatures; and what turns any optimiser into an arm of a comparison."""

from headway._lazy import attach as _attach

_NAMES = {
    "AdamP": "headway.optim.adamp",
    "SGDP": "headway.optim.adamp",
    "NormalizedGD": "headway.optim.normalized_gd",
    "large_step_gd": "headway.optim.normalized_gd",
    "batch_perceptron": "headway.optim.normalized_gd",
    "perceptron": "headway.optim.normalized_gd",
    "effective_step": "headway.optim.effective",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
