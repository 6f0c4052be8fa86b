"""What measuring a paper's claim on this machine gives: the paper's number, ours, the baseline, a verdict and its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Verdict = Literal["holds", "partly", "does not hold here"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Evidence:
    """One claim of one paper, measured here.

    Attributes:
        key: the system, as in the catalogue ("peri-ln").
        claim: what the paper says, one sentence.
        paper: the paper's number with its setting, or "qualitative".
        measured: the number seen here, with its unit and setting.
        baseline: what it was held against.
        verdict: "holds", "partly" or "does not hold here".
        why: the reason for the verdict, one sentence; for "partly" and "does not hold here" what limits it.
        limit: the physical limit beside a speed (e.g. "copy bandwidth 21 GB/s"), empty where there is none.
        rows: the measurements behind it, one mapping a size, seed or setting.
    """

    key: str
    claim: str
    paper: str
    measured: str
    baseline: str
    verdict: Verdict
    why: str
    limit: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: numbers that are not finite, which JSON cannot hold, become None."""
        return _plain(asdict(self))


def verdict(good: Iterable[bool]) -> Verdict:
    """ "holds" if all of it does, "partly" if some of it does."""
    listed = list(good)
    return "holds" if listed and all(listed) else "partly" if any(listed) else "does not hold here"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
