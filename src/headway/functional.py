"""The operations as plain functions, as ``torch.nn.functional`` has them."""

from headway._lazy import attach as _attach

_NAMES = {
    "layer_norm": "headway.kernels.layer_norm",
    "layer_norm_dims": "headway.norms.layer",
    "rms_norm": "headway.kernels.rms_norm",
    "crms_norm": "headway.kernels.rms_norm",
    "add_norm": "headway.kernels.add_norm",
    "add_rms_norm": "headway.kernels.add_norm",
    "norm_add_norm": "headway.kernels.norm_add_norm",
    "unified_norm_eval": "headway.norms.unified",
    "group_scaling": "headway.norms.power",
    "scaled_add": "headway.residual.depth",
    "mean_cosine": "headway.signals.statistics",
    "stable_rank": "headway.signals.statistics",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
