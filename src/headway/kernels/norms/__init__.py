"""Layer norm, RMS norm, residual add fused with either, both norms of a Peri-LN seam, and the norm over feature-map channels.

Layer normalisation: Ba, Kiros, Hinton, 2016 (arXiv 1607.06450). RMS normalisation: Zhang, Sennrich, 2019 (arXiv 1910.07467).
The C++ bodies read a row once from memory and normalise it from the nearest cache; :mod:`.reference` is the truth they are
tested against, :mod:`.cuda` holds the Triton bodies, :mod:`.operators` registers them all, :mod:`.functions` is what is called.
"""

from headway.kernels.norms.functions import (
    add_norm,
    add_rms_norm,
    channel_norm,
    crms_norm,
    layer_norm,
    norm_add_norm,
    rms_norm,
)

__all__ = ["add_norm", "add_rms_norm", "channel_norm", "crms_norm", "layer_norm", "norm_add_norm", "rms_norm"]
