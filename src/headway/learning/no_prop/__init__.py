"""Blocks that learn on their own: each turns a noised label and the input into the clean label, and no gradient crosses blocks.

The label of a sample is a vector u_y = W[y], hidden under noise at levels abar_0 < ... < abar_T (0 is all noise, 1 the label):

    z_t ~ N(sqrt(abar_t) u_y, (1 - abar_t) I)                        in training, drawn at once for any t, without any block
    loss_t = CE(head(z_T), y) + KL(q(z_0 | y) || N(0, I)) + (T/2) eta (SNR(t) - SNR(t-1)) ||u_t(z_{t-1}, x) - u_y||^2
    z_t = a_t u_t(z_{t-1}, x) + b_t z_{t-1} + sqrt(c_t) noise        at prediction, from z_0 ~ N(0, I) through all blocks

SNR = abar / (1 - abar), u_t = softmax(block_t(z, x)) W. NoPropDT has T blocks; NoPropCT one network of continuous time with a
learned schedule of noise; NoPropFM learns the straight flow from noise to the label. Training a block keeps the activations of that
block alone, so memory does not grow with T, and blocks can be trained in different processes or at different times. Inside a block
ordinary autograd is used: it is "no gradients between blocks", not "no gradients".

"NoProp: Training Neural Networks without Back-propagation or Forward-propagation", 2025, arXiv 2503.24322. Reach for it where the
memory of a deep stack's activations is the limit, where blocks live on different workers, or to study local learning. Not where
back-propagation fits: it is no more accurate, every block needs an encoder of the raw input, and prediction is stochastic.
"""

from headway._lazy import attach as _attach

_NAMES = {
    "NoProp": "headway.learning.no_prop.stack",
    "BackpropStack": "headway.learning.no_prop.stack",
    "NoPropDT": "headway.learning.no_prop.discrete",
    "NoPropCT": "headway.learning.no_prop.continuous",
    "NoPropFM": "headway.learning.no_prop.continuous",
    "CosineSchedule": "headway.learning.no_prop.schedules",
    "LearnedSchedule": "headway.learning.no_prop.schedules",
    "ConditionalBlock": "headway.learning.no_prop.blocks",
    "conv_encoder": "headway.learning.no_prop.blocks",
    "dense_encoder": "headway.learning.no_prop.blocks",
    "noprop_from": "headway.learning.no_prop.blocks",
    "fit_noprop": "headway.learning.no_prop.fit",
    "NoPropClassifier": "headway.learning.no_prop.classifier",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
