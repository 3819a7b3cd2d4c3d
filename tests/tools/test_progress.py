"""What a comparison shows while it runs."""

from __future__ import annotations

import io
import json

from rich.console import Console

from lavis_uniadapter.runners import run_folders
from lavis_uniadapter.tools.compare import progress


def test_progress_shows_running_runs_and_the_time_left(tmp_path):
    folders = [tmp_path / name for name in ("linear-seed1", "lora-seed1")]
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    shown = progress.Progress()
    with shown.shown(console):
        for folder in folders:
            folder.mkdir()
            shown.start(folder)
        config = {"run": {"max_epoch": 5}}
        (folders[0] / "config.json").write_text(json.dumps(config))
        lines = [{"train_epoch": n, "train_seconds": 50.0} for n in range(2)]
        lines += [{"val_epoch": 1, "val_seconds": 20.0}]
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (folders[0] / run_folders.LOG).write_text(log)
        table = shown.table()
        columns = [list(column.cells) for column in table.columns]
        assert columns[0] == ["linear-seed1", "lora-seed1"]
        assert columns[1] == ["2/5", "0/?"]
        assert columns[3] == ["0:03:00", ""]
        shown.end(folders[0], failed=False)
        shown.end(folders[1], failed=True)
        assert shown.table().row_count == 0
    assert "1 finished, 1 failed" in console.file.getvalue()


def test_progress_draws_on_terminals_only(tmp_path):
    console = Console(file=io.StringIO())
    shown = progress.Progress()
    with shown.shown(console):
        shown.start(tmp_path)
    assert not console.file.getvalue()
