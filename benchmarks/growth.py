"""What the probe sees of three placements of the norms at depth 4, 12 and 24, before and after training on stdlib-text.

Pre-LN's stream grows with training, Peri-LN's hardly does, and Post-LN's gradient does not reach the first blocks.
``python benchmarks/growth.py --save growth.html`` also draws variance and gradient by block.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from headway import pages
from headway.claims.byte_lm import Run, train_all

PLACEMENTS = {"pre": "#4c6ef5", "peri": "#2b8a3e", "post": "#e8590c"}


def draw(results: list[dict[str, Any]]) -> str:
    """Variance and gradient norm by block, a column a depth; dotted before and solid after training."""
    from plotly.subplots import make_subplots

    depths = sorted({r["depth"] for r in results})
    figure = make_subplots(2, len(depths), subplot_titles=[f"{depth} blocks" for depth in depths], vertical_spacing=0.1)
    for r in results:
        for (moment, dash), (row, field) in product(
            (("start", "dot"), ("end", "solid")), ((1, "variance"), (2, "gradients"))
        ):
            figure.add_scatter(
                x=list(range(1, r["depth"] + 1)), y=r[moment][field], mode="lines", legendgroup=r["placement"],
                name=f"{r['placement']}, {'before' if moment == 'start' else 'after'} training",
                showlegend=row == 1 and r["depth"] == depths[0], line={"color": PLACEMENTS[r["placement"]], "dash": dash},
                row=row, col=depths.index(r["depth"]) + 1,
            )  # fmt: skip
    axis = {"gridcolor": "rgba(128,136,152,.22)", "zeroline": False}
    figure.update_layout(height=640, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 12})
    figure.update_layout(margin={"l": 56, "r": 14, "t": 36, "b": 44}, legend={"orientation": "h", "y": -0.08})
    figure.update_yaxes(type="log", exponentformat="power", **axis)
    figure.update_xaxes(**axis)
    for row, title in ((1, "variance"), (2, "gradient norm")):
        figure.update_yaxes(title_text=title, row=row, col=1)
    return pages.plot(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--save", type=Path, help="the page with the picture")
    given = parser.parse_args()
    results = train_all(
        [
            Run(placement, given.rate, 0, given.steps, depth=depth, corpus="stdlib-text")
            for depth, placement in product((4, 12, 24), PLACEMENTS)
        ]
    )
    print(
        "blocks  placement    law after training   variance a block   last variance  gradient first / last   held-out loss"
    )
    for r in results:
        start, end = r["start"], r["end"]
        print(
            f"{r['depth']:6}  {r['placement']:9} {end['law']:>21}   {start['slope']:5.2f} to {end['slope']:<8.3g} "
            f"{end['variance'][-1]:12.3g}   {start['gradient_ratio']:5.2f} to {end['gradient_ratio']:<9.2g} {r['held_out']:14.3f}"
        )
    if given.save is not None:
        parts = ["<h1>Growth of the stream by placement of the norms</h1>", draw(results)]
        print(pages.write_page(parts, "headway: growth by placement", given.save))


if __name__ == "__main__":
    main()
