"""The one table of techniques: key, what changes a model, paper, what it takes, and the claim that proves it."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from headway.optim.use import UseOptimizer
from headway.surgery import Replace, Technique
from headway.tasks.names import parse


@dataclass(frozen=True)
class Method:
    """One published system.

    Attributes:
        key: its name on the command line ("peri-ln").
        name: its name for people.
        paper, year, arxiv: where it comes from.
        technique: "module:Class" of what ``apply`` takes, or of an optimiser, or None where the system is a tool.
        takes: what a model must hold for it.
        use: when to reach for it, one line.
        see: "module" whose docstring is its page.
    """

    key: str
    name: str
    paper: str
    year: int
    arxiv: str
    technique: str | None
    takes: str
    use: str
    see: str

    @property
    def claim(self) -> str:
        return self.key.replace("-", "_")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "key": self.key,
            "name": self.name,
            "paper": self.paper,
            "year": self.year,
            "arxiv": self.arxiv,
            "technique": self.technique,
            "takes": self.takes,
            "use": self.use,
        }


_METHODS = [
    Method(
        "beyond-batchnorm",
        "Signal propagation probe",
        "Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning",
        2021,
        "2106.05956",
        None,
        "any nn.Module and one batch",
        "see where samples collapse, activations explode or gradients vanish, before a long run",
        "headway.signals.probe",
    ),
    Method(
        "layer-norm",
        "Layer normalisation and layer-normalised recurrent nets",
        "Layer Normalization",
        2016,
        "1607.06450",
        "headway.norms.recurrent:LayerNormRecurrent",
        "nn.LSTM, nn.GRU, nn.RNN",
        "train recurrent nets faster and at any batch size; LayerNorm over any axes",
        "headway.norms.recurrent",
    ),
    Method(
        "unified-norm",
        "Unified Normalization",
        "Unified Normalization for Accelerating and Stabilizing Transformers",
        2022,
        "2208.01313",
        "headway.norms.unified:UnifiedNorm",
        "nn.LayerNorm over the last axis",
        "train a Pre-LN transformer whose norms fold away at inference",
        "headway.norms.unified",
    ),
    Method(
        "power-norm",
        "PowerNorm",
        "PowerNorm: Rethinking Batch Normalization in Transformers",
        2020,
        "2003.07845",
        "headway.norms.power:PowerNorm",
        "nn.LayerNorm over the last axis",
        "batch statistics that survive transformer training, fixed at inference",
        "headway.norms.power",
    ),
    Method(
        "pre-rms-norm",
        "Pre-RMSNorm and Pre-CRMSNorm",
        "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
        2023,
        "2305.14858",
        "headway.residual.pre_rms:PreRMSNorm",
        "a Pre-LN transformer",
        "the cheaper RMSNorm in a trained Pre-LN model without changing a prediction",
        "headway.residual.pre_rms",
    ),
    Method(
        "peri-ln",
        "Peri-LN",
        "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
        2025,
        "2502.02732",
        "headway.residual.peri_ln:PeriLN",
        "a transformer of a known family",
        "hidden states that grow with depth, overflow in half precision, or break at high rates",
        "headway.residual.peri_ln",
    ),
    Method(
        "mix-ln",
        "Mix-LN",
        "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN",
        2024,
        "2412.13795",
        "headway.residual.mix_ln:MixLN",
        "a transformer of a known family",
        "deep Pre-LN layers that do next to nothing",
        "headway.residual.mix_ln",
    ),
    Method(
        "residual-depth",
        "Residual branch scaling and expansion",
        "On residual network depth",
        2025,
        "2510.03470",
        "headway.residual.depth:ScaleResiduals",
        "a residual network",
        "train very deep residual nets without normalisation, and see which orders of paths matter",
        "headway.residual.depth",
    ),
    Method(
        "scale-long",
        "ScaleLong: scaled long skips",
        "ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection",
        2023,
        "2310.13545",
        "headway.residual.scale_long:ScaleLong",
        "a UNet-shaped network: diffusers, U-ViT, or any that torch.fx can trace",
        "train a deep UNet, or one at a high rate or with large batches, more steadily",
        "headway.residual.long_skip",
    ),
    Method(
        "adam-p",
        "AdamP and SGDP",
        "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
        2021,
        "2006.08217",
        "headway.optim.adamp:AdamP",
        "any parameters, in place of AdamW or SGD",
        "keep the effective step of networks with normalisation from dying as weights grow",
        "headway.optim.adamp",
    ),
    Method(
        "large-step-gd",
        "Large-step logistic regression",
        "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes",
        2024,
        "2412.08424",
        None,
        "a table of features with class labels, or a frozen encoder",
        "separate (nearly) separable classes in few passes without tuning a rate; a linear probe in one call",
        "headway.optim.normalized_gd",
    ),
    Method(
        "normalize-and-project",
        "Normalize-and-Project (NaP)",
        "Normalization and effective learning rates in reinforcement learning",
        2024,
        "2407.01800",
        "headway.weights.normalize:NormalizeAndProject",
        "linear maps or convolutions before a nonlinearity or a norm, and the optimiser",
        "long or changing training that loses the ability to learn because weights grow",
        "headway.weights.project",
    ),
    Method(
        "self-normalizing",
        "Self-normalizing networks",
        "Self-Normalizing Neural Networks",
        2017,
        "1706.02515",
        "headway.weights.self_normalizing:SelfNormalizing",
        "a feed-forward net with activation modules",
        "deep fully connected nets on tables without normalisation, at any batch size",
        "headway.weights.self_normalizing",
    ),
    Method(
        "weight-compander",
        "Weight compander",
        "Weight Compander: A Simple Weight Reparameterization for Regularization",
        2023,
        "2306.16993",
        "headway.weights.companding:CompandWeights",
        "weights of linear layers, convolutions, attention",
        "small or noisy data: spread the decision over more weights, beside other regularisers",
        "headway.weights.compander",
    ),
    Method(
        "no-prop",
        "NoProp",
        "NoProp: Training Neural Networks without Back-propagation or Forward-propagation",
        2025,
        "2503.24322",
        "headway.learning.no_prop.stack:NoProp",
        "a stack of blocks (headway.learning.BackpropStack), or an encoder to copy into one",
        "train the blocks of a classifier apart from each other, with the memory of one block",
        "headway.learning.no_prop",
    ),
    Method(
        "cema",
        "CEMA: cloud-edge elastic model adaptation",
        "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy Distillation",
        2024,
        "2402.17316",
        None,
        "a classifier with affine norms on devices, and a stronger one for the same classes on a server",
        "keep devices that only infer fit for data that drift, from few unlabelled samples, over HTTP",
        "headway.learning.cloud_edge",
    ),
    Method(
        "pfn",
        "Prior-data fitted networks (PFN)",
        "Transformers Can Do Bayesian Inference",
        2022,
        "2112.10510",
        None,
        "a prior over data sets that can be sampled; then small tables of numbers",
        "calibrated regression or classification on many small data sets, in one forward pass each",
        "headway.tabular.pfn",
    ),
    Method(
        "batch-channel-norm",
        "Batch-Channel Normalization and Weight Standardization",
        "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        2019,
        "1903.10520",
        "headway.norms.microbatch:MicroBatch",
        "nn.BatchNorm2d, and convolutions in front of norms",
        "train convolutional nets with one to four images a step",
        "headway.norms.batch_channel",
    ),
    Method(
        "ada-b2n",
        "AdaB2N: task-balanced batch norm",
        "Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation",
        2023,
        "2310.08855",
        "headway.norms.balancing:AdaB2N",
        "nn.BatchNorm1d, 2d or 3d, and the task of every training sample",
        "learn tasks one after another with replay, without the statistics of the newest one taking over",
        "headway.norms.balanced",
    ),
    Method(
        "evo-norm",
        "EvoNorm",
        "Evolving Normalization-Activation Layers",
        2020,
        "2004.02967",
        "headway.norms.evo_convert:EvoNorm",
        "batch or group norms of a convolutional net, with the activation after them",
        "one layer for norm and activation in convolutional nets: small batches, or half the memory of batch norm",
        "headway.norms.evo",
    ),
    Method(
        "region-norm",
        "Region Normalization",
        "Region Normalization for Image Inpainting",
        2020,
        "1911.10375",
        "headway.norms.region_convert:RegionNorm",
        "nn.InstanceNorm2d or nn.BatchNorm2d in the early and late parts of a network, and a mask",
        "networks whose input has known invalid pixels: inpainting, sensor dropouts, tiles without data",
        "headway.norms.region",
    ),
    Method(
        "batchnorm-only",
        "Training only BatchNorm",
        "Training BatchNorm and Only BatchNorm: On the Expressive Power of Random Features in CNNs",
        2020,
        "2003.00152",
        "headway.learning.batchnorm_only.technique:BatchNormOnly",
        "any network with affine norms",
        "fine-tune with half a percent of the parameters: many tasks on one frozen network, half the memory of training",
        "headway.learning.batchnorm_only",
    ),
    Method(
        "gdwct",
        "Group-wise whitening and colouring (GDWCT)",
        "Image-to-Image Translation via Group-wise Deep Whitening-and-Coloring Transformation",
        2019,
        "1812.09912",
        "headway.norms.adain:ReplaceAdaIN",
        "AdaIN modules: an instance norm and linear layers, called with content and style",
        "style transfer and translation by exemplar where correlations between channels carry the style",
        "headway.norms.whitening",
    ),
]
_BY_KEY = {method.key: method for method in _METHODS}


def methods() -> list[Method]:
    """Every technique and tool of the catalogue."""
    return list(_METHODS)


def method(key: str) -> Method:
    """The catalogue's row for ``key``; ValueError with the nearest names for an unknown one."""
    if key in _BY_KEY:
        return _BY_KEY[key]
    near = difflib.get_close_matches(key, _BY_KEY, n=3, cutoff=0.4) or sorted(_BY_KEY)
    raise ValueError(f"there is no method {key!r}; did you mean {' or '.join(near)}? `headway methods` lists them all")


def technique(key: str, **settings: Any) -> Technique:
    """The technique behind a catalogue key, with settings: ``technique("peri-ln", eps=1e-5)``.

    The key may carry its settings itself: ``technique("mix-ln(alpha=0.5)")``.

    Raises:
        ValueError: unknown key, a system that is a tool and changes nothing, or settings that are no Python literals.
        TypeError: a setting the technique does not have.
    """
    key, written = parse(key)
    row = method(key)
    if row.technique is None:
        raise ValueError(f"{key} is a tool and changes no model; see `headway show {key}`")
    module, _, name = row.technique.partition(":")
    kind = getattr(importlib.import_module(module), name)
    settings = {**written, **settings}
    if issubclass(kind, Optimizer):
        return UseOptimizer(kind, **settings)
    if not issubclass(kind, Technique):
        return Replace(kind, **settings)
    accepted = inspect.signature(kind).parameters
    if unknown := sorted(settings.keys() - accepted.keys()):
        raise TypeError(f"{key} has no setting {', '.join(unknown)}; it takes {', '.join(accepted)}")
    return kind(**settings)
