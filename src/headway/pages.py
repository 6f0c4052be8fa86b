"""How every page of headway is written: one self-contained HTML file without network, dark mode, narrow screens.

The page of a flow (:mod:`headway.signals.page`), the report of a comparison (:mod:`headway.trials.report`) and the scoreboard
of claims (:mod:`headway.claims.scoreboard`) are made of the same parts: cards with a headline number each, findings, tables
that scroll inside their own frame, plots that follow the reader's colour scheme.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway._files import write_bytes

if TYPE_CHECKING:
    import plotly.graph_objects as go

STYLE = """
:root{color-scheme:light dark;--ink:#1f2430;--quiet:#687084;--paper:#fff;--card:#f6f7fa;--line:#e3e6ee;
--critical:#e03131;--warning:#e8890c;--info:#4c6ef5;--good:#2b8a3e}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaf0;--quiet:#9aa3b5;--paper:#12141a;--card:#1b1e27;--line:#2b303d;--good:#51cf66}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,sans-serif}main{max-width:1080px;margin:0 auto;padding:24px 16px 56px}h1{font-size:24px;margin:0 0 2px}h2{font-size:17px;
margin:32px 0 10px}a{color:var(--info)}.quiet{color:var(--quiet)}.cards{display:grid;grid-template-columns:repeat(auto-fit,
minmax(132px,1fr));gap:10px;margin:20px 0}.card{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:10px 14px}.card b{display:block;font-size:20px;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}.card span{
color:var(--quiet);font-size:13px}.finding{border-left:4px solid var(--info);background:var(--card);border-radius:0 8px 8px 0;
padding:9px 14px;margin:8px 0}.finding.critical{border-color:var(--critical)}.finding.warning{border-color:var(--warning)}
.finding.good{border-color:var(--good)}.finding em{font-style:normal;font-weight:600;text-transform:uppercase;font-size:11px;
letter-spacing:.06em;margin-right:8px}.critical em{color:var(--critical)}.warning em{color:var(--warning)}.info em{color:
var(--info)}.good em{color:var(--good)}code{background:var(--line);border-radius:5px;padding:1px 6px;font-size:13px;white-space:
nowrap}.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;max-height:70vh}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}th,td{padding:5px 10px;text-align:right;
white-space:nowrap;border-bottom:1px solid var(--line)}th{position:sticky;top:0;background:var(--card);font-weight:600;z-index:1}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}td:first-child{font-family:ui-monospace,Menlo,
Consolas,monospace;font-size:12px}tr.stream td{background:var(--card)}tr.best td{font-weight:600}.plot{margin:0 -8px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:12px}pre code{white-space:inherit;background:none;
padding:0}details{margin:6px 0}summary{cursor:pointer}.panels{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:4px 12px}
@media(max-width:640px){.panels{grid-template-columns:minmax(0,1fr)}}
.keys{display:flex;flex-wrap:wrap;gap:4px 6px;margin:6px 0}.keys button{display:flex;
align-items:center;gap:7px;max-width:100%;font:inherit;font-size:13px;color:inherit;background:none;border:1px solid var(--line);
border-radius:14px;padding:2px 10px;cursor:pointer;text-align:left;overflow-wrap:anywhere}.keys i{flex:none;width:12px;height:3px;
border-radius:2px}.keys [aria-pressed=false]{opacity:.4}
"""
# plots follow the reader's colour scheme, which only the browser knows; a key shows and hides its lines in every panel beside it
_SCRIPT = """
const scheme=matchMedia("(prefers-color-scheme: dark)");function paint(){document.querySelectorAll(".js-plotly-plot").forEach(p=>
Plotly.relayout(p,{"font.color":scheme.matches?"#c4cad6":"#3a4152","hoverlabel.bgcolor":scheme.matches?"#1b1e27":"#ffffff",
"hoverlabel.font.color":scheme.matches?"#e8eaf0":"#1f2430"}))}scheme.addEventListener("change",paint);paint();
document.querySelectorAll(".keys button").forEach(b=>b.addEventListener("click",()=>{const on=b.getAttribute("aria-pressed")!=="true";
b.setAttribute("aria-pressed",on);b.closest("section").querySelectorAll(".js-plotly-plot").forEach(p=>{const mine=[...p.data.keys()]
.filter(i=>p.data[i].legendgroup===b.dataset.key);if(mine.length)Plotly.restyle(p,{visible:on},mine)})}));
"""


def write_page(parts: Iterable[str], title: str, path: str | os.PathLike[str], style: str = "") -> Path:
    """Writes HTML ``parts`` as one page to ``path`` (a new file, then renamed) and returns the path.

    ``style`` is CSS of this page alone, behind the common one.
    """
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>'
        "<body><main>" + "\n".join(parts) + f"</main><script>{_SCRIPT}</script></body></html>"
    )
    return write_bytes(path, text.encode())


def cards(pairs: Iterable[tuple[str, str]]) -> str:
    """A row of cards, each a headline (escaped here) over what it is."""
    inner = "".join(
        f'<div class="card"><b>{html.escape(headline)}</b><span>{html.escape(what)}</span></div>'
        for headline, what in pairs
    )
    return f'<div class="cards">{inner}</div>'


def plot(figure: go.Figure, embed: bool = True) -> str:
    """A plotly figure; the first one of a page must embed the library."""
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    inner = figure.to_html(full_html=False, include_plotlyjs=embed, config=config)
    return f'<div class="plot">{inner}</div>'


def panels(figures: Iterable[go.Figure], keys: Mapping[str, str], embed: bool = True) -> str:
    """Plots side by side, below each other on a narrow screen, over one row of ``keys`` (name: colour) that show and hide the
    traces of that ``legendgroup`` in all of them."""
    inner = "".join(plot(figure, embed and not index) for index, figure in enumerate(figures))
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-key="{html.escape(name)}"><i style="background:{colour}"></i>'
        f"{html.escape(name)}</button>"
        for name, colour in keys.items()
    )
    return f'<section><div class="panels">{inner}</div><div class="keys">{buttons}</div></section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: Iterable[str] | None = None) -> str:
    """A table of plain text (escaped here) in a frame that scrolls; ``classes`` gives every row its CSS class, or ""."""
    listed = [list(row) for row in rows]
    kinds = [""] * len(listed) if classes is None else list(classes)
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for kind, row in zip(kinds, listed, strict=True)
    )
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def facts(*groups: Mapping[str, Any]) -> str:
    """A table of names and values: the machine, the versions."""
    pairs = [(str(name), v if isinstance(v, str) else json.dumps(v)) for group in groups for name, v in group.items()]
    return table((), pairs) if pairs else '<p class="quiet">Nothing was recorded.</p>'
