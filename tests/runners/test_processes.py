"""Runs in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT

from lavis_uniadapter.runners import run_checkpoints
from lavis_uniadapter.runners.run_checkpoints import LATEST

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists threads through /proc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What ``process_runs.py`` leaves."""
    folder = tmp_path_factory.mktemp("process_runs")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/process_runs.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,  # of ranks that wait for each other
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_evaluate_as_one(run, folder, processes):
    """An odd gallery, so the shares are uneven; the loader whole on each rank, or sharded."""
    alone = run("shapes_retrieval", evaluate=True).metrics["test"]
    there = folder / f"output/shapes_retrieval/{processes}"
    together = json.loads((there / "result/metrics_test_epoch_best.json").read_text())
    assert together == alone


def test_two_processes_stop_at_the_same_step_and_resume(folder):
    """In one folder, averages and queues of every rank included."""
    there = folder / "resumed"
    printed = [(there / f"rank{rank}.out").read_text() for rank in (0, 1)]
    assert [text.count("epoch 1/2: loss") for text in printed] == [2, 0]
    assert "a signal to another rank: the run was stopped before its end" in printed[0]
    assert [(there / f"left{rank}.txt").read_text() for rank in (0, 1)] == ["[]", "[]"]
    runs = there / "output/shapes_retrieval"
    assert {path.name for path in runs.iterdir()} == {"whole", "stopped"}
    stopped = run_checkpoints.read(there / "stopped.pth")
    steps = {state["progress"]["step"] for state in stopped["ranks"]}
    assert len(stopped["ranks"]) == 2 and len(steps) == 1
    expected, actual = (
        run_checkpoints.read(runs / name / LATEST)["model"] for name in ("whole", "stopped")
    )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)


def test_ranks_wait_long_for_what_the_main_process_does_alone(folder):
    for rank in (0, 1):
        printed = (folder / f"waiting/rank{rank}.out").read_text()
        assert "the work is done, 2 ranks" in printed
