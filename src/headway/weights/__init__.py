"""What the weights of a network are made of: initialised to keep the signal, companded, standardised where they are used,
projected back to where they began."""

from headway._lazy import attach as _attach

_SELF, _CHECK, _MAP = (
    "headway.weights.self_normalizing",
    "headway.weights.self_normalizing_check",
    "headway.weights.selu_moments",
)
_COMPANDER, _COMPANDING = "headway.weights.compander", "headway.weights.companding"
_STANDARDISED, _STANDARDISING = "headway.weights.standardised", "headway.weights.standardising"
_NAMES = {
    "NaP": "headway.weights.project",
    "apply_nap": "headway.weights.project",
    "rescaled_lr": "headway.weights.project",
    "NormalizeAndProject": "headway.weights.normalize",
    "normalize_": "headway.weights.normalize",
    "find_scale_invariant": "headway.weights.invariance",
    "followed_by_norm": "headway.weights.invariance",
    "SelfNormalizing": _SELF,
    "SELU": _SELF,
    "AlphaDropout": _SELF,
    "FeatureAlphaDropout": _SELF,
    "lecun_normal_": "headway.weights.lecun",
    "self_normalizing_init_": "headway.weights.lecun",
    "selu_params": _MAP,
    "moment_map": _MAP,
    "jacobian": _MAP,
    "iterate": _MAP,
    "check_self_normalizing": _CHECK,
    "SelfNormalizingReport": _CHECK,
    "CompandWeights": _COMPANDING,
    "WeightCompander": _COMPANDER,
    "weight_compander": _COMPANDER,
    "remove_weight_compander": _COMPANDER,
    "param_groups": _COMPANDING,
    "weight_penalty": _COMPANDING,
    "clip_latent_": _COMPANDING,
    "fuse": _COMPANDING,
    "export_plain": _COMPANDING,
    "histogram_report": _COMPANDING,
    "StandardiseWeights": _STANDARDISING,
    "WSConv1d": _STANDARDISED,
    "WSConv2d": _STANDARDISED,
    "WSConv3d": _STANDARDISED,
    "WSConvTranspose2d": _STANDARDISED,
    "weight_standardization": _STANDARDISED,
    "standardize_convs": _STANDARDISING,
    "fold_weight_standardization": _STANDARDISING,
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
