"""What a comparison shows while it runs."""

from __future__ import annotations

import io
import json

from rich.console import Console

from lavis_uniadapter.runners import run_folders
from lavis_uniadapter.tools.compare.progress import RunsProgress


def test_progress_shows_running_runs_and_their_epochs(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with RunsProgress(tmp_path, console) as progress:
        for name in ("linear-seed1", "lora-seed1"):
            (tmp_path / name).mkdir()
            progress.add_task(name, total=None)
        config = {"run": {"max_epoch": 5}}
        (tmp_path / "linear-seed1" / run_folders.CONFIG).write_text(json.dumps(config))
        log = tmp_path / "linear-seed1" / run_folders.LOG
        for epoch in range(3):
            with open(log, "a") as file:
                file.write(json.dumps({"train_epoch": epoch, "train_loss": 1.0}) + "\n")
            progress.refresh()
        first, second = progress.tasks
        assert (first.completed, first.total, second.completed, second.total) == (3, 5, 0, None)
        assert first.time_remaining is not None and second.time_remaining is None
    assert "linear-seed1" in console.file.getvalue() and "3/5" in console.file.getvalue()


def test_progress_draws_on_terminals_only(tmp_path):
    console = Console(file=io.StringIO())
    with RunsProgress(tmp_path, console) as progress:
        progress.add_task("linear-seed1", total=None)
    assert not console.file.getvalue().strip()
