"""The report of a probe: what every layer does to the signal and to its gradient, how it grows, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.signals.findings import Finding
from headway.signals.growth import Growth, growth
from headway.signals.row import Row

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

COLUMNS = (
    "name",
    "kind",
    "shape",
    "rms",
    "std",
    "kurtosis",
    "absmax",
    "frac_zero",
    "cos",
    "stable_rank",
    "grad_rms",
    "saved_bytes",
)
_TITLES = {
    "frac_zero": "zero",
    "stable_rank": "rank",
    "grad_rms": "grad rms",
    "grad_norm": "grad norm",
    "saved_bytes": "saved",
    "weight_norm": "|W|",
    "effective_lr": "eff. lr",
    "between_tokens": "tok cos",
}


@dataclass
class Flow:
    """How the signal flows through a model, and its gradient back.

    Attributes:
        rows: one :class:`Row` a module call, in order of execution.
        growth: the law by which the signal grows with depth.
        findings: what is wrong, the measured number, the techniques that answer it; ``verdict`` is another name for it.
        loss: the loss of the probed pass (NaN without one).
        objective: where the gradient comes from, in words.
        saved_bytes: all that autograd kept for backward, parameters not counted.
        model: class of the model.
        notes: what a reader should know about the numbers.
    """

    rows: list[Row]
    growth: Growth
    findings: list[Finding]
    loss: float = math.nan
    objective: str = ""
    saved_bytes: int = 0
    model: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> list[Finding]:
        """The findings."""
        return self.findings

    def __getitem__(self, name: str) -> Row:
        """The row of that name; KeyError with near names otherwise."""
        for row in self.rows:
            if row.name == name:
                return row
        import difflib

        near = difflib.get_close_matches(name, [row.name for row in self.rows], n=3, cutoff=0.3)
        raise KeyError(f"no row is called {name!r}; near ones: {', '.join(near) or 'none'}")

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind, in order of execution."""
        return [row for row in self.rows if row.kind == kind]

    def table(self, columns: Sequence[str] = COLUMNS, kinds: Sequence[str] | None = None) -> str:
        """The rows as an aligned table; ``columns`` are names of :class:`Row` fields."""
        rows = [row for row in self.rows if kinds is None or row.kind in kinds]
        return aligned([[_TITLES.get(c, c) for c in columns], *([_cell(row, c) for c in columns] for row in rows)])

    def __str__(self) -> str:
        lines = [self.table(), "", str(self.growth)]
        if self.objective:
            lines.append(f"gradient of {self.objective}" + (f" = {self.loss:.4g}" if math.isfinite(self.loss) else ""))
        lines += [str(finding) for finding in self.findings] or ["nothing to object to"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON (NaN and infinity become null)."""
        return {
            "model": self.model,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "objective": self.objective,
            "saved_bytes": self.saved_bytes,
            "growth": self.growth.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
            "verdict": [str(finding) for finding in self.findings],
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Flow:
        """The flow that ``to_dict`` wrote."""
        rows = [Row.from_dict(row) for row in data["rows"]]
        found = []
        for finding in data["findings"]:
            value = math.nan if finding["value"] is None else finding["value"]
            found.append(Finding(**{**finding, "value": value, "techniques": tuple(finding["techniques"])}))
        loss = math.nan if data.get("loss") is None else data["loss"]
        known = {key: data.get(key, default) for key, default in (("objective", ""), ("saved_bytes", 0), ("model", ""))}
        return cls(rows, growth(rows), found, loss, notes=list(data.get("notes", [])), **known)

    def to_pandas(self) -> pandas.DataFrame:
        """One line a row. Raises ImportError where pandas is not installed."""
        from dataclasses import asdict

        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])

    def compare(self, other: Flow, columns: Sequence[str] = ("rms", "cos", "grad_rms")) -> FlowComparison:
        """This flow beside another one, row by row of the same name."""
        return FlowComparison(self, other, tuple(columns))

    def plot(self) -> plotly.graph_objects.Figure:
        """Signal, gradient, likeness and memory by depth, as a plotly figure."""
        from headway.signals.plot import figure

        return figure(self)

    def save(self, path: str | Path) -> Path:
        """Writes one self-contained HTML page (no network needed) and returns its path."""
        from headway.signals.page import write

        return write(self, path)


@dataclass(frozen=True)
class FlowComparison:
    """Two flows side by side, row by row of the same name.

    Attributes:
        here, there: the two flows.
        columns: the columns compared.
    """

    here: Flow
    there: Flow
    columns: tuple[str, ...]

    @property
    def rows(self) -> list[tuple[str, dict[str, tuple[float, float]]]]:
        """(name, {column: (here, there)}) of the names both have."""
        others = {row.name: row for row in self.there.rows}
        return [
            (row.name, {c: (getattr(row, c), getattr(others[row.name], c)) for c in self.columns})
            for row in self.here.rows
            if row.name in others
        ]

    @property
    def only_here(self) -> list[str]:
        """Names that the other flow does not have."""
        names = {row.name for row in self.there.rows}
        return [row.name for row in self.here.rows if row.name not in names]

    @property
    def only_there(self) -> list[str]:
        """Names that only the other flow has."""
        names = {row.name for row in self.here.rows}
        return [row.name for row in self.there.rows if row.name not in names]

    def __str__(self) -> str:
        head = ["name", *(text for c in self.columns for text in (_TITLES.get(c, c), "other", "ratio"))]
        lines = [head]
        for name, values in self.rows:
            cells = [name]
            for a, b in values.values():
                ratio = a / b if b else math.nan
                cells += [_number(a), _number(b), _number(ratio)]
            lines.append(cells)
        text = aligned(lines)
        for title, names in (("only here", self.only_here), ("only in the other", self.only_there)):
            if names:
                text += f"\n{title}: {', '.join(names)}"
        return f"{text}\nhere:  {self.here.growth}\nother: {self.there.growth}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, text to the left and numbers to the right; the first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = [not any(_is_number(line[i]) for line in lines[1:]) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if text else c.rjust(w) for c, w, text in zip(line, widths, left, strict=True)).rstrip()
        for line in lines
    )


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())


def _cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    if column == "shape":
        return "x".join(str(size) for size in value)
    if column == "saved_bytes":
        return size_text(value) if value else "-"
    if isinstance(value, float):
        return f"{100 * value:.0f}%" if column == "frac_zero" and math.isfinite(value) else _number(value)
    return str(value)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if 0.01 <= abs(value) < 100 else f"{value:.3g}"


def size_text(size: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
