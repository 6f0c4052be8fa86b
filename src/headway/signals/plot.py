"""Pictures of a flow: signal, gradient, likeness and memory by depth; and of a watched run: layers by steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from headway.signals.flow import Flow, size_text
from headway.signals.row import Row

COLOURS = {
    "stream": "#4c6ef5",
    "post": "#f08c00",
    "pre": "#12b886",
    "norm": "#ae3ec9",
    "skip": "#e64980",
    "other": "#868e96",
}
WORDS = {
    "stream": "residual stream",
    "post": "activations",
    "pre": "linear, conv, attention",
    "norm": "normalisers",
    "skip": "long skips",
    "other": "other modules",
}
PANELS = (
    ("Signal", "RMS", "rms", True),
    ("Gradient", "RMS", "grad_rms", True),
    ("Likeness of samples", "mean cosine", "cos", False),
    ("Kept for backward", "MiB", "saved_bytes", False),
)
QUIET = "rgba(128,128,128,0.22)"


def figure(flow: Flow) -> go.Figure:
    """Four panels over the order of execution; one colour a kind of module; names and numbers on hover."""
    shown = [p for p in PANELS if any(_usable(_value(row, p[2])) for row in flow.rows)]
    plot = make_subplots(rows=len(shown) or 1, cols=1, shared_xaxes=True, vertical_spacing=0.055)
    order = {id(row): i for i, row in enumerate(flow.rows)}
    for panel, (title, unit, column, log) in enumerate(shown, 1):
        for kind in COLOURS:
            rows = [row for row in flow.of(kind) if _usable(_value(row, column))]
            if not rows or (column == "saved_bytes" and kind == "stream" and len(flow.of("pre")) > 0):
                continue
            plot.add_trace(_trace(rows, order, column, kind, first=panel == 1), row=panel, col=1)
        if column == "cos":
            axes = {"xref": "paper", "yref": "y" if panel == 1 else f"y{panel}"}
            line = {"dash": "dot", "width": 1, "color": "#e03131"}
            plot.add_shape(type="line", x0=0, x1=1, y0=0.95, y1=0.95, line=line, **axes)
            low = min(0.0, *(row.cos for row in flow.rows if _usable(row.cos))) if flow.rows else 0.0
            plot.update_yaxes(range=[low - 0.04, 1.04], row=panel, col=1)
        if log and _spread([_value(row, column) for row in flow.rows]) > 3:
            plot.update_yaxes(type="log", exponentformat="power", dtick=_decades(flow.rows, column), row=panel, col=1)
        elif column != "cos":
            plot.update_yaxes(rangemode="tozero", row=panel, col=1)
        plot.update_yaxes(title_text=unit, row=panel, col=1)
        axis = "" if panel == 1 else str(panel)
        plot.add_annotation(
            text=f"<b>{title}</b>",
            x=0,
            xref="paper",
            xanchor="left",
            y=1,
            yref=f"y{axis} domain",
            yanchor="bottom",
            showarrow=False,
        )
    plot.update_xaxes(title_text="order of execution", row=len(shown) or 1, col=1)
    _dress(plot, 210 * max(1, len(shown)) + 90)
    return plot


def _trace(rows: Sequence[Row], order: dict[int, int], column: str, kind: str, first: bool) -> go.Scatter | go.Bar:
    hover = [
        f"<b>{row.name}</b> ({row.module}, {'×'.join(map(str, row.shape))})<br>RMS {row.rms:.3g}, largest {row.absmax:.3g}, "
        f"kurtosis {row.kurtosis:.3g}, zeros {100 * row.frac_zero:.0f}%<br>cosine {row.cos:.3f}, stable rank {row.stable_rank:.2f} "
        f"of {row.samples}<br>gradient RMS {row.grad_rms:.3g}, kept {size_text(row.saved_bytes)}"
        for row in rows
    ]
    x, y = [order[id(row)] for row in rows], [_value(row, column) for row in rows]
    common = {
        "x": x,
        "y": y,
        "name": WORDS[kind],
        "legendgroup": kind,
        "showlegend": first,
        "hovertext": hover,
        "hoverinfo": "text",
    }
    if column == "saved_bytes":
        return go.Bar(**common, width=0.8, marker={"color": COLOURS[kind], "line": {"width": 0}})
    strong = kind == "stream"
    return go.Scatter(
        **common,
        mode="lines+markers",
        line={"color": COLOURS[kind], "width": 3 if strong else 1},
        marker={"size": 7 if strong else 5, "color": COLOURS[kind]},
        opacity=1.0 if strong else 0.8,
    )


def history_figure(records: Sequence[tuple[int, Flow]]) -> go.Figure:
    """Heat maps, layers (down) by watched steps (across): log10 of the signal's and the gradient's RMS, and mean cosine."""
    panels = (
        ("Signal, log10 RMS", "rms", True),
        ("Gradient, log10 RMS", "grad_rms", True),
        ("Likeness of samples", "cos", False),
    )
    plot = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07, subplot_titles=[p[0] for p in panels]
    )
    if not records:
        return plot
    last = records[-1][1]
    # a deep model is told by its blocks; every module of it would be a wall of stripes
    many = len(last.rows) > 40 and len(last.of("stream")) > 1
    names = [row.name for row in (last.of("stream") if many else last.rows)]
    steps = [str(step) for step, _ in records]
    for panel, (_, column, log) in enumerate(panels, 1):
        columns = []
        for _, flow in records:
            values = {row.name: getattr(row, column) for row in flow.rows}
            columns.append([_log(values.get(name, math.nan)) if log else values.get(name, math.nan) for name in names])
        grid = [[column_[i] for column_ in columns] for i in range(len(names))]
        bar = {"len": 0.27, "y": 1 - (panel - 0.5) / 3, "thickness": 12}
        plot.add_trace(go.Heatmap(z=grid, x=steps, y=names, colorscale="Viridis", colorbar=bar), row=panel, col=1)
    plot.update_yaxes(autorange="reversed", automargin=True, tickfont={"size": 10})
    plot.update_xaxes(title_text="step", type="category", row=3, col=1)
    _dress(plot, 3 * max(200, 14 * len(names)) + 120)
    return plot


def _dress(plot: go.Figure, height: int) -> None:
    plot.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": "#868e96"},
        margin={"l": 62, "r": 12, "t": 62, "b": 48},
        legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top", "x": 0},
        hovermode="closest",
        hoverlabel={"align": "left"},
        bargap=0.15,
        barmode="overlay",
    )
    plot.update_xaxes(gridcolor=QUIET, zeroline=False)
    plot.update_yaxes(gridcolor=QUIET, zeroline=False)


def _value(row: Row, column: str) -> float:
    return row.saved_bytes / 2**20 if column == "saved_bytes" else getattr(row, column)


def _usable(value: float) -> bool:
    return math.isfinite(value) and value != 0


def _log(value: float) -> float:
    return math.log10(value) if value > 0 and math.isfinite(value) else math.nan


def _spread(values: Sequence[float]) -> float:
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    return max(positive) / min(positive) if positive else 1.0


def _decades(rows: Sequence[Row], column: str) -> int:
    return max(1, math.ceil(math.log10(_spread([_value(row, column) for row in rows])) / 5))
