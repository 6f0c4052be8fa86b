"""Trains the gains and shifts of normalisation layers and nothing else: half a percent of a network, the rest stays random.

    y_c = gamma_c * (x_c - m_c) / sqrt(v_c + eps) + beta_c        gamma, beta train; every other weight is at rest

Each gain chooses among random features, each shift decides where they switch on: a deep random network trained like this reaches
several times the accuracy of as many random weights. A trained task is a file of gains, shifts and running statistics, so several tasks
share one network:

    model = hw.apply(model, hw.BatchNormOnly(), optimizer=optimizer)
    save_norms(model, "task-a.safetensors")                            # NormBank(model) keeps several at hand

Gradients cross the resting layers, but of their weights none is computed: a convolution at rest keeps no input, a batch norm and the
ReLU module behind it run as one, and any other ReLU module keeps one bit an entry, so that about half of what training keeps is left.
``hw.learning.RandomParametersOnly`` and ``OutputOnly`` are what it is held against. Paper: "Training BatchNorm and Only BatchNorm: On
the Expressive Power of Random Features in CNNs" (Frankle, Schwab, Morcos, 2020), arXiv 2003.00152.

Reach for it to fine-tune with a task of a few kilobytes, to keep many tasks on one network, as a baseline of what random features can
do, or to compare architectures. It does not reach full training, narrow or shallow networks do badly, and without affine norms there is
nothing to train. A ReLU called as a function (``F.relu``) keeps its output; so does one under ``torch.compile``, and batch norms run as
torch's there.
"""

from headway._lazy import attach as _attach

_HOME = "headway.learning.batchnorm_only"
_NAMES = {
    "BatchNormOnly": f"{_HOME}.technique",
    "OutputOnly": f"{_HOME}.technique",
    "RandomParametersOnly": f"{_HOME}.technique",
    "NormOnly": f"{_HOME}.trained",
    "RandomControl": f"{_HOME}.trained",
    "train_only_norm": f"{_HOME}.trained",
    "random_parameter_control": f"{_HOME}.trained",
    "norm_state_dict": f"{_HOME}.task_files",
    "load_norm_state_dict": f"{_HOME}.task_files",
    "save_norms": f"{_HOME}.task_files",
    "load_norms": f"{_HOME}.task_files",
    "NormBank": f"{_HOME}.bank",
    "GammaReport": f"{_HOME}.gammas",
    "gamma_report": f"{_HOME}.gammas",
    "without_disabled": f"{_HOME}.gammas",
    "PruneDisabled": f"{_HOME}.prune",
    "prune_disabled": f"{_HOME}.prune",
    "CIFARResNet": f"{_HOME}.resnets",
    "RandomFeatureCNNClassifier": f"{_HOME}.classifier",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
