"""The comparison the project is shown by: normalisation techniques on a small language model of real text."""

from __future__ import annotations

import os
from typing import Any

from headway.trials.comparison import Comparison

MAIN: dict[str, Any] = {
    "task": "stdlib-text",
    "arms": [
        "baseline",
        "peri-ln",
        "mix-ln",
        "unified-norm(warmup_iters=30, compensation_warmup=60)",
    ],
    "seeds": 2,
    "budget": "150 steps",
}
"""About three minutes on two cores."""


def main(
    store: str | os.PathLike[str] = "runs/compare.sqlite",
    report: str | os.PathLike[str] | None = "runs/compare.html",
    **changes: Any,
) -> Comparison:
    """Runs (or goes on with) the main comparison, prints its table and says where the report lies."""
    from rich.console import Console

    from headway.trials.compare import compare

    comparison = compare(**{**MAIN, **changes}, store=store, report=report)
    console = Console()
    console.print(comparison.table())
    if report is not None:
        console.print(f"The report: {os.path.abspath(report)}", soft_wrap=True, highlight=False)
    return comparison
