"""Networks for images, built from the techniques."""

from headway._lazy import attach as _attach

_NAMES = {
    "InpaintingNet": "headway.vision.inpainting",
    "inpaint": "headway.vision.inpainting",
    "irregular_masks": "headway.vision.masks",
    "rectangular_masks": "headway.vision.masks",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
