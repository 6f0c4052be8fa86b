"""Methods for tables and for features that another network made, with scikit-learn's interface."""

from headway._lazy import attach as _attach

_NAMES = {
    "LargeStepLogisticRegression": "headway.tabular.large_step",
    "linear_probe": "headway.tabular.large_step",
    "separability": "headway.tabular.separability",
    "SNN": "headway.tabular.self_normalizing",
    "SNNClassifier": "headway.tabular.self_normalizing",
    "SNNRegressor": "headway.tabular.self_normalizing",
    "PFN": "headway.tabular.pfn",
    "BarDistribution": "headway.tabular.pfn",
    "GaussianHead": "headway.tabular.pfn",
    "BernoulliHead": "headway.tabular.pfn",
    "CategoricalHead": "headway.tabular.pfn",
    "GPPrior": "headway.tabular.pfn",
    "GPHyperPrior": "headway.tabular.pfn",
    "BNNPrior": "headway.tabular.pfn",
    "TabularPrior": "headway.tabular.pfn",
    "FunctionPrior": "headway.tabular.pfn",
    "center_encoders_": "headway.tabular.pfn",
    "train_pfn": "headway.tabular.pfn",
    "PFNRegressor": "headway.tabular.pfn",
    "PFNClassifier": "headway.tabular.pfn",
    "PFNSurrogate": "headway.tabular.pfn",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
