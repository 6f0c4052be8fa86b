"""The result of a comparison: rows, curves, flows and facts out of the store, a table, plain data, and a page."""

from __future__ import annotations

import html
import itertools
import math
import os
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from headway.trials.facts import TrainingMemory
from headway.trials.store import Store

_WARM_UP = TrainingMemory.STEPS.stop + 2
"""Steps left out of the step time: warm-up, and those over which memory is sampled."""


@dataclass(frozen=True)
class Row:
    """One arm over its seeds.

    Attributes:
        arm: its label.
        metric: which number ``mean`` is of (the task's).
        mean, spread: of that number at the end of training, over the finished runs; the spread is the sample standard
            deviation, None with fewer than two.
        best: whether no other arm has a better mean.
        values: seed -> that number.
        final_loss, final_loss_spread: of the training loss over the last tenth of the points.
        step_seconds: median seconds of a training step, over the seeds.
        step_ratio: median over the seeds of this arm's step time over the first arm's.
        peak_memory: largest over the seeds, in bytes; see the fact ``peak_memory_method``.
        parameters: how many the changed model has.
        changes: what the arm changed: rows of the plan (name, before, after, technique).
        finished, diverged, failed, waiting: how many runs.
        error: the first failed run's reason.
    """

    arm: str
    metric: str
    mean: float | None
    spread: float | None
    values: dict[int, float]
    final_loss: float | None
    final_loss_spread: float | None
    step_seconds: float | None
    step_ratio: float | None
    peak_memory: int | None
    parameters: int | None
    changes: list[dict[str, Any]]
    finished: int
    diverged: int
    failed: int
    waiting: int
    error: str | None
    best: bool = False

    def changed(self) -> str:
        """What changed, in a few words: ``12 x LayerNorm -> RMSNorm``, ``6 x TransformerBlock(placement='pre' -> 'peri')``."""
        kinds = Counter(_change(change["before"], change["after"]) for change in self.changes)
        shown = [f"{count} x {change}" for change, count in kinds.items()]
        return "; ".join(shown[:2]) + (f"; {len(shown) - 2} more kinds" if len(shown) > 2 else "")


