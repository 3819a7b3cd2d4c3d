"""What a comparison shows while it runs: the runs, their epochs and the time left."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lavis_uniadapter.runners import run_folders


class Progress:
    """The runs that are running, by folder, and how many have finished or failed."""

    def __init__(self) -> None:
        self._started: dict[Path, float] = {}
        self._counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def shown(self, console: Console) -> Iterator[None]:
        """Inside, a table is drawn every second on a terminal; elsewhere nothing."""
        if not console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=console, refresh_per_second=1):
            yield

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
            left = _clock(seconds / epochs * (total - epochs)) if epochs and total else ""
            elapsed = _clock(time.time() - started)
            table.add_row(folder.name, f"{epochs}/{total or '?'}", elapsed, left)
        return table


def logged(folder: Path) -> tuple[int, int | None, float]:
    """Epochs done, epochs in all (None while unknown), and seconds so far, by a run's files."""
    epochs, total, seconds = 0, None, 0.0
    config, log = folder / run_folders.CONFIG, folder / run_folders.LOG
    if config.is_file():
        total = json.loads(config.read_text())["run"].get("max_epoch")
    # of LAVIS's runners too, whose log begins with the configuration; the last line may be cut
    with contextlib.suppress(ValueError):
        for values in run_folders.json_values(log.read_text() if log.is_file() else ""):
            epochs += "train_epoch" in values
            seconds += sum(value for key, value in values.items() if key.endswith("_seconds"))
    return epochs, total, seconds


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
