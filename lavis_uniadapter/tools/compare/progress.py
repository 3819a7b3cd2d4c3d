"""What a comparison shows while it runs: the runs, their epochs and the time left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rich import progress
from rich.console import Console, RenderableType

from lavis_uniadapter.runners import run_folders


class RunsProgress(progress.Progress):
    """A line for each running run, on a terminal; elsewhere nothing.

    A task's description is the name of its run folder below ``folder``.
    """

    def __init__(self, folder: Path, console: Console | None = None):
        console = console or Console()
        super().__init__(
            progress.TextColumn("{task.description}"),
            progress.MofNCompleteColumn(),
            progress.TextColumn("epochs"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=1,
            speed_estimate_period=1e9,  # seconds; all epochs count
        )
        self._folder = folder

    def get_renderables(self) -> Iterable[RenderableType]:
        """The lines, with the epochs that the runs have logged by now."""
        for task in self.tasks:
            done, total = logged_epochs(self._folder / task.description)
            self.update(task.id, completed=done, total=total)
        return super().get_renderables()


def logged_epochs(folder: Path) -> tuple[int, int | None]:
    """Epochs done, and in all (None while unknown), by a run's files."""
    config, log = folder / run_folders.CONFIG, folder / run_folders.LOG
    total = json.loads(config.read_text())["run"].get("max_epoch") if config.is_file() else None
    return log.read_text().count('"train_epoch"') if log.is_file() else 0, total
