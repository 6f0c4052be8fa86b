"""The operations as plain functions, as ``torch.nn.functional`` has them."""

from headway._lazy import attach as _attach

_NAMES = {
    "layer_norm": "headway.kernels.norms",
    "layer_norm_dims": "headway.norms.layer",
    "rms_norm": "headway.kernels.norms",
    "crms_norm": "headway.kernels.norms",
    "add_norm": "headway.kernels.norms",
    "add_rms_norm": "headway.kernels.norms",
    "norm_add_norm": "headway.kernels.norms",
    "group_scaling": "headway.norms.power",
    "unified_norm_eval": "headway.norms.unified",
    "evo_norm_b": "headway.norms.evo",
    "evo_norm_s": "headway.norms.evo",
    "region_norm": "headway.norms.region",
    "group_whitening_penalty": "headway.norms.whitening",
    "group_coloring": "headway.norms.whitening",
    "coloring_factors": "headway.norms.whitening",
    "group_wct": "headway.norms.whitening",
    "exact_group_wct": "headway.norms.whitening",
    "adamp": "headway.optim.functional",
    "sgdp": "headway.optim.functional",
    "normalized_logistic_loss": "headway.optim.normalized_gd",
    "project_radial": "headway.optim.functional",
    "scaled_add": "headway.residual.depth",
    "compand": "headway.weights.compander",
    "selu": "headway.weights.self_normalizing",
    "alpha_dropout": "headway.weights.self_normalizing",
    "feature_alpha_dropout": "headway.weights.self_normalizing",
    "mean_cosine": "headway.signals.statistics",
    "stable_rank": "headway.signals.statistics",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
