"""What the examples share: counted loops with a progress bar each, which Ctrl-C ends between two steps, and their results."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

INTERRUPTED = 130  # exit status after Ctrl-C


class Loops:
    """Counted loops with a progress bar each. After Ctrl-C a loop ends before its next step, after a second at once.

    ``in_any_process``: whether a flag is set in any of the processes that go through the loops together.
    """

    def __init__(self, totals: dict[str, int], console: Console, in_any_process: Callable[[bool], bool] = bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self.bars = {name: self.progress.add_task(name, total=n, start=False, note="") for name, n in totals.items()}
        self.totals = totals
        self.stopped, self.in_any_process = False, in_any_process

    def __enter__(self) -> Loops:
        self.previous = signal.signal(signal.SIGINT, self._stop)
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        signal.signal(signal.SIGINT, self.previous)

    def finish(self) -> None:
        self.progress.stop()

    def steps(self, name: str) -> Iterator[int]:
        self.progress.start_task(self.bars[name])
        for step in range(self.totals[name]):
            if self.in_any_process(self.stopped):
                return
            yield step
            self.progress.advance(self.bars[name])

    def note(self, name: str, text: str) -> None:
        self.progress.update(self.bars[name], note=text)

    def _stop(self, *_: object) -> None:
        self.stopped = True
        self.progress.console.print("Ctrl-C: finishing this step, then reporting (once more: stop at once)")
        signal.signal(signal.SIGINT, signal.default_int_handler)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of rows with the same keys, at least one."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def show(folder: Path, console: Console, table: Table, *sentences: str) -> None:
    """A table and what it says, into ``table.txt`` and onto the console."""
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=110).print(table, *sentences, sep="\n", highlight=False)
    console.print(table, *sentences, f"\nResults in {folder}", sep="\n", highlight=False)
