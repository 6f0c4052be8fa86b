"""One self-contained HTML page of a flow: headline numbers, findings, plots, table. No network, dark mode, narrow screens."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

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
_STYLE = """
:root{color-scheme:light dark;--ink:#1f2430;--quiet:#687084;--paper:#fff;--card:#f6f7fa;--line:#e3e6ee;
--critical:#e03131;--warning:#e8890c;--info:#4c6ef5}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaf0;--quiet:#9aa3b5;--paper:#12141a;--card:#1b1e27;--line:#2b303d}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,sans-serif}main{max-width:1080px;margin:0 auto;padding:24px 16px 56px}h1{font-size:24px;margin:0 0 2px}h2{font-size:17px;
margin:32px 0 10px}.quiet{color:var(--quiet)}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;
margin:20px 0}.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}.card b{display:block;
font-size:20px;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}.card span{color:var(--quiet);font-size:13px}
.finding{border-left:4px solid var(--info);background:var(--card);border-radius:0 8px 8px 0;padding:9px 14px;margin:8px 0}
.finding.critical{border-color:var(--critical)}.finding.warning{border-color:var(--warning)}.finding em{font-style:normal;
font-weight:600;text-transform:uppercase;font-size:11px;letter-spacing:.06em;margin-right:8px}.critical em{color:var(--critical)}
.warning em{color:var(--warning)}.info em{color:var(--info)}code{background:var(--line);border-radius:5px;padding:1px 6px;
font-size:13px;white-space:nowrap}.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;max-height:70vh}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}th,td{padding:5px 10px;text-align:right;
white-space:nowrap;border-bottom:1px solid var(--line)}th{position:sticky;top:0;background:var(--card);font-weight:600;z-index:1}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}td:first-child{font-family:ui-monospace,Menlo,
Consolas,monospace;font-size:12px}tr.stream td{background:var(--card)}.plot{margin:0 -8px}
"""
# the plot follows the reader's colour scheme, which only the browser knows
_SCRIPT = """
const scheme=matchMedia("(prefers-color-scheme: dark)");function paint(){document.querySelectorAll(".js-plotly-plot").forEach(p=>
Plotly.relayout(p,{"font.color":scheme.matches?"#c4cad6":"#3a4152","hoverlabel.bgcolor":scheme.matches?"#1b1e27":"#ffffff",
"hoverlabel.font.color":scheme.matches?"#e8eaf0":"#1f2430"}))}scheme.addEventListener("change",paint);paint();
"""


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
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{html.escape(v)}</b><span>{t}</span></div>' for v, t in cards)
        + "</div>",
        "<h2>Findings</h2>",
        _findings(flow) or '<div class="finding info"><em>fine</em>Nothing to object to.</div>',
        "<h2>By depth</h2>",
        _plot(flow.plot()),
        "<h2>Every module</h2>",
        _table(flow),
        *(f'<p class="quiet">{html.escape(note)}</p>' for note in flow.notes),
    ]
    return _page(parts, f"Signal flow of {flow.model}", path)


def write_history(records: Sequence[tuple[int, Flow]], path: str | Path) -> Path:
    """Writes the page of a watched run."""
    from headway.signals.plot import history_figure

    parts = [f"<h1>Signal flow over training</h1><div class='quiet'>{len(records)} watched steps</div>"]
    if records:
        parts += [
            _plot(history_figure(records)),
            f"<h2>Findings at step {records[-1][0]}</h2>",
            _findings(records[-1][1]),
        ]
        parts += ["<h2>Every module</h2>", _table(records[-1][1])]
    return _page(parts, "Signal flow over training", path)


def _page(parts: Sequence[str], title: str, path: str | Path) -> Path:
    path = Path(path)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>'
        + "\n".join(parts)
        + f"</main><script>{_SCRIPT}</script></body></html>"
    )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _plot(figure) -> str:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    inner = figure.to_html(full_html=False, include_plotlyjs=True, config=config)
    return f'<div class="plot">{inner}</div>'


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
    head = "".join(f"<th>{_COLUMNS[c]}</th>" for c in columns)
    body = "".join(
        f'<tr class="{row.kind}">'
        + "".join(
            f"<td>{html.escape(_cell(row, c).replace('x', '×') if c == 'shape' else _cell(row, c))}</td>"
            for c in columns
        )
        + "</tr>"
        for row in flow.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _objective(flow: Flow) -> str:
    if not flow.objective:
        return ""
    value = f" = {flow.loss:.4g}" if math.isfinite(flow.loss) else ""
    return f" · gradient of {html.escape(flow.objective)}{value}"


def _unit(kind: str) -> str:
    return "block" if kind == "stream" else "layer"


def _figure(value: float, sign: str = "") -> str:
    return f"{sign}{value:.3g}" if math.isfinite(value) else "–"
