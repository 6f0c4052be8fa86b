"""Where normalisation and scaling sit around a residual branch."""

from headway._lazy import attach as _attach

_DEPTH, _PRE_RMS, _MEASURES = "headway.residual.depth", "headway.residual.pre_rms", "headway.residual.depth_measures"
_LONG = "headway.residual.long_skip"
_NAMES = {
    "TransformerBlock": "headway.residual.transformer",
    "TransformerDecoder": "headway.residual.transformer",
    "Placement": "headway.residual.placement",
    "placements": "headway.residual.placements",
    "residual": "headway.residual.placements",
    "PeriLN": "headway.residual.peri_ln",
    "PeriNorm": "headway.residual.peri_ln",
    "convert_checkpoint_names": "headway.residual.peri_ln",
    "MixLN": "headway.residual.mix_ln",
    "angular_distance": _MEASURES,
    "performance_drop": _MEASURES,
    "layer_grad_norms": _MEASURES,
    "PreRMSNorm": _PRE_RMS,
    "NotPreNormError": _PRE_RMS,
    "finalize": _PRE_RMS,
    "verify_equivalence": _PRE_RMS,
    "recentre_linear_": _PRE_RMS,
    "recentre_embedding_": _PRE_RMS,
    "Residual": _DEPTH,
    "ScaleResiduals": _DEPTH,
    "scaled_add": _DEPTH,
    "skip_scales": _LONG,
    "SkipScale": _LONG,
    "SkipGate": _LONG,
    "LongSkips": _LONG,
    "ScaleLong": "headway.residual.scale_long",
    "FoldLongSkips": "headway.residual.scale_long",
    "perturbation_gain": "headway.residual.long_skip_measures",
    "feature_growth": "headway.residual.long_skip_measures",
    "residual_expansion": "headway.residual.expansion",
    "geometric_complexity": "headway.residual.complexity",
    "depth_report": "headway.residual.depth_report",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
