"""The law by which a signal grows with depth: exponential (a factor a block), linear (a slope a block), or flat.

Least squares of var and of log(var) against depth; the better fit decides. Exponential growth is what an un-normalised
residual network does (each block doubles the second moment), linear growth what normalised branches leave of it.
"Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning", 2021, arXiv 2106.05956.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headway.signals.row import NAN, Row

FEWEST = 6


@dataclass(frozen=True)
class Growth:
    """How the signal changes over the rows of one kind.

    Attributes:
        kind: which rows were fitted ("stream" where there are blocks, else "post", else "pre").
        law: "exponential", "linear", "flat" or "too shallow" (fewer than 6 rows).
        factor: exp of the slope of log(var): what var is multiplied by from one row to the next.
        slope: what is added to var from one row to the next.
        fit_log, fit_linear: R^2 of the two fits.
        explosion: var of the last row / var of the first.
        collapse: name of the first row whose cos passes the threshold, or None.
        gradient_ratio: grad_norm of the first row / of the last, over the "stream" rows or else the "pre" rows.
        rows: how many rows were fitted.
    """

    kind: str
    law: str
    factor: float
    slope: float
    fit_log: float
    fit_linear: float
    explosion: float
    collapse: str | None
    gradient_ratio: float
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        if self.law == "too shallow":
            return f"too shallow to name a law of growth ({self.rows} {self.kind} rows, {FEWEST} are needed)"
        words = {
            "exponential": f"exponential, factor {self.factor:.3g} a {self._step}",
            "linear": f"linear, slope {self.slope:.3g} a {self._step}",
            "flat": "flat",
        }
        return f"variance over {self.rows} {self.kind} rows: {words[self.law]}"

    @property
    def _step(self) -> str:
        return "block" if self.kind == "stream" else "layer"


def chain(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of one kind that follow one another; of an encoder and a decoder, the longer one."""
    chosen = [row for row in rows if row.kind == kind]
    decoder = [row for row in chosen if "decoder" in row.name]
    encoder = [row for row in chosen if "encoder" in row.name]
    if decoder and encoder and len(decoder) + len(encoder) == len(chosen):
        return encoder if len(encoder) >= len(decoder) else decoder
    return chosen


def leading_kind(rows: Sequence[Row]) -> str:
    """Which rows tell the story of depth: blocks if there are any, else activations, else what linear layers put out."""
    for kind in ("stream", "post", "pre", "norm", "other"):
        if len(chain(rows, kind)) >= 2:
            return kind
    return rows[0].kind if rows else "stream"


def growth(rows: Sequence[Row], collapse_at: float = 0.95) -> Growth:
    """Fits the law over the rows that tell the story of depth."""
    kind = leading_kind(rows)
    series = chain(rows, kind)
    points = [(i, row.var) for i, row in enumerate(series) if math.isfinite(row.var) and row.var > 0]
    depth, var = [float(i) for i, _ in points], [v for _, v in points]
    slope, fit_linear = _line(depth, var)
    log_slope, fit_log = _line(depth, [math.log(v) for v in var])
    factor = math.exp(log_slope) if abs(log_slope) < 700 else math.inf
    if len(points) < FEWEST:
        law = "too shallow"
    elif fit_log > fit_linear and not 1 / 1.1 <= factor <= 1.1:
        law = "exponential"
    elif abs(slope) * (len(points) - 1) > 0.25 * sum(var) / len(var) and fit_linear > 0.5:
        law = "linear"
    else:
        law = "flat"
    alike = next((row.name for row in series if row.cos > collapse_at), None)
    graded = chain(rows, "stream") if len(chain(rows, "stream")) >= 2 else chain(rows, "pre")
    # a classifier after pooling is no layer of the stack: only rows with as many axes as the first are held against it
    graded = [row for row in graded if math.isfinite(row.grad_norm) and len(row.shape) == len(graded[0].shape)]
    ratio = graded[0].grad_norm / graded[-1].grad_norm if len(graded) > 1 and graded[-1].grad_norm > 0 else NAN
    explosion = var[-1] / var[0] if len(var) > 1 else NAN
    return Growth(kind, law, factor, slope, fit_log, fit_linear, explosion, alike, ratio, len(points))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and R^2 of the least squares line through (x, y)."""
    if len(x) < 2:
        return NAN, NAN
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxx = sum((a - mx) ** 2 for a in x)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    # scaled, so that the squares of a signal that has exploded do not overflow
    size = max((abs(b - my) for b in y), default=0.0)
    if size == 0:
        return 0.0, 1.0
    slope = sxy / sxx
    left = sum(((b - my - slope * (a - mx)) / size) ** 2 for a, b in zip(x, y, strict=True))
    return slope, 1 - left / sum(((b - my) / size) ** 2 for b in y)
