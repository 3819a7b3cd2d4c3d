"""Run folders: chosen, left alone, not writable, and on disks that are full."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from tiny_runs import TINY_CLIPS, TINY_RUN, TRAIN

from lavis_uniadapter.common import atomic
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.runners import launch, run_checkpoints, run_folders
from lavis_uniadapter.runners.run_checkpoints import LATEST
from lavis_uniadapter.runners.runner import RunnerUniAdapter
from uniadapter_cli.main import main

SIZE = 40_000_000  # of the small disk
LONGER = ("run.max_epoch=1", "run.batch_size_train=2", "run.checkpoint_freq=2")


@pytest.fixture
def train(tmp_path, tiny_cache, monkeypatch):
    """The command line, in an empty folder; returns its status."""
    monkeypatch.chdir(tmp_path)
    cache = f"run.cache_root={tiny_cache}"
    yield lambda *options: main(
        ["train", "shapes_retrieval", *TINY_CLIPS, *TINY_RUN, cache, *options]
    )
    launch.destroy_process_group()


# --- known before training ----------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_a_folder_below_a_file(train, tmp_path, capsys, extra):
    (tmp_path / "file").touch()
    assert train("run.output_dir=file/runs", *extra) == 2
    expected = rf"error: The folder '{tmp_path}/file/runs/"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)


def test_a_read_only_folder(train, tmp_path, capsys, small_disk):
    disk = small_disk(read_only=True)
    assert train(f"run.output_dir={disk}/runs") == 2
    assert "cannot be written: Read-only file system. Name another one." in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_network_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with run_folders.sole_user(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert "cannot be locked" in caplog.text


def test_a_network_file_system_that_flushes_no_folders(tmp_path, monkeypatch):
    flush = os.fsync

    def refuse_folders(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(number)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    atomic.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_folder_without_permission(train, tmp_path, capsys, monkeypatch):
    """As root may write everywhere, the refusal is a made-up one."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train() == 2
    error = capsys.readouterr().err
    assert "output/shapes_retrieval/" in error and "cannot be written: Permission denied" in error


def test_a_disk_without_room_for_the_states(train, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert train() == 2
    captured = capsys.readouterr()
    assert "has room for 0.00 GB, and the states of this run take 0.0" in captured.err
    assert "epoch 1" not in captured.out
    assert not (tmp_path / "output").exists()


def test_a_data_set_that_cannot_be_generated(train, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(f"run.cache_root={tmp_path}/file") == 2
    assert "The shapes data set cannot be written to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- full during training -----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of a few megabytes."""
    mounted = []

    def mount(read_only=False):
        folder = tmp_path / "disk"
        folder.mkdir()
        options = f"size={SIZE}{',ro' if read_only else ''}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(params=["disk", "limit"])
def fill(request, tmp_path):
    """Where to run, what makes further writing fail, and what ends that."""
    if request.param == "disk":
        disk = request.getfixturevalue("small_disk")()
        filler = disk / "filler"

        def fill():
            size = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(size - 20_000))

        yield disk, fill, filler.unlink
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

        yield tmp_path, lambda: limit(20_000), lambda: limit(before[0])
        limit(before[0])


def test_a_disk_that_fills_up_keeps_the_last_state(run, fill, monkeypatch, capsys):
    folder, make_full, make_room = fill
    options = (*LONGER, f"run.output_dir={folder}/runs")
    losses, steps = RunnerUniAdapter.losses, []

    def losses_and_fill(runner, samples):
        steps.append(None)
        if len(steps) == 4:
            make_full()
        return losses(runner, samples)

    path = folder / "runs/one" / LATEST
    with monkeypatch.context() as patch:
        patch.setattr(RunnerUniAdapter, "losses", losses_and_fill)
        with pytest.raises(run_folders.CannotWrite) as error:
            run("shapes_retrieval", *options, "run.job_id=one")
    make_room()
    assert f"'{path}' cannot be written: " in str(error.value)
    assert f"run.resume=auto from the last whole state, '{path}'." in str(error.value)
    assert not list(path.parent.glob(".*.tmp"))
    (state,) = run_checkpoints.read(path)["ranks"]
    assert state["progress"]["step"] == 2
    run("shapes_retrieval", *options, "run.job_id=one", "run.resume=auto")
    assert run_checkpoints.read(path)["epoch"] == 0


def test_a_full_disk_is_one_line(train, tmp_path, capsys, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    losses = RunnerUniAdapter.losses

    def losses_and_fill(runner, samples):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        return losses(runner, samples)

    monkeypatch.setattr(RunnerUniAdapter, "losses", losses_and_fill)
    try:
        status = train("run.max_epoch=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "rror" in each]
    assert line.startswith("error: '") and line.endswith("File too large. Free some space.")


def test_a_failed_start_in_a_folder_of_something_else_leaves_it(train, tmp_path):
    there = tmp_path / "output/shapes_retrieval/mine"
    there.mkdir(parents=True)
    (there / "notes.txt").touch()
    assert train("run.job_id=mine", "run.batch_size_train=500") == 2
    assert (there / "notes.txt").is_file()
    assert os.listdir(tmp_path / "output/shapes_retrieval") == ["mine"]


# --- chosen and left alone ----------------------------------------------------------------------


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(TRAIN / "shapes_retrieval.yaml").to_dict()
    folders = {run_folders.choose_folder(config)[0] for _ in range(3)}
    assert len(folders) == 3 and not (tmp_path / "output").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"run": []}', '{"run": ', '{"run": {}}'])
def test_a_folder_of_something_else_is_left_alone(tmp_path, content):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / run_folders.CONFIG).write_text(content)
    (folder / "checkpoint_1.pth").touch()
    config = {"datasets": {}, "model": {}, "run": {}}
    assert run_folders.find_unfinished_run(tmp_path, config) is None
