"""What a comparison shows while it runs: the runs, their epochs and the time left."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lavis_uniadapter.runners import run_folders


class Progress:
    """A table of the running runs on a terminal, renewed every second; elsewhere nothing.

    Args:
        console: where it is drawn.
    """

    def __init__(self, console: Console | None = None):
        console = console or Console()
        self._started: dict[Path, float] = {}
        self._counts: Counter[str] = Counter()
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=1)
        self._visible = console.is_terminal

    def __enter__(self) -> Progress:
        if self._visible:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def start(self, folder: Path) -> None:
        """Note that a run has started."""
        self._started[folder] = time.time()

    def end(self, folder: Path, failed: bool) -> None:
        """Note that a run has ended, whether or not it had started here."""
        self._started.pop(folder, None)
        self._counts["failed" if failed else "finished"] += 1

    def table(self) -> Table:
        """A row for each running run."""
        counts = ", ".join(f"{number} {state}" for state, number in self._counts.items())
        table = Table("run", "epoch", "elapsed", "time left", caption=counts or None)
        for folder, started in list(self._started.items()):
            epochs, total, seconds = logged(folder)
            elapsed = time.time() - started
            left = "" if not epochs or not total else _minutes(seconds / epochs * (total - epochs))
            table.add_row(folder.name, f"{epochs}/{total or '?'}", _minutes(elapsed), left)
        return table


def logged(folder: Path) -> tuple[int, int | None, float]:
    """Epochs done, epochs in all (None while unknown), and seconds so far, by a run's files."""
    epochs, total, seconds = 0, None, 0.0
    config = folder / run_folders.CONFIG
    if config.is_file():
        total = json.loads(config.read_text())["run"].get("max_epoch")
    for values in run_folders.logged(folder):
        epochs += "train_epoch" in values
        seconds += sum(value for key, value in values.items() if key.endswith("_seconds"))
    return epochs, total, seconds


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
