"""Optimisers, with ``torch.optim``'s signatures; and what turns any optimiser into an arm of a comparison."""

from headway._lazy import attach as _attach

_NAMES = {
    "AdamP": "headway.optim.adamp",
    "SGDP": "headway.optim.adamp",
    "effective_step": "headway.optim.effective",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
