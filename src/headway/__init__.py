"""See how signals move through a PyTorch model, change it with a published technique, prove that it helped.

>>> import headway as hw
>>> flow = hw.probe(model, batch)                  # see
>>> model = hw.apply(model, hw.PeriLN())           # change
>>> table = hw.compare("stdlib-text", ["baseline", "peri-ln"])   # prove
"""

from headway._lazy import attach as _attach

__version__ = "0.1.0"

_NAMES = {
    # see
    "probe": "headway.signals.probe",
    "watch": "headway.signals.watch",
    "Monitor": "headway.signals.watch",
    "Flow": "headway.signals.flow",
    "compare_normalizers": "headway.signals.comparison",
    # change
    "apply": "headway.surgery",
    "plan": "headway.surgery",
    "undo": "headway.surgery",
    "history": "headway.surgery",
    "Technique": "headway.surgery",
    "Site": "headway.surgery",
    "Replace": "headway.surgery",
    "NothingToChange": "headway.surgery",
    "load_pretrained": "headway.checkpoints",
    # prove
    "compare": "headway.trials.compare",
    "Comparison": "headway.trials.comparison",
    "claim": "headway.claims.measure",
    "methods": "headway.catalogue",
    "technique": "headway.catalogue",
    # techniques
    "UseOptimizer": "headway.optim.use",
    "PeriLN": "headway.residual.peri_ln",
    "MixLN": "headway.residual.mix_ln",
    "Placement": "headway.residual.placement",
    "PreRMSNorm": "headway.residual.pre_rms",
    "ScaleResiduals": "headway.residual.depth",
    "ScaleLong": "headway.residual.scale_long",
    "LayerNormRecurrent": "headway.norms.recurrent",
    "FoldNorms": "headway.norms.fold",
    "EvoNorm": "headway.norms.evo_convert",
    "NormalizeAndProject": "headway.weights.normalize",
    "CompandWeights": "headway.weights.companding",
    "SelfNormalizing": "headway.weights.self_normalizing",
    "NoProp": "headway.learning.no_prop.stack",
    "BatchNormOnly": "headway.learning.batchnorm_only.technique",
    "StandardiseWeights": "headway.weights.standardising",
    "MicroBatch": "headway.norms.microbatch",
    "AdaB2N": "headway.norms.balancing",
    "RegionNorm": "headway.norms.region_convert",
    "ReplaceAdaIN": "headway.norms.adain",
    # rooms
    "norms": "headway.norms:",
    "optim": "headway.optim:",
    "learning": "headway.learning:",
    "tabular": "headway.tabular:",
    "vision": "headway.vision:",
    "weights": "headway.weights:",
    "residual": "headway.residual:",
    "signals": "headway.signals:",
    "tasks": "headway.tasks:",
    "trials": "headway.trials:",
    "claims": "headway.claims:",
    "anatomy": "headway.anatomy:",
    "functional": "headway.functional:",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
