"""One self-contained HTML page of a flow: headline numbers, findings, plots, table. No network, dark mode, narrow screens."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from headway import pages
from headway.signals.flow import Flow, _cell, size_text

_COLUMNS = {
    "name": "module",
    "kind": "kind",
    "shape": "shape",
    "rms": "rms",
    "mean": "mean",
    "std": "std",
    "kurtosis": "kurtosis",
    "absmax": "max |x|",
    "frac_zero": "zeros",
    "cos": "cos",
    "stable_rank": "rank",
    "grad_rms": "grad rms",
    "grad_norm": "grad norm",
    "weight_norm": "|W|",
    "effective_lr": "eff. lr",
    "saved_bytes": "saved",
}


def write(flow: Flow, path: str | Path) -> Path:
    """Writes the page of a flow to ``path`` (a new file, then renamed) and returns the path."""
    law = flow.growth
    cards = [
        (_figure(law.explosion, "×"), f"variance, last {_unit(law.kind)} / first"),
        (law.law, f"growth over {law.rows} {law.kind} rows"),
        (_figure(law.gradient_ratio, "×"), "gradient norm, first / last"),
        (
            _figure(max((row.cos for row in flow.of(law.kind) if math.isfinite(row.cos)), default=math.nan)),
            "most alike (mean cosine)",
        ),
        (size_text(flow.saved_bytes) if flow.saved_bytes else "–", "kept for backward"),
        (str(len(flow.rows)), "module calls probed"),
    ]
    parts = [
        f"<h1>Signal flow of {html.escape(flow.model or 'the model')}</h1>",
        f'<div class="quiet">{html.escape(str(law))}{_objective(flow)}</div>',
        pages.cards(cards),
        "<h2>Findings</h2>",
        _findings(flow) or '<div class="finding info"><em>fine</em>Nothing to object to.</div>',
        "<h2>By depth</h2>",
        pages.plot(flow.plot()),
        "<h2>Every module</h2>",
        _table(flow),
        *(f'<p class="quiet">{html.escape(note)}</p>' for note in flow.notes),
    ]
    return pages.write_page(parts, f"Signal flow of {flow.model}", path)


def write_history(records: Sequence[tuple[int, Flow]], path: str | Path) -> Path:
    """Writes the page of a watched run."""
    from headway.signals.plot import history_figure

    parts = [f"<h1>Signal flow over training</h1><div class='quiet'>{len(records)} watched steps</div>"]
    if records:
        parts += [
            pages.plot(history_figure(records)),
            f"<h2>Findings at step {records[-1][0]}</h2>",
            _findings(records[-1][1]),
        ]
        parts += ["<h2>Every module</h2>", _table(records[-1][1])]
    return pages.write_page(parts, "Signal flow over training", path)


def _findings(flow: Flow) -> str:
    lines = []
    for finding in flow.findings:
        answers = " ".join(f"<code>{key}</code>" for key in finding.techniques)
        answers = f" Answers: {answers}" if answers else ""
        words = f"{html.escape(finding.message)} {html.escape(finding.advice)}"
        lines.append(f'<div class="finding {finding.severity}"><em>{finding.severity}</em>{words}{answers}</div>')
    return "\n".join(lines)


def _table(flow: Flow) -> str:
    columns = [c for c in _COLUMNS if c in ("name", "kind", "shape") or any(_cell(row, c) != "-" for row in flow.rows)]
    body = ([_cell(row, c).replace("x", "×") if c == "shape" else _cell(row, c) for c in columns] for row in flow.rows)
    return pages.table([_COLUMNS[c] for c in columns], body, (row.kind for row in flow.rows))


def _objective(flow: Flow) -> str:
    if not flow.objective:
        return ""
    value = f" = {flow.loss:.4g}" if math.isfinite(flow.loss) else ""
    return f" · gradient of {html.escape(flow.objective)}{value}"


def _unit(kind: str) -> str:
    return "block" if kind == "stream" else "layer"


def _figure(value: float, sign: str = "") -> str:
    return f"{sign}{value:.3g}" if math.isfinite(value) else "–"
