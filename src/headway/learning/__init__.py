"""Rules of learning other than plain back-propagation."""

from headway._lazy import attach as _attach

_BN = "headway.learning.batchnorm_only"
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
    "BatchNormOnly": f"{_BN}.technique",
    "OutputOnly": f"{_BN}.technique",
    "RandomParametersOnly": f"{_BN}.technique",
    "NormOnly": f"{_BN}.trained",
    "RandomControl": f"{_BN}.trained",
    "train_only_norm": f"{_BN}.trained",
    "random_parameter_control": f"{_BN}.trained",
    "norm_state_dict": f"{_BN}.task_files",
    "load_norm_state_dict": f"{_BN}.task_files",
    "save_norms": f"{_BN}.task_files",
    "load_norms": f"{_BN}.task_files",
    "NormBank": f"{_BN}.bank",
    "GammaReport": f"{_BN}.gammas",
    "gamma_report": f"{_BN}.gammas",
    "without_disabled": f"{_BN}.gammas",
    "PruneDisabled": f"{_BN}.prune",
    "prune_disabled": f"{_BN}.prune",
    "CIFARResNet": f"{_BN}.resnets",
    "RandomFeatureCNNClassifier": f"{_BN}.classifier",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
