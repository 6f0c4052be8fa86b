"""Runs the claims of systems on this machine: ``hw.claim("peri-ln")`` and ``headway claims``."""

from __future__ import annotations

import html
import importlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from headway.claims.evidence import Evidence


def measured_keys(keys: Iterable[str]) -> list[str]:
    """Those of the catalogue's keys whose claims can be measured."""
    return [key for key in keys if importlib.util.find_spec(f"headway.claims.{key.replace('-', '_')}") is not None]


def claim(key: str, quick: bool = False) -> list[Evidence]:
    """Measures every claim of one system here and now.

    Args:
        key: as in the catalogue ("beyond-batchnorm").
        quick: at most about half a minute, with smaller sizes and fewer seeds; otherwise at most about five minutes.

    Raises:
        ValueError: there is no such system, or its claims cannot be measured yet.
    """
    if not measured_keys([key]):
        raise ValueError(
            f"no claims are measured for {key!r}; `headway claims --list` names the systems that have some"
        )
    return importlib.import_module(f"headway.claims.{key.replace('-', '_')}").measure(quick)


def scoreboard(evidence: Iterable[Evidence], path: str | os.PathLike[str]) -> Path:
    """Writes all verdicts to one self-contained HTML page and returns its path."""
    from headway.signals.page import _page as write_page

    listed = list(evidence)
    counts = {
        verdict: sum(e.verdict == verdict for e in listed) for verdict in ("holds", "partly", "does not hold here")
    }
    kinds = {"holds": "info", "partly": "warning", "does not hold here": "critical"}
    cards = "".join(
        f'<div class="card"><b>{count}</b><span>{verdict}</span></div>' for verdict, count in counts.items()
    )
    parts = ["<h1>Published claims, measured on this machine</h1>", f'<div class="cards">{cards}</div>']
    for key in dict.fromkeys(e.key for e in listed):
        parts.append(f"<h2>{html.escape(key)}</h2>")
        for e in (e for e in listed if e.key == key):
            limit = f"<br><b>limit</b> {html.escape(e.limit)}" if e.limit else ""
            parts.append(
                f'<div class="finding {kinds[e.verdict]}"><em>{e.verdict}</em>{html.escape(e.claim)}'
                f'<div class="quiet"><b>paper</b> {html.escape(e.paper)}<br><b>here</b> {html.escape(e.measured)}'
                f"<br><b>against</b> {html.escape(e.baseline)}{limit}<br>{html.escape(e.why)}</div></div>"
            )
    return write_page(parts, "headway: claims", Path(path))