@dataclass
class Comparison:
    """What a store holds about one comparison. ``print`` shows the table; a notebook shows it as HTML.

    Attributes:
        data: the store's record (see :meth:`headway.trials.store.Store.comparison`).
        rows: one :class:`Row` an arm, in the order asked for.
    """

    data: dict[str, Any]
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self._runs = {(run["arm"], run["seed"]): run for run in self.data["runs"]}
        self.rows = self._rows()

    @classmethod
    def load(cls, store: str | os.PathLike[str], number: int | None = None) -> Comparison:
        """The comparison in a store that was asked for last, or the one of that number; finished or not.

        Raises:
            StoreError: no such file, or nothing in it.
        """
        from headway.trials.store import StoreError

        if not os.path.exists(store):
            raise StoreError(f"there is no store {os.fspath(store)}; run a comparison first")
        book = Store(store)
        try:
            return cls(book.comparison(number))
        finally:
            book.close()

    # --- what was asked

    @property
    def task(self) -> dict[str, Any]:
        """Name, metric, lower_is_better and settings of the task."""
        return {**self.data["request"]["task"], "settings": self.data["request"]["settings"]}

    @property
    def arms(self) -> list[str]:
        """Labels, in the order asked for."""
        return [label for label, _ in self.data["request"]["arms"]]

    @property
    def seeds(self) -> list[int]:
        """The seeds."""
        return list(self.data["request"]["seeds"])

    @property
    def command(self) -> str:
        """The command that repeats this."""
        return self.data["command"]

    # --- what came out

    @property
    def failures(self) -> list[str]:
        """Why runs failed, one sentence each."""
        return [
            f"{run['arm']}, seed {run['seed']}: {run['error']}"
            for run in self.data["runs"]
            if run["status"] == "failed"
        ]

    @property
    def finished(self) -> bool:
        """Whether every run is done."""
        return all(run["status"] == "finished" for run in self.data["runs"])

    def curves(self, arm: str, seed: int) -> dict[str, Any]:
        """``steps``, ``seconds`` (of training so far) and ``loss`` at every step, and ``metrics``: name -> ``steps`` and
        ``values`` where the held-out measures were taken.

        Raises:
            KeyError: no such arm or seed.
        """
        points = self._run(arm, seed)["points"]
        metrics: dict[str, dict[str, list]] = {}
        for step, _, _, measured in points:
            for name, value in (measured or {}).items():
                series = metrics.setdefault(name, {"steps": [], "values": []})
                series["steps"].append(step)
                series["values"].append(value)
        return {
            "steps": [point[0] for point in points],
            "seconds": [point[1] for point in points],
            "loss": [math.nan if point[2] is None else point[2] for point in points],
            "metrics": metrics,
        }

    @property
    def flows(self) -> dict[str, dict[int, dict[str, Any]]]:
        """arm -> seed -> "start" and "end" -> the probe's plain data, or ``{"note": why there is none}``."""
        return self._by_arm("probes")

    @property
    def facts(self) -> dict[str, dict[int, dict[str, Any]]]:
        """arm -> seed -> parameters, plan, peak_memory, machine, versions, steps, diverged."""
        return self._by_arm("facts")

    def table(self) -> Table:
        """The summary, for a terminal."""
        task, request = self.task, self.data["request"]
        better = "lower" if task["lower_is_better"] else "higher"
        title = f"{task['name']}: {request['budget']}, batch {request['batch_size']}, {request['precision']}"
        table = Table(title=title, caption=self._caption(), title_justify="left", caption_justify="left")
        table.add_column("arm", overflow="fold")
        for heading in (f"{task['metric']} ({better} is better)", "training loss", "step", "peak memory"):
            table.add_column(heading, justify="right")
        table.add_column("changed", overflow="fold")
        for row in self.rows:
            mean = with_spread(row.mean, row.spread)
            table.add_row(
                row.arm,
                f"[bold]{mean}[/bold]" if row.best else mean,
                with_spread(row.final_loss, row.final_loss_spread),
                "-" if row.step_seconds is None else f"{1e3 * row.step_seconds:.1f} ms{_ratio(row.step_ratio)}",
                "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB",
                _state(row) or row.changed() or "-",
            )
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self.table())
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        headings = ["arm", self.task["metric"], "training loss", "step", "peak memory", "changed"]
        lines = []
        for row in self.rows:
            cells = [
                row.arm,
                with_spread(row.mean, row.spread),
                with_spread(row.final_loss, row.final_loss_spread),
                "-" if row.step_seconds is None else f"{1e3 * row.step_seconds:.1f} ms{_ratio(row.step_ratio)}",
                "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB",
                _state(row) or row.changed() or "-",
            ]
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
        caption = html.escape(f"{self.task['name']}: {self._caption()}")
        return (
            f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON (numbers that are not finite are None)."""
        return _finite(
            {
                "task": self.task,
                "request": self.data["request"],
                "command": self.command,
                "store": self.data["store"],
                "created": self.data["created"],
                "arms": self.arms,
                "seeds": self.seeds,
                "finished": self.finished,
                "failures": self.failures,
                "rows": [{**asdict(row), "changed": row.changed()} for row in self.rows],
                "curves": {
                    arm: {seed: self.curves(arm, seed) for seed in self.seeds if (arm, seed) in self._runs}
                    for arm in self.arms
                },
                "flows": self.flows,
                "facts": self.facts,
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report, one self-contained HTML file."""
        from headway.trials.report import write

        write(self, path)

    # --- how

    def _run(self, arm: str, seed: int) -> dict[str, Any]:
        try:
            return self._runs[arm, seed]
        except KeyError:
            raise KeyError(
                f"no run of arm {arm!r} with seed {seed}; arms are {self.arms}, seeds {self.seeds}"
            ) from None

    def _by_arm(self, what: str) -> dict[str, dict[int, dict[str, Any]]]:
        return {
            arm: {seed: self._runs[arm, seed][what] for seed in self.seeds if (arm, seed) in self._runs}
            for arm in self.arms
        }

    def _rows(self) -> list[Row]:
        metric, lower = self.task["metric"], self.task["lower_is_better"]
        first = self.arms[0]
        rows = [self._row(arm, metric, first) for arm in self.arms]
        means = [row.mean for row in rows if row.mean is not None and math.isfinite(row.mean)]
        best = (min(means) if lower else max(means)) if means else None
        return [Row(**{**vars(row), "best": best is not None and row.mean == best}) for row in rows]

    def _row(self, arm: str, metric: str, first: str) -> Row:
        runs = [self._runs[arm, seed] for seed in self.seeds if (arm, seed) in self._runs]
        done = [run for run in runs if run["status"] == "finished"]
        values = {run["seed"]: _last(run, metric) for run in done if "diverged" not in run["facts"]}
        values = {seed: value for seed, value in values.items() if value is not None}
        losses = [loss for run in done if "diverged" not in run["facts"] and (loss := _final_loss(run)) is not None]
        times = {run["seed"]: time for run in runs if (time := step_seconds(run["points"])) is not None}
        others = {
            seed: time
            for seed in times
            if (run := self._runs.get((first, seed))) and (time := step_seconds(run["points"])) is not None
        }
        ratios = [times[seed] / others[seed] for seed in others]
        peaks = [run["facts"]["peak_memory"] for run in runs if "peak_memory" in run["facts"]]
        known = next((run["facts"] for run in runs if "parameters" in run["facts"]), {})
        plan = known.get("plan")
        return Row(
            arm,
            metric,
            _mean(list(values.values())),
            _spread(list(values.values())),
            values,
            _mean(losses),
            _spread(losses),
            statistics.median(times.values()) if times else None,
            statistics.median(ratios) if ratios else None,
            max(peaks) if peaks else None,
            known.get("parameters"),
            plan["changes"] if plan else [],
            len(done),
            sum("diverged" in run["facts"] for run in done),
            sum(run["status"] == "failed" for run in runs),
            sum(run["status"] in ("waiting", "running") for run in runs),
            next((run["error"] for run in runs if run["error"]), None),
        )

    def _caption(self) -> str:
        seeds = len(self.seeds)
        spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        return f"{spread}; step time: median, and its ratio to {self.arms[0]}"


def step_seconds(points: list[tuple]) -> float | None:
    """Median seconds of a training step, without the first ones (warm-up, and those over which memory is sampled)."""
    marks = [0.0, *(point[1] for point in points)]
    steps = [later - earlier for earlier, later in itertools.pairwise(marks)]
    steps = steps[_WARM_UP:] or steps[1:] or steps
    return statistics.median(steps) if steps else None


def with_spread(mean: float | None, spread: float | None) -> str:
    """``1.234 ± 0.005``, with as many digits as the spread bears; ``-`` for nothing."""
    if mean is None:
        return "-"
    if spread is None or spread == 0 or not math.isfinite(spread):
        return f"{mean:.4g}" + ("" if spread is None else " ± 0")
    digits = max(0, min(6, 1 - math.floor(math.log10(spread))))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _last(run: dict[str, Any], metric: str) -> float | None:
    return next((point[3][metric] for point in reversed(run["points"]) if point[3] and metric in point[3]), None)


def _final_loss(run: dict[str, Any]) -> float | None:
    losses = [point[2] for point in run["points"] if point[2] is not None]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2f}x)"


def _change(before: str, after: str) -> str:
    """Names of modules, or what is set otherwise in modules of one name."""
    (head, _, old), (name, _, new) = before.partition("("), after.partition("(")
    settings = list(zip(old[:-1].split(", "), new[:-1].split(", "), strict=False))
    differ = [f"{was} -> {now.rpartition('=')[2]}" for was, now in settings if was != now]
    alike = head == name and all(was.partition("=")[0] == now.partition("=")[0] for was, now in settings)
    return f"{head}({', '.join(differ)})" if alike and len(differ) == 1 else f"{head} -> {name}"


def _state(row: Row) -> str:
    """What is out of the ordinary about an arm's runs."""
    parts = []
    if row.failed:
        parts.append(f"{row.failed} failed ({row.error})")
    if row.diverged:
        parts.append(f"{row.diverged} diverged")
    if row.waiting:
        parts.append(f"{row.waiting} not finished")
    return ", ".join(parts)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
