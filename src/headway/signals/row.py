"""What is known of one module's signal after a pass: one row of a :class:`headway.signals.flow.Flow`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

NAN = math.nan


@dataclass
class Row:
    """One call of one module.

    Attributes:
        name: qualified name; ``#k`` is added where the module was called several times.
        kind: "pre", "post", "stream", "skip", "norm" or "other" (see :mod:`headway.signals.points`).
        depth: position among the rows of its kind, in order of execution.
        shape, dtype, module: of the output; class of the module.
        std, var: per channel over samples and positions (unbiased), averaged over channels.
        rms: sqrt(mean x^2) over all entries; mean, kurtosis (3 for a Gaussian), absmax likewise.
        frac_zero: share of entries that are exactly zero.
        nonfinite: how many entries are NaN or infinite; everything else is over the finite ones.
        cos: mean cosine between samples; between_tokens: between the tokens of one sample.
        stable_rank: trace(M) / lambda_max(M) of the cosine matrix of ``samples`` samples.
        zero_samples: samples that are zero throughout.
        grad_norm, grad_rms: of the gradient of the loss with respect to this output, over the whole batch.
        grad_nonfinite: the gradient holds NaN or infinity.
        weight_norm, weight_grad_norm: of the module's own weights (NaN for a module without).
        effective_lr: how fast the step turns the direction of the weights: lr / |W|^2 for SGD, lr / rms(W) for optimisers whose
            step does not depend on the gradient's size (NaN without ``optimizer=``).
        saved_bytes: kept for backward by what ran inside the module, parameters not counted, each storage once.
        note: what could not be measured, and why.
    """

    name: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    dtype: str = ""
    module: str = ""
    std: float = NAN
    var: float = NAN
    rms: float = NAN
    mean: float = NAN
    kurtosis: float = NAN
    absmax: float = NAN
    frac_zero: float = NAN
    nonfinite: int = 0
    cos: float = NAN
    between_tokens: float = NAN
    stable_rank: float = NAN
    samples: int = 0
    zero_samples: int = 0
    grad_norm: float = NAN
    grad_rms: float = NAN
    grad_nonfinite: bool = False
    weight_norm: float = NAN
    weight_grad_norm: float = NAN
    effective_lr: float = NAN
    saved_bytes: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON: NaN and infinity become None."""
        plain = asdict(self)
        plain["shape"] = list(self.shape)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """The row that ``to_dict`` wrote."""
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {
            k: NAN if v is None and known[k].type == "float" else v for k, v in data.items() if k in known
        }
        values["shape"] = tuple(values["shape"])
        return cls(**values)
