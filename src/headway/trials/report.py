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
_STYLE = "td{max-width:340px;overflow:hidden;text-overflow:ellipsis}"


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
    for heading, figure in (
        ("Learning curves", _curves(comparison)),
        ("Signal and gradient by depth", _flows(comparison)),
        ("Speed and memory", _costs(comparison)),
    ):
        parts.append(f"<h2>{heading}</h2>")
        if figure is None:
            parts.append('<p class="quiet">Nothing was recorded.</p>')
            continue
        parts.append(pages.plot(figure, embed))
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
    heads = ["arm", "", f"{task['metric']} ({better})", "training loss", "step", "× first", "peak memory", "parameters"]
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
        cells = [
            row.arm,
            state or (f"{row.waiting} to run" if row.waiting else ""),
            with_spread(row.mean, row.spread),
            with_spread(row.final_loss, row.final_loss_spread),
            "–" if row.step_seconds is None else f"{1e3 * row.step_seconds:.1f} ms",
            "–" if row.step_ratio is None else f"{row.step_ratio:.2f}",
            "–" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB",
            "–" if row.parameters is None else f"{row.parameters:,}",
        ]
        lines.append(cells)
    note = f'<p class="quiet">mean ± sample standard deviation over {len(comparison.seeds)} seed(s)</p>'
    return (
        pages.table(heads, lines, ("best" if row.best else "" for row in comparison.rows))
        + note
        + "".join(f'<div class="finding critical"><em>failed</em>{html.escape(f)}</div>' for f in comparison.failures)
    )


def _dress(figure: go.Figure, height: int) -> go.Figure:
    axis = {"gridcolor": "rgba(128,136,152,.22)", "zeroline": False}
    figure.update_layout(
        height=height,
        margin={"l": 56, "r": 14, "t": 36, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12},
        hovermode="closest",
        legend={"orientation": "h", "y": -0.16, "yanchor": "top"},
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def _smooth(values: list[float], window: int) -> list[float]:
    out = []
    for i in range(len(values)):
        part = [v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)]
        out.append(sum(part) / len(part) if part else math.nan)
    return out


def _curves(comparison: Comparison) -> go.Figure | None:
    from plotly.subplots import make_subplots

    metric = comparison.task["metric"]
    figure = make_subplots(
        1, 2, subplot_titles=(f"held-out {metric}", "training loss, smoothed"), horizontal_spacing=0.1
    )
    drawn = False
    for index, arm in enumerate(comparison.arms):
        colour, first = COLOURS[index % len(COLOURS)], True
        for seed in comparison.seeds:
            try:
                curve = comparison.curves(arm, seed)
            except KeyError:
                continue
            if not curve["steps"]:
                continue
            drawn = True
            style: dict[str, Any] = {
                "legendgroup": arm,
                "name": arm,
                "mode": "lines",
                "line": {"color": colour, "width": 1.6},
                "opacity": 1.0 if first else 0.55,
            }
            held = curve["metrics"].get(metric, {"steps": [], "values": []})
            tip = f"{arm}, seed {seed}<br>step %{{x}}: %{{y:.4f}}<extra></extra>"
            figure.add_scatter(
                x=held["steps"], y=held["values"], showlegend=first, hovertemplate=tip, row=1, col=1, **style
            )
            stride = max(1, len(curve["steps"]) // 400)
            loss = _smooth(curve["loss"], max(1, len(curve["loss"]) // 40))
            figure.add_scatter(
                x=curve["steps"][::stride], y=loss[::stride], showlegend=False, hovertemplate=tip, row=1, col=2, **style
            )
            first = False
    figure.update_xaxes(title_text="step")
    return _dress(figure, 400) if drawn else None


def _flows(comparison: Comparison) -> go.Figure | None:
    from plotly.subplots import make_subplots

    titles = (
        "signal RMS, at the start",
        "signal RMS, at the end",
        "gradient RMS, at the start",
        "gradient RMS, at the end",
    )
    figure = make_subplots(2, 2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.16)
    drawn = False
    for index, arm in enumerate(comparison.arms):
        for column, moment in enumerate(("start", "end"), 1):
            flow = next(
                (f[moment] for f in comparison.flows.get(arm, {}).values() if moment in f and "rows" in f[moment]), None
            )
            if flow is None:
                continue
            rows = [r for r in flow["rows"] if r.get("kind") == "stream"] or flow["rows"]
            for line, quantity in enumerate(("rms", "grad_rms"), 1):
                values = [r.get(quantity) for r in rows]
                if not any(isinstance(v, (int, float)) and v > 0 for v in values):
                    continue
                drawn = True
                figure.add_scatter(
                    x=list(range(1, len(rows) + 1)),
                    y=[v if isinstance(v, (int, float)) and v > 0 else None for v in values],
                    text=[r["name"] for r in rows],
                    name=arm,
                    legendgroup=arm,
                    showlegend=line == 1 and column == 1,
                    mode="lines+markers",
                    line={"color": COLOURS[index % len(COLOURS)], "width": 1.6},
                    marker={"size": 5},
                    hovertemplate=f"{arm}<br>%{{text}}: %{{y:.3g}}<extra></extra>",
                    row=line,
                    col=column,
                )
    if not drawn:
        return None
    figure.update_yaxes(type="log")
    figure.update_xaxes(title_text="residual block", row=2)
    return _dress(figure, 640)


def _costs(comparison: Comparison) -> go.Figure | None:
    from plotly.subplots import make_subplots

    rows = [row for row in comparison.rows if row.step_seconds is not None]
    if not rows:
        return None
    figure = make_subplots(
        1, 2, subplot_titles=("step, ms (median)", "peak memory of training, MiB"), horizontal_spacing=0.06
    )
    colours = [COLOURS[comparison.arms.index(row.arm) % len(COLOURS)] for row in rows]
    for column, values in enumerate(
        ([1e3 * (row.step_seconds or 0) for row in rows], [(row.peak_memory or 0) / 2**20 for row in rows]), 1
    ):
        figure.add_bar(
            y=[row.arm for row in rows],
            x=values,
            orientation="h",
            marker={"color": colours},
            showlegend=False,
            hovertemplate="%{y}: %{x:.1f}<extra></extra>",
            row=1,
            col=column,
        )
    figure.update_yaxes(showticklabels=False, col=2)  # the arms stand in the same order on the left
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _dress(figure, 110 + 34 * len(rows))


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
    return pages.facts(facts.get("machine") or {}, facts.get("versions") or {}, timing)


def _seconds(comparison: Comparison, arm: str, seed: int) -> float | None:
    try:
        seconds = comparison.curves(arm, seed)["seconds"]
    except KeyError:
        return None
    return seconds[-1] if seconds else None
