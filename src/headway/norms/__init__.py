"""Layers that normalise activations. Each can stand in for the layer it improves on: ``hw.apply(model, hw.norms.LayerNorm)``."""

from headway._lazy import attach as _attach

_RECURRENT = "headway.norms.recurrent"
_NAMES = {
    "LayerNorm": "headway.norms.layer",
    "RMSNorm": "headway.norms.rms",
    "CRMSNorm": "headway.norms.rms",
    "UnifiedNorm": "headway.norms.unified",
    "PowerNorm": "headway.norms.power",
    "GroupScaling": "headway.norms.power",
    "ChannelAffine": "headway.norms.fold",
    "FoldNorms": "headway.norms.fold",
    "LayerNormLSTM": _RECURRENT,
    "LayerNormGRU": _RECURRENT,
    "LayerNormRNN": _RECURRENT,
    "LayerNormLSTMCell": _RECURRENT,
    "LayerNormGRUCell": _RECURRENT,
    "LayerNormRNNCell": _RECURRENT,
    "LayerNormRecurrent": _RECURRENT,
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
