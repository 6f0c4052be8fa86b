"""Bayesian prediction in one forward pass: a set transformer trained on data sets drawn from a prior.

"Transformers Can Do Bayesian Inference" (Mueller et al., 2022, arXiv 2112.10510). A prior p(D) that can only be SAMPLED is enough:

    draw N = n + m pairs, context D = the first n;   loss = mean of -log q_theta(y_q | x_q, D)

The expected loss is KL(posterior predictive, q) plus a constant, so that a lower loss is a better posterior and nothing can be
overfitted. Context rows attend to the context; a query attends to the context and to itself, never to another query. The answer for a
number is a histogram with half-normal tails (:class:`BarDistribution`), whose mean, quantiles and expected improvement are exact.

    head = hw.tabular.BarDistribution.from_samples(y_of_the_prior, 100)
    model = hw.tabular.PFN(1, head, width=96, layers=4)
    prior = hw.tabular.GPPrior()
    hw.tabular.train_pfn(hw.tabular.center_encoders_(model, prior), prior, steps=2500, seq_len=25, queries=24, lr=3e-3)
    mean, std = hw.tabular.PFNRegressor(model).fit(X, y).predict(X_new, return_std=True)

Reach for it where one prior serves many small problems (Bayesian optimisation, calibrated regression, small tables), or where the prior
has no density that MCMC could use. Not for large n, not for data unlike the prior (it degrades in silence), not for a single problem:
training takes minutes to days, and pays back only after (training time) / (time saved per data set) problems.
"""

from headway._lazy import attach as _attach

_NAMES = {
    "PFN": "headway.tabular.pfn.network",
    "Context": "headway.tabular.pfn.network",
    "BarDistribution": "headway.tabular.pfn.bars",
    "Predictive": "headway.tabular.pfn.heads",
    "GaussianHead": "headway.tabular.pfn.heads",
    "BernoulliHead": "headway.tabular.pfn.heads",
    "CategoricalHead": "headway.tabular.pfn.heads",
    "GPPrior": "headway.tabular.pfn.priors",
    "GPHyperPrior": "headway.tabular.pfn.priors",
    "BNNPrior": "headway.tabular.pfn.networks_prior",
    "TabularPrior": "headway.tabular.pfn.networks_prior",
    "FunctionPrior": "headway.tabular.pfn.priors",
    "center_encoders_": "headway.tabular.pfn.training",
    "train_pfn": "headway.tabular.pfn.training",
    "PFNRegressor": "headway.tabular.pfn.estimators",
    "PFNClassifier": "headway.tabular.pfn.estimators",
    "PFNSurrogate": "headway.tabular.pfn.surrogate",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
