"""What is wrong with a signal's flow, the measured number behind it, and which techniques answer it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headway.signals.growth import Growth, chain
from headway.signals.long_skips import carried
from headway.signals.row import Row

SEVERITIES = ("critical", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing seen in a flow.

    Attributes:
        severity: "critical" (training is likely to fail), "warning" or "info".
        problem: a short name: "nonfinite", "explosion", "vanishing signal", "growth", "collapse", "token collapse",
            "exploding gradient", "vanishing gradient", "long skips", "dead units", "outliers", "cheaper norm", "memory".
        where: the first module concerned, or "".
        value: the measured number.
        message: one sentence with that number.
        techniques: keys of the catalogue that answer it.
        advice: what else helps, in words.
    """

    severity: str
    problem: str
    where: str
    value: float
    message: str
    techniques: tuple[str, ...] = ()
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON."""
        plain = asdict(self)
        plain["techniques"] = list(self.techniques)
        plain["value"] = self.value if math.isfinite(self.value) else None
        return plain

    def __str__(self) -> str:
        answer = f" [{', '.join(self.techniques)}]" if self.techniques else ""
        advice = f" {self.advice}" if self.advice else ""
        return f"{self.severity}: {self.message}{advice}{answer}"


@dataclass(frozen=True)
class Traits:
    """What kind of model it is, as far as advice depends on it.

    Attributes:
        attention: it attends.
        norms, layer_norms: how many normalisers it has, and how many of them are LayerNorms.
        placement: where its blocks have their norms, "" where that is not known.
        long_skips: the rows that its unscaled long skips carry, outermost first.
    """

    attention: bool = False
    norms: int = 0
    layer_norms: int = 0
    placement: str = ""
    long_skips: tuple[str, ...] = ()


def findings(
    rows: Sequence[Row], law: Growth, traits: Traits, collapse_at: float = 0.95, saved_total: int = 0
) -> list[Finding]:
    """Everything worth saying about these rows, the worst first."""
    found = [
        *_nonfinite(rows),
        *_growth(law, traits),
        *_collapse(rows, law, traits, collapse_at),
        *_gradient(rows, law, traits),
        *_long_skips(rows, traits),
        *_dead(rows),
        *_outliers(rows, traits),
        *_cheaper(traits),
        *_memory(rows, saved_total),
    ]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _rewire(traits: Traits) -> tuple[str, ...]:
    return ("peri-ln", "residual-depth") if traits.attention else ("residual-depth",)


def _nonfinite(rows: Sequence[Row]) -> list[Finding]:
    bad = next((row for row in rows if row.nonfinite), None)
    found = []
    if bad is not None:
        half = bad.dtype in ("float16", "bfloat16")
        found.append(
            Finding(
                "critical",
                "nonfinite",
                bad.name,
                bad.nonfinite,
                f"{bad.nonfinite} NaN or infinite values appear first in {bad.name}"
                + (f" ({bad.dtype}; the largest finite value there is {bad.absmax:.3g})." if half else "."),
                ("peri-ln",) if half else (),
                "" if half else "Look at what this module is given.",
            )
        )
    graded = next((row for row in reversed(rows) if row.grad_nonfinite), None)
    if graded is not None:
        message = f"the gradient is not finite, first (coming from the loss) at {graded.name}."
        found.append(
            Finding("critical", "nonfinite", graded.name, math.nan, message, (), "Check the loss and its scale.")
        )
    return found


def _growth(law: Growth, traits: Traits) -> list[Finding]:
    ratio, where = law.explosion, law.kind
    if not math.isfinite(ratio) and ratio != math.inf:
        return []
    unit = "block" if law.kind == "stream" else "layer"
    if law.law == "exponential" and law.factor > 1.1 and ratio > 10:
        severity = "critical" if ratio > 1e4 else "warning"
        text = f"activations grow exponentially with depth: variance x{law.factor:.3g} a {unit}, x{ratio:.3g} in all."
        advice = "" if traits.norms else "Nothing normalises the branches."
        return [Finding(severity, "explosion", where, ratio, text, _rewire(traits), advice)]
    if ratio < 1e-3:
        text = f"the signal vanishes with depth: variance x{law.factor:.3g} a {unit}, x{ratio:.3g} in all."
        return [
            Finding("warning", "vanishing signal", where, ratio, text, _rewire(traits), "Check the initial weights.")
        ]
    if ratio > 10:
        text = f"activations grow with depth: variance x{ratio:.3g} from the first {unit} to the last ({law.law})."
        answer = ("peri-ln", "mix-ln", "residual-depth") if traits.attention else ("residual-depth",)
        return [
            Finding("warning", "growth", where, ratio, text, answer, "Later blocks change the stream less and less.")
        ]
    return []


def _collapse(rows: Sequence[Row], law: Growth, traits: Traits, collapse_at: float) -> list[Finding]:
    found = []
    series = chain(rows, law.kind)
    at = next((i for i, row in enumerate(series) if row.cos > collapse_at), None)
    if at is not None:
        row = series[at]
        text = (
            f"samples collapse from {row.name} on ({law.kind} row {at} of {len(series)}): mean cosine {row.cos:.3f}, "
            f"stable rank {row.stable_rank:.2f} of {row.samples}."
        )
        answer = ("residual-depth",) if traits.attention else ()
        advice = (
            "Put a normaliser over fewer channels or over the batch after each layer."
            if not traits.attention
            else "Embeddings that all samples share count as likeness too."
        )
        found.append(Finding("warning", "collapse", row.name, row.cos, text, answer, advice))
    tokens = next((row for row in series if row.between_tokens > collapse_at), None)
    if tokens is not None and tokens is not series[0]:
        text = f"the tokens of a sample become alike from {tokens.name} on: mean cosine {tokens.between_tokens:.3f}."
        found.append(
            Finding(
                "warning", "token collapse", tokens.name, tokens.between_tokens, text, ("peri-ln", "residual-depth")
            )
        )
    return found


def _gradient(rows: Sequence[Row], law: Growth, traits: Traits) -> list[Finding]:
    ratio = law.gradient_ratio
    if not math.isfinite(ratio):
        return []
    kind = "stream" if len(chain(rows, "stream")) >= 2 else "pre"
    first = next((row.name for row in chain(rows, kind) if math.isfinite(row.grad_norm)), "")
    if ratio > 5:
        text = f"the gradient at {first} is {ratio:.3g} times that of the last {kind} row."
        answer = ("mix-ln", "peri-ln") if traits.attention else ("residual-depth",)
        severity = "critical" if ratio > 1e4 else "warning"
        return [Finding(severity, "exploding gradient", first, ratio, text, answer, "Use a lower rate or clip.")]
    if ratio < 0.2:
        text = f"the gradient fades on its way back: at {first} it is {ratio:.3g} of that of the last {kind} row."
        answer = ("peri-ln", "mix-ln") if traits.attention else ("residual-depth",)
        return [Finding("warning", "vanishing gradient", first, ratio, text, answer)]
    return []


def _long_skips(rows: Sequence[Row], traits: Traits) -> list[Finding]:
    sum_of_all, skips = carried(rows, traits.long_skips)
    # four skips of one size: decaying constants (kappa 0.7) stay below 3 whatever their number
    if not sum_of_all >= 5:
        return []
    outer, inner = skips[0], skips[-1]
    text = (
        f"{len(skips)} long skips reach the decoder unscaled: with what goes through the middle they add up to {sum_of_all:.3g} times "
        f"the second moment of the innermost, {inner.name}"
    )
    if outer.grad_norm > 0 and inner.grad_norm > 0:
        text += f"; the gradient at the outermost, {outer.name}, is {outer.grad_norm / inner.grad_norm:.3g} times as long as there"
    advice = "Features, gradients and the answer to noise grow with the number of skips, and training oscillates."
    severity = "warning" if sum_of_all > 10 else "info"
    return [Finding(severity, "long skips", outer.name, sum_of_all, f"{text}.", ("scale-long",), advice)]


def _dead(rows: Sequence[Row]) -> list[Finding]:
    dead = [row for row in rows if row.kind == "post" and row.frac_zero > 0.9]
    if not dead:
        return []
    worst = max(dead, key=lambda row: row.frac_zero)
    text = f"{len(dead)} activations are almost always zero; {worst.name} is zero in {100 * worst.frac_zero:.1f}% of its entries."
    return [
        Finding("warning", "dead units", worst.name, worst.frac_zero, text, (), "Lower the rate or check the biases.")
    ]


def _outliers(rows: Sequence[Row], traits: Traits) -> list[Finding]:
    def peak(row: Row) -> float:
        return row.absmax / row.rms if row.rms > 0 else 0.0

    series = [row for row in rows if row.kind in ("stream", "pre") and math.isfinite(peak(row))]
    if not series:
        return []
    worst = max(series, key=peak)
    if peak(worst) < 50:
        return []
    text = f"{worst.name} holds a value {peak(worst):.0f} times its RMS (kurtosis {worst.kurtosis:.0f}); few-bit formats lose the rest."
    return [Finding("warning", "outliers", worst.name, peak(worst), text, ("peri-ln",) if traits.attention else ())]


def _cheaper(traits: Traits) -> list[Finding]:
    if traits.placement != "pre" or not traits.layer_norms:
        return []
    text = f"{traits.layer_norms} LayerNorms read a Pre-LN stream; RMSNorm computes the same predictions for less."
    return [Finding("info", "cheaper norm", "", traits.layer_norms, text, ("pre-rms-norm", "unified-norm"))]


def _memory(rows: Sequence[Row], saved_total: int) -> list[Finding]:
    if not saved_total:
        return []
    leaves = [row for row in rows if row.kind != "stream" and row.saved_bytes]
    most = max(leaves, key=lambda row: row.saved_bytes, default=None)
    text = f"{saved_total / 2**20:.1f} MiB are kept for backward"
    text += f"; the most in {most.name} ({most.saved_bytes / 2**20:.1f} MiB)." if most else "."
    return [Finding("info", "memory", most.name if most else "", saved_total, text)]
