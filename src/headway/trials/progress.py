"""Progress bars with the time left; on anything that is no terminal, a line for each finished run."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Context manager that shows how far a comparison is.

    Args:
        labels: run number -> what it is called.
        done: run number -> share done already (0 to 1).
        title: of the whole.
        show: False shows nothing; None shows bars on a terminal and lines elsewhere.
    """

    def __init__(
        self, labels: Mapping[int, str], done: Mapping[int, float], title: str, show: bool | None = None
    ) -> None:
        self.labels, self.shares, self.show = dict(labels), {run: done.get(run, 0.0) for run in labels}, show
        self.console = Console(stderr=True)
        self.bars = show is not False and self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.bars,
            # Arms differ in speed, so the estimate looks back over several runs.
            speed_estimate_period=600.0,
        )
        self.title = title
        self._lines: dict[int, TaskID] = {}

    def __enter__(self) -> Display:
        self.progress.start()
        # In thousandths of a run, so that the estimate moves within runs.
        self._all = self.progress.add_task(self.title, total=len(self.labels) * 1000, completed=self._total())
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, run: int, share: float) -> None:
        """Run ``run`` is now ``share`` done."""
        before, self.shares[run] = self.shares[run], share
        self.progress.update(self._all, completed=self._total())
        if run not in self._lines and share < 1.0:
            self._lines[run] = self.progress.add_task(self.labels[run], total=1000)
        if run in self._lines:
            self.progress.update(self._lines[run], completed=round(1000 * share), visible=share < 1.0)
        if share >= 1.0 > before and not self.bars and self.show is not False:
            finished = sum(value >= 1.0 for value in self.shares.values())
            print(
                f"{self.title}: {self.labels[run]} finished ({finished} of {len(self.labels)})",
                file=sys.stderr,
                flush=True,
            )

    def say(self, sentence: str) -> None:
        """A sentence above the bars."""
        if self.show is not False:
            self.console.print(sentence, highlight=False, markup=False)

    def _total(self) -> int:
        return round(1000 * sum(self.shares.values()))
