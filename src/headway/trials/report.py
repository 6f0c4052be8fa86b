"""The page of a comparison: one self-contained HTML file, readable on a phone and in dark mode."""

from __future__ import annotations

import html
import math
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway import pages

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headway.trials.comparison import Comparison

COLOURS = ("#4c6ef5", "#e8590c", "#2b8a3e", "#c2255c", "#0c8599", "#9c36b5", "#846a00", "#5c677d")
_STYLE = (
    "td:first-child{min-width:min(190px,34vw);max-width:340px;white-space:normal;overflow-wrap:anywhere}"
    "@media(max-width:640px){th,td{padding:5px 7px}}"
)


def write(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Writes the report of a comparison to ``path`` (a new file, then renamed) and returns the path."""
    from headway.trials.comparison import with_spread

    task, request = comparison.task, comparison.data["request"]
    best = next((row for row in comparison.rows if row.best), None)
    cards = [
        (best.arm if best else "–", f"best {task['metric']}"),
        (with_spread(best.mean, best.spread) if best else "–", f"its {task['metric']}"),
        (f"{len(comparison.arms)} × {len(comparison.seeds)}", "arms × seeds"),
        (str(request["budget"]), "each run"),
    ]
    parts = [
        f"<h1>{html.escape(task['name'])}: {len(comparison.arms)} arms side by side</h1>",
        f'<div class="quiet">same task, same seeds, same budget; batch {request["batch_size"]}, {request["precision"]}</div>',
        pages.cards(cards),
        "<h2>Summary</h2>",
        _summary(comparison),
    ]
    embed = True
    keys = {arm: _colour(comparison, arm) for arm in comparison.arms}
    for heading, figures in (
        ("Learning curves", _curves(comparison)),
        ("Signal and gradient by depth", _flows(comparison)),
        ("Speed and memory", _costs(comparison)),
    ):
        parts.append(f"<h2>{heading}</h2>")
        if not figures:
            parts.append('<p class="quiet">Nothing was recorded.</p>')
            continue
        parts.append(pages.panels(figures, keys, embed))
        embed = False
    parts += [
        "<h2>What each arm changed</h2>",
        _changes(comparison),
        "<h2>Machine and versions</h2>",
        _machine(comparison),
    ]
    parts += ["<h2>Run it again</h2>", f"<pre><code>{html.escape(comparison.command)}</code></pre>"]
    return pages.write_page(parts, f"headway: {task['name']}", path, _STYLE)


def _summary(comparison: Comparison) -> str:
    from headway.trials.comparison import with_spread

    task = comparison.task
    better = "lower is better" if task["lower_is_better"] else "higher is better"
    heads = ["arm", f"{task['metric']} ({better})", "training loss", "step", "× first", "peak memory", "parameters"]
    lines = []
    for row in comparison.rows:
        state = (
            "best"
            if row.best
            else f"{row.diverged} diverged"
            if row.diverged
            else f"{row.failed} failed"
            if row.failed
            else ""
        )
        state = state or (f"{row.waiting} to run" if row.waiting else "")
        cells = [
            f"{row.arm} · {state}" if state else row.arm,
            with_spread(row.mean, row.spread),
            with_spread(row.final_loss, row.final_loss_spread),
            "–" if row.step_seconds is None else f"{1e3 * row.step_seconds:.1f} ms",
            "–" if row.step_ratio is None else f"{row.step_ratio:.2f}",
            "–" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB",
            "–" if row.parameters is None else f"{row.parameters:,}",
        ]
        lines.append(cells)
    note = f'<p class="quiet">mean ± sample standard deviation over {_count(len(comparison.seeds), "seed")}</p>'
    return (
        pages.table(heads, lines, ("best" if row.best else "" for row in comparison.rows))
        + note
        + "".join(f'<div class="finding critical"><em>failed</em>{html.escape(f)}</div>' for f in comparison.failures)
    )


def _colour(comparison: Comparison, arm: str) -> str:
    return COLOURS[comparison.arms.index(arm) % len(COLOURS)]


def _panel(title: str, height: int, x: str = "") -> go.Figure:
    import plotly.graph_objects as go

    axis = {"gridcolor": "rgba(128,136,152,.22)", "zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "title": {"text": title, "font": {"size": 14}, "x": 0.5, "xanchor": "center", "y": 0.97, "yanchor": "top"},
            "height": height,
            "margin": {"l": 48, "r": 12, "t": 36, "b": 40},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"size": 12},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": axis | {"title": {"text": x, "standoff": 6}},
            "yaxis": axis,
        }
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _smooth(values: list[float], window: int) -> list[float]:
    out = []
    for i in range(len(values)):
        part = [v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)]
        out.append(sum(part) / len(part) if part else math.nan)
    return out


def _curves(comparison: Comparison) -> list[go.Figure]:
    metric = comparison.task["metric"]
    held, training = _panel(f"held-out {metric}", 340, "step"), _panel("training loss, smoothed", 340, "step")
    for arm in comparison.arms:
        first = True
        for seed in comparison.seeds:
            try:
                curve = comparison.curves(arm, seed)
            except KeyError:
                continue
            if not curve["steps"]:
                continue
            style: dict[str, Any] = {
                "legendgroup": arm,
                "name": arm,
                "mode": "lines",
                "line": {"color": _colour(comparison, arm), "width": 1.6},
                "opacity": 1.0 if first else 0.55,
                "hovertemplate": f"{arm}, seed {seed}<br>step %{{x}}: %{{y:.4f}}<extra></extra>",
            }
            points = curve["metrics"].get(metric, {"steps": [], "values": []})
            held.add_scatter(x=points["steps"], y=points["values"], **style)
            stride = max(1, len(curve["steps"]) // 400)
            loss = _smooth(curve["loss"], max(1, len(curve["loss"]) // 40))
            training.add_scatter(x=curve["steps"][::stride], y=loss[::stride], **style)
            first = False
    for figure in (held, training):
        _open_up(figure)
    return [held, training] if training.data else []


def _open_up(figure: go.Figure) -> None:
    """A logarithmic axis where one line starts so high that the others would lie on top of each other."""
    values = _heights(figure)
    if values and min(values) > 0 and max(values) > 3 * statistics.median(values):
        _logarithmic(figure)


def _heights(figure: go.Figure) -> list[float]:
    traces: Any = figure.data
    return [v for trace in traces for v in trace.y or () if v is not None and math.isfinite(v)]


def _logarithmic(figure: go.Figure) -> None:
    values = _heights(figure)
    figure.update_yaxes(type="log")
    if not values:
        return
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1,) if high - low > 3 else (1, 2, 5) if max(values) / min(values) > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [(step, decade) for decade in range(low, high + 1) for step in steps]
    words = [f"{step * 10.0**e:g}" if -3 <= e < 4 else f"{step:g}e{e}" for step, e in ticks]
    figure.update_yaxes(tickvals=[step * 10.0**e for step, e in ticks], ticktext=words)


def _flows(comparison: Comparison) -> list[go.Figure]:
    figures = []
    for what, quantity in (("signal", "rms"), ("gradient", "grad_rms")):
        for moment in ("start", "end"):
            figure = _panel(f"{what} RMS, at the {moment}", 300, "residual block")
            for arm in comparison.arms:
                probed = comparison.flows.get(arm, {}).values()
                flow = next((f[moment] for f in probed if moment in f and "rows" in f[moment]), None)
                if flow is None:
                    continue
                rows = [r for r in flow["rows"] if r.get("kind") == "stream"] or flow["rows"]
                values = [r.get(quantity) for r in rows]
                values = [v if isinstance(v, (int, float)) and v > 0 else None for v in values]
                if not any(values):
                    continue
                figure.add_scatter(
                    x=list(range(1, len(rows) + 1)),
                    y=values,
                    text=[r["name"] for r in rows],
                    name=arm,
                    legendgroup=arm,
                    mode="lines+markers",
                    line={"color": _colour(comparison, arm), "width": 1.6},
                    marker={"size": 5},
                    hovertemplate=f"{arm}<br>%{{text}}: %{{y:.3g}}<extra></extra>",
                )
            if figure.data:
                _logarithmic(figure)
                figures.append(figure)
    return figures


def _costs(comparison: Comparison) -> list[go.Figure]:
    rows = [row for row in comparison.rows if row.step_seconds is not None]
    figures = []
    for title, values in (
        ("step, ms (median)", [1e3 * (row.step_seconds or 0) for row in rows]),
        ("peak memory of training, MiB", [(row.peak_memory or 0) / 2**20 for row in rows]),
    ):
        figure = _panel(title, 90 + 30 * len(rows))
        for row, value in zip(rows, values, strict=True):
            figure.add_bar(
                y=[row.arm],
                x=[value],
                orientation="h",
                name=row.arm,
                legendgroup=row.arm,
                marker={"color": _colour(comparison, row.arm)},
                text=f"{value:.3g}",
                textposition="inside",
                hovertemplate=f"{row.arm}: %{{x:.1f}}<extra></extra>",
            )
        figure.update_yaxes(autorange="reversed", showticklabels=False)  # the colours are told below
        figures.append(figure)
    return figures if rows else []


def _changes(comparison: Comparison) -> str:
    blocks = []
    for row in comparison.rows:
        if not row.changes:
            blocks.append(f"<p><b>{html.escape(row.arm)}</b> <span class='quiet'>changes nothing</span></p>")
            continue
        keys = ("name", "technique", "before", "after")
        lines = ([str(change[key]) for key in keys] for change in row.changes)
        blocks.append(
            f"<details><summary><b>{html.escape(row.arm)}</b>: {html.escape(row.changed())}</summary>"
            f"{pages.table(('module', *keys[1:]), lines)}</details>"
        )
    return "".join(blocks)


def _machine(comparison: Comparison) -> str:
    facts = next((f for by_seed in comparison.facts.values() for f in by_seed.values() if f.get("machine")), {})
    seconds = [s for arm in comparison.arms for seed in comparison.seeds if (s := _seconds(comparison, arm, seed))]
    timing = {"training time of a run": f"median {statistics.median(seconds):.1f} s"} if seconds else {}
    computer = dict(facts.get("machine") or {})
    if isinstance(computer.get("memory"), int):
        computer["memory"] = f"{computer['memory'] / 2**30:.1f} GiB"
    return pages.facts(computer, facts.get("versions") or {}, timing)


def _seconds(comparison: Comparison, arm: str, seed: int) -> float | None:
    try:
        seconds = comparison.curves(arm, seed)["seconds"]
    except KeyError:
        return None
    return seconds[-1] if seconds else None
