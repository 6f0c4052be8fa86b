"""Matrix products by the fastest library there is on this machine.

For float32 on a CPU that is oneDNN, which PyTorch takes for half precision but not for float32 by default; on processors that
are not Intel's it takes half the time of the default. For use inside the bodies of operators: there is no derivative here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: (rows, inner) and (outputs, inner) -> (rows, outputs)."""
    if has_onednn(x) and x.numel() and weight.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b``, the sum of outer products: (rows, n) and (rows, m) -> (n, m)."""
    # the transposed result is the faster one to ask for
    return linear(b.t(), a.t()).t().contiguous() if a.dtype == torch.float32 else a.t().mm(b)


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies float32 matrices on this tensor's device, and x is one."""
    return _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
