"""Signals end commands in one line, and none is lost or handled twice while workers start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from tiny_runs import ROOT, TINY_CLIPS, TRAIN
from torch.utils.data import DataLoader, Dataset

from lavis_uniadapter.common import signals
from lavis_uniadapter.common.signals import SIGNALS, Interrupted, InterruptionWatch
from lavis_uniadapter.datasets.loading import BatchLoader, from_workers
from lavis_uniadapter.datasets.reading import EvaluationItems
from lavis_uniadapter.datasets.shapes import generation
from lavis_uniadapter.runners import launch
from lavis_uniadapter.tasks import UniAdapterRetrievalTask
from uniadapter_cli import main as command

ONE_LINE = {number: (128 + number, f"interrupted by {number.name}\n") for number in SIGNALS}


@pytest.fixture(autouse=True)
def default_handlers():
    """Those of a process in the foreground, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_DFL}
    for number, handler in before.items():
        signal.signal(number, handler)


# --- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_ends_with_one_line(name, number, monkeypatch, capsys):
    def stopped(arguments):
        os.kill(os.getpid(), number)

    function = command.COMMANDS[name][0].partition(":")[2]
    monkeypatch.setattr(command, "import_module", lambda _: SimpleNamespace(**{function: stopped}))
    assert (command.main([name]), capsys.readouterr().err) == ONE_LINE[number]


@pytest.mark.processes
def test_an_import_that_is_interrupted_is_no_traceback():
    code = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name.startswith("torch"):
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
from uniadapter_cli.main import main
sys.exit(main(["train", "shapes_retrieval"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == ONE_LINE[signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_generation_leaves_nothing(number, tmp_path, monkeypatch, capsys):
    write, written = generation.write_mp4, []

    def write_two(path, frames, fps):
        written.append(path)
        if len(written) == 3:
            os.kill(os.getpid(), number)
        write(path, frames, fps)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "write_mp4", write_two)
    try:
        assert command.main(["train", "shapes_retrieval", *TINY_CLIPS]) == 128 + number
    finally:
        launch.destroy_process_group()
    assert capsys.readouterr().err.endswith(ONE_LINE[number][1])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_evaluation_ends_with_one_line(run, monkeypatch, capsys, tiny_cache):
    evaluation = UniAdapterRetrievalTask.evaluation

    def interrupted(task, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluation(task, *args, **kwargs)

    monkeypatch.setattr(UniAdapterRetrievalTask, "evaluation", interrupted)
    options = [*TINY_CLIPS, f"run.cache_root={tiny_cache}", "run.num_workers=0"]
    recipe = str(TRAIN / "shapes_retrieval.yaml")
    assert command.main(["evaluate", recipe, *options]) == 130
    error = capsys.readouterr().err
    assert error.endswith(ONE_LINE[signal.SIGINT][1]) and "Traceback" not in error


# --- handlers -----------------------------------------------------------------------------------


def test_ignored_signals_stay_ignored():
    """``nohup`` ignores SIGHUP, and a shell SIGINT of what it runs in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watch = InterruptionWatch()
    with signals.handled_by(watch.note):
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.requested == "SIGTERM"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_second_ctrl_c_ends_at_once():
    watch = InterruptionWatch()
    with signals.handled_by(watch.note), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


# --- workers ------------------------------------------------------------------------------------


class Handlers(Dataset):
    """Items that say how their process treats signals."""

    text = ()

    def __len__(self):
        return 2

    def __getitem__(self, index):
        ignored = [each.name for each in SIGNALS if signal.getsignal(each) == signal.SIG_IGN]
        return {"ignored": sorted(ignored), "index": index}


at_fork: list = []
os.register_at_fork(before=lambda: at_fork and at_fork.pop()())


def test_a_signal_while_workers_start_reaches_the_handler_afterwards():
    """What a handler raises in a fork is dropped."""
    loader = DataLoader(Handlers(), batch_size=None, num_workers=1)
    with signals.handled_by(signals.interrupt):
        at_fork.append(lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            list(from_workers(loader, timeout=60))
    assert not at_fork


def test_workers_leave_what_a_terminal_sends_to_the_main_process():
    items = EvaluationItems(Handlers(), 1, False)
    loader = BatchLoader(items, range(2), batch_size=2, num_workers=1, collate_fn=list)
    (batch,) = loader
    assert [item["ignored"] for item in batch.samples] == [["SIGHUP", "SIGINT"]] * 2


class ReadyAfter(Handlers):
    """Items that take until a file is there."""

    def __init__(self, file):
        self.file = file

    def __getitem__(self, index):
        while not self.file.exists():
            time.sleep(0.01)
        return super().__getitem__(index)


def test_waiting_for_data_ends_with_a_signal(tmp_path):
    watch = InterruptionWatch()
    watch.requested = "SIGTERM"
    polled = tmp_path / "polled"

    def poll():
        polled.touch()
        watch.check()

    items = EvaluationItems(ReadyAfter(polled), 1, False)
    loader = BatchLoader(items, range(2), batch_size=1, num_workers=1, timeout=30, poll=poll)
    with pytest.raises(Interrupted, match="SIGTERM"):
        next(iter(loader))
