"""The scoreboard: all systems whose claims were measured, on one page. First the verdicts, then a line a claim, then what
stands behind each: the baseline, the reason, the measurements, the seconds taken, and the command that repeats them."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headway import pages
from headway.claims.evidence import VERDICTS, Evidence
from headway.claims.measure import System

_CLASSES = {"holds": "good", "partly": "warning", "does not hold here": "critical"}
_STYLE = """
.bar{display:flex;height:12px;border-radius:6px;overflow:hidden;background:var(--line);margin:4px 0 22px}.bar i{display:block}
.bar .good,.dot.good{background:var(--good)}.bar .warning,.dot.warning{background:var(--warning)}.bar .critical,
.dot.critical{background:var(--critical)}.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:7px}
.board{border:1px solid var(--line);border-radius:10px;overflow:hidden}.board table{table-layout:fixed}.board th{position:static}
.board th,.board td{text-align:left;white-space:normal;vertical-align:top;overflow-wrap:anywhere;padding:8px 10px}
.board td:first-child{font-size:12px}.board tr:last-child td{border-bottom:0}.board td a{color:inherit;text-decoration:none}
.board td a:hover{text-decoration:underline}.board th:nth-child(1){width:13%}.board th:nth-child(2){width:28%}
.board th:nth-child(3){width:18%}.board th:nth-child(5){width:14%}.board td:nth-child(5){font-weight:600}
.claim h3{font-size:15px;margin:0 0 6px;display:inline}.claim dl{display:grid;grid-template-columns:64px 1fr;gap:3px 10px;
margin:8px 0 4px;font-size:13.5px}.claim dt{color:var(--quiet)}.claim dd{margin:0;overflow-wrap:anywhere}.claim{margin:10px 0}
.claim summary{font-size:13px;color:var(--quiet)}.claim .scroll{max-height:340px;background:var(--paper)}.claim td:nth-child(n){
white-space:normal;min-width:60px;max-width:420px}h2{display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline}
h2 .quiet{font-size:13px;font-weight:400}@media(max-width:640px){.board thead{display:none}.board table,.board tbody{display:block}
.board tr{display:block;padding:10px 12px;border-bottom:1px solid var(--line)}.board tr:last-child{border-bottom:0}
.board td{display:block;border:0;padding:1px 0}.board td[data-what]::before{content:attr(data-what) " ";color:var(--quiet);
font-weight:400}.claim dl{grid-template-columns:52px 1fr}}
"""


def scoreboard(
    systems: Iterable[System], path: str | os.PathLike[str], quick: bool = False, command: str = "headway claims"
) -> Path:
    """Writes every verdict of the ``systems`` to one self-contained HTML page and returns its path.

    Args:
        quick: whether they were measured in quick mode; the commands on the page say so.
        command: what was run to make the page.
    """
    from headway.trials.facts import machine, versions

    listed = list(systems)
    evidence = [e for system in listed for e in system.evidence]
    counts = {verdict: sum(e.verdict == verdict for e in evidence) for verdict in VERDICTS}
    failed = [system for system in listed if system.error]
    heads = [(str(count), verdict) for verdict, count in counts.items()]
    heads += [
        (str(len(listed)), "system" if len(listed) == 1 else "systems"),
        (_seconds(sum(s.seconds for s in listed)), "taken in all"),
    ]
    if failed:
        heads.append((str(len(failed)), "could not be measured"))
    mode = "quick: small sizes and few seeds" if quick else "full sizes and seeds"
    parts = [
        "<h1>Published claims, measured on this machine</h1>",
        f'<div class="quiet">{len(evidence)} claims; {mode}; every verdict is computed from the '
        "measurements below it</div>",
        pages.cards(heads),
        _bar(counts),
        "<h2>All claims</h2>",
        _board(listed),
    ]
    for system in listed:
        parts.append(_heading(system))
        if system.error:
            parts.append(f'<div class="finding critical"><em>failed</em>{html.escape(system.error)}</div>')
        parts += [_claim(e, _anchor(system, number)) for number, e in enumerate(system.evidence)]
        repeat = f"headway claims {system.key}" + (" --quick" if quick else "")
        parts.append(f"<p class='quiet'>Again: <code>{html.escape(repeat)}</code></p>")
    parts += ["<h2>Machine and versions</h2>", pages.facts(machine(), versions())]
    parts += ["<h2>Run it again</h2>", f"<pre><code>{html.escape(command)}</code></pre>"]
    return pages.write_page(parts, "headway: claims", path, _STYLE)


def _bar(counts: dict[str, int]) -> str:
    pieces = "".join(
        f'<i class="{_CLASSES[verdict]}" style="flex:{count}" title="{count} {verdict}"></i>'
        for verdict, count in counts.items()
        if count
    )
    return f'<div class="bar">{pieces}</div>'


def _board(systems: Sequence[System]) -> str:
    lines = []
    for system in systems:
        for number, e in enumerate(system.evidence):
            claim = f'<a href="#{_anchor(system, number)}">{html.escape(e.claim)}</a>'
            paper, here = html.escape(e.paper), html.escape(e.measured)
            verdict = f'<span class="dot {_CLASSES[e.verdict]}"></span>{e.verdict}'
            lines.append(
                f'<tr><td>{html.escape(e.key)}</td><td>{claim}</td><td data-what="paper">{paper}</td>'
                f'<td data-what="here">{here}</td><td>{verdict}</td></tr>'
            )
        if system.error:
            lines.append(
                f"<tr><td>{html.escape(system.key)}</td><td>not measured</td><td></td><td>{html.escape(system.error)}</td>"
                '<td><span class="dot critical"></span>failed</td></tr>'
            )
    head = "".join(f"<th>{name}</th>" for name in ("system", "claim", "paper", "here", "verdict"))
    return f'<div class="board"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _anchor(system: System, number: int) -> str:
    return f"{system.key}-{number + 1}"


def _heading(system: System) -> str:
    from headway.catalogue import methods

    row = next((row for row in methods() if row.key == system.key), None)
    source = ""
    if row is not None:
        link = f'<a href="https://arxiv.org/abs/{row.arxiv}">arXiv {row.arxiv}</a>'
        source = f"{html.escape(row.paper)}, {row.year}, {link} · "
    return f'<h2>{html.escape(system.key)} <span class="quiet">{source}{_seconds(system.seconds)}</span></h2>'


def _claim(e: Evidence, anchor: str) -> str:
    pairs = [("paper", e.paper), ("here", e.measured), ("against", e.baseline), ("limit", e.limit), ("why", e.why)]
    inner = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in pairs if text)
    return (
        f'<div class="finding claim {_CLASSES[e.verdict]}" id="{anchor}"><em>{e.verdict}</em><h3>{html.escape(e.claim)}</h3>'
        f"<dl>{inner}</dl>{_measurements(e.rows)}</div>"
    )


def _measurements(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = ([_cell(row[name]) if name in row else "" for name in heads] for row in rows)
    what = "1 measurement" if len(rows) == 1 else f"{len(rows)} measurements"
    return (
        f"<details><summary>{what}</summary>{pages.table([name.replace('_', ' ') for name in heads], lines)}</details>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(_cell(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
