"""Edge devices that only infer, and a server that keeps their normalisation layers fit for data that drift.

    edge:   logits = g_w(x); upload x if E_min < H(x) < E_max(t)  (selection)
    cloud:  f <- f - step on mean_i exp(E_max(0) - H_i) H_i, affine parameters of its norms alone
            w <- w - step on the distillation of f into g_w, on the uploaded samples and three times as many earlier ones, affine
            parameters alone  (distillation)
    edge:   takes the new affine parameters and running statistics between two batches  (renorm)

The device never computes a gradient, never waits for the network and goes on with its last good parameters whatever becomes of the
server. "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy Distillation", 2024, arXiv 2402.17316.
Reach for it where devices cannot back-propagate, the uplink is scarce, labels never come and a stronger model runs on a server. Not
where raw samples may not leave the device (they are sent as they are), not for nets without affine normalisation, and not where
refreshing batch norm's statistics on the device is already enough: measure that first.

    python -m headway.learning.cloud_edge.server --edge pkg.models:edge --foundation pkg.models:foundation --port 8008

    client = EdgeClient(edge(), "http://127.0.0.1:8008")
    logits = client(x)

``--processes 4`` (``CloudServer(..., processes=4)``) shares each batch among four processes that do the step together.
"""

from headway._lazy import attach as _attach

_NAMES = {
    "EdgeClient": "headway.learning.cloud_edge.client",
    "CloudServer": "headway.learning.cloud_edge.cloud",
    "HTTPFrontEnd": "headway.learning.cloud_edge.server",
    "asgi_app": "headway.learning.cloud_edge.server",
    "simulate": "headway.learning.cloud_edge.simulation",
    "Simulation": "headway.learning.cloud_edge.simulation",
    "Settings": "headway.learning.cloud_edge.settings",
    "EntropyThreshold": "headway.learning.cloud_edge.selection",
    "RedundancyFilter": "headway.learning.cloud_edge.selection",
    "RandomSelection": "headway.learning.cloud_edge.selection",
    "select_samples": "headway.learning.cloud_edge.selection",
    "SelectiveEntropyDistillation": "headway.learning.cloud_edge.distillation",
    "BatchRenorm": "headway.learning.cloud_edge.renorm",
    "affine_parameters": "headway.learning.cloud_edge.affine",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
