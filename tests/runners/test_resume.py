"""Runs that are killed or interrupted resume as if they had not been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from kill_and_resume import first_difference
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from tiny_runs import ROOT, TRAIN, held_by_another_process, options_of

from lavis_uniadapter.backbone.build import build_text_encoder, build_visual_encoder
from lavis_uniadapter.backbone.vision import AdaptedBlock
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.signals import EXIT_INTERRUPTED, Interrupted
from lavis_uniadapter.datasets.loading import BatchLoader
from lavis_uniadapter.runners import launch, run_checkpoints, run_folders
from lavis_uniadapter.runners.run_checkpoints import LATEST, PREVIOUS
from lavis_uniadapter.runners.runner import RunnerUniAdapter
from lavis_uniadapter.tasks import UniAdapterRetrievalTask


class Killed(BaseException):
    """Ends a run where no except clause of it looks."""


@pytest.fixture(scope="session")
def longer(tmp_path_factory):
    """Two epochs of five steps, of two batches each but for the last one."""
    return (
        "run.max_epoch=2",
        "run.batch_size_train=2",
        "run.num_workers=1",
        "run.accum_grad_iters=2",
        "run.checkpoint_freq=2",
        "model.adapter.dropout=0.1",
        "datasets.shapes_retrieval.generate.num_train=5",
        f"run.cache_root={tmp_path_factory.mktemp('longer_cache')}",
    )


@pytest.mark.processes
def test_killed_at_random_moments_resumes_bit_for_bit():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/kill_and_resume.py"), "--kills", "3", "--seed", "3"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3: resumed" in done.stdout


@contextlib.contextmanager
def at_step(step, do):
    """Do something at a step of a run, counted from 1 through its epochs."""
    losses = RunnerUniAdapter.losses
    seen = []

    def do_and_compute(runner, samples):
        seen.append(None)
        if len(seen) == step:
            do()
        return losses(runner, samples)

    with mock.patch.object(RunnerUniAdapter, "losses", do_and_compute):
        yield


def raise_killed():
    raise Killed


def ended(result):
    content = run_checkpoints.read(result.output_dir / LATEST)
    del content["config"]
    return content


def logged(result):
    """The lines of ``log.txt`` but for the times in them."""
    lines = (result.output_dir / "log.txt").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines
    ]


def options_for(longer, tuning):
    options = longer if tuning == "uniadapter" else [o for o in longer if "model.adapter" not in o]
    return (*options, f"model.tuning={tuning}")


@pytest.fixture
def whole(run, longer):
    """State, metrics and log of a run that nothing stopped; trained once for each tuning."""

    def once(tuning="uniadapter"):
        if tuning not in WHOLE:
            result = run("shapes_retrieval", *options_for(longer, tuning), "run.job_id=whole")
            WHOLE[tuning] = ended(result), result.metrics, logged(result)
        return WHOLE[tuning]

    return once


WHOLE = {}


@pytest.mark.parametrize(
    ("tuning", "step"), [("uniadapter", 3), ("uniadapter", 7), ("uniadapter", 9), ("full", 7)]
)
def test_mid_epoch_resume_equals_not_stopping(run, whole, tuning, step, longer):
    """Steps 0 to 4 are the first epoch's; a checkpoint is written at every second one."""
    options = options_for(longer, tuning)
    with at_step(step, raise_killed), pytest.raises(Killed):
        run("shapes_retrieval", *options, "run.job_id=killed")
    resumed = run("shapes_retrieval", *options, "run.job_id=killed", "run.resume=auto")
    state, metrics, log = whole(tuning)
    assert first_difference(state, ended(resumed)) is None
    assert resumed.metrics == metrics
    assert logged(resumed) == log


def test_a_gradient_scaler_resumes_too(run, longer):
    options = (*longer, "run.amp=fp16", "run.test_splits=[]")
    whole = run("shapes_retrieval", *options, "run.job_id=whole")
    with at_step(8, raise_killed), pytest.raises(Killed):
        run("shapes_retrieval", *options, "run.job_id=killed")
    resumed = run("shapes_retrieval", *options, "run.job_id=killed", "run.resume=auto")
    assert ended(whole)["scaler"]["scale"] > 0
    assert first_difference(ended(whole), ended(resumed)) is None


def test_an_optimizer_that_was_not_fused_resumes(run, tmp_path):
    """As in checkpoints of LAVIS's runner and of earlier versions of this one."""
    options = ("run.test_splits=[]", "run.valid_splits=[]")
    folder = run("shapes_retrieval", *options, "run.max_epoch=1").output_dir
    content = run_checkpoints.read(folder / LATEST)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(content, tmp_path / "not_fused.pth")
    resumed = [
        run("shapes_retrieval", *options, "run.max_epoch=2", f"run.resume_ckpt_path={path}")
        for path in (folder / LATEST, tmp_path / "not_fused.pth")
    ]
    weights = [ended(result)["model"] for result in resumed]
    assert first_difference(*weights) is None


def test_the_last_two_states_are_kept(run, longer):
    folder = run("shapes_retrieval", *longer, "run.test_splits=[]").output_dir
    latest, previous = (run_checkpoints.read(folder / name) for name in (LATEST, PREVIOUS))
    step = [content["ranks"][0]["progress"]["step"] for content in (latest, previous)]
    assert (latest["epoch"], step) == (1, [0, 5])
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("harm", ["cut", "emptied", "one byte"])
def test_a_torn_checkpoint_is_set_aside_for_the_one_before(run, harm, caplog, longer):
    options = (*longer, "run.job_id=torn", "run.resume=auto")
    whole = run("shapes_retrieval", *options)
    path = whole.output_dir / LATEST
    expected = ended(whole)
    content = bytearray(path.read_bytes())
    if harm == "one byte":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "emptied": b""}.get(harm, content))
    with caplog.at_level("WARNING"):
        again = run("shapes_retrieval", *options)
    assert str(path) in caplog.text
    assert (whole.output_dir / f"{LATEST}.torn").is_file()
    assert first_difference(expected, ended(again)) is None


def test_no_whole_checkpoint_is_an_error_that_names_them(run, longer):
    options = (*longer, "run.job_id=torn", "run.test_splits=[]")
    folder = run("shapes_retrieval", *options).output_dir
    for name in (LATEST, PREVIOUS):
        (folder / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=f"{LATEST}, {PREVIOUS} are damaged"):
        run("shapes_retrieval", *options, "run.resume=auto")


def test_resume_auto_finds_the_unfinished_run(run, longer):
    options = (*longer, "run.resume=auto", "run.test_splits=[]")
    with at_step(4, raise_killed), pytest.raises(Killed):
        run("shapes_retrieval", *options)
    (folder,) = Path("output/shapes_retrieval").iterdir()
    other = run("shapes_retrieval", *options, "run.init_lr=1e-3")
    assert other.output_dir.name != folder.name  # of another learning rate: not the same run
    resumed = run("shapes_retrieval", *options, "run.num_workers=0")
    assert resumed.output_dir.resolve() == folder.resolve()
    assert run_folders.is_finished(folder)
    third = run("shapes_retrieval", *options)
    assert third.output_dir.name not in (folder.name, other.output_dir.name)


def test_a_folder_with_a_run_is_not_overwritten(run, caplog):
    options = ("run.job_id=once", "run.max_epoch=1", "run.test_splits=[]")
    folder = run("shapes_retrieval", *options).output_dir
    before = (folder / LATEST).read_bytes()
    with pytest.raises(ConfigError, match="holds a run already. Set run.resume=auto"):
        run("shapes_retrieval", *options)
    assert (folder / LATEST).read_bytes() == before
    # a finished run that is resumed has nothing to train
    again = run("shapes_retrieval", *options, "run.resume=auto")
    assert again.output_dir == folder
    assert "of a run with another" not in caplog.text
    changes = ("run.init_lr=1e-3", "run.num_workers=0", "run.resume=auto")
    run("shapes_retrieval", *options, *changes)
    assert "checkpoint_latest.pth' is of a run with another run.init_lr.\n" in caplog.text


def test_two_processes_never_train_in_one_folder(run, tmp_path):
    folder = tmp_path / "output/shapes_retrieval/held"
    with held_by_another_process(folder):
        with pytest.raises(run_folders.FolderInUse, match="held"):
            run("shapes_retrieval", "run.job_id=held")
    run("shapes_retrieval", "run.job_id=held", "run.max_epoch=1", "run.test_splits=[]")


def test_the_middle_of_an_epoch_needs_the_same_batches(run, longer):
    options = (*longer, "run.job_id=middle", "run.test_splits=[]")
    with at_step(4, raise_killed), pytest.raises(Killed):
        run("shapes_retrieval", *options)
    with pytest.raises(CheckpointError, match="middle of an epoch of 5 steps on 1 process"):
        run("shapes_retrieval", *options, "run.batch_size_train=5", "run.resume=auto")


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 4), (signal.SIGHUP, 3)]
)
def test_a_signal_saves_the_run(run, whole, number, step, longer):
    """In the middle of accumulated batches the step is finished first."""
    options = (*longer, "run.checkpoint_freq=0")
    before = signal.getsignal(number)
    with (
        at_step(step, lambda: os.kill(os.getpid(), number)),
        pytest.raises(Interrupted, match=f"{number.name}.*checkpoint_latest.*run.resume=auto"),
    ):
        run("shapes_retrieval", *options, "run.job_id=signalled")
    assert signal.getsignal(number) is before
    folder = Path("output/shapes_retrieval/signalled")
    (state,) = run_checkpoints.read(folder / LATEST)["ranks"]
    assert state["progress"]["step"] == {1: 2, 3: 4, 4: 4}[step]
    resumed = run("shapes_retrieval", *options, "run.job_id=signalled", "run.resume=auto")
    assert first_difference(whole()[0], ended(resumed)) is None


def test_a_signal_at_the_last_step_of_an_epoch_saves_it(run, longer):
    options = (*longer, "run.checkpoint_freq=0", "run.valid_splits=[]", "run.test_splits=[]")
    with at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Interrupted):
        run("shapes_retrieval", *options, "run.job_id=signalled")
    content = run_checkpoints.read(Path("output/shapes_retrieval/signalled") / LATEST)
    (state,) = content["ranks"]
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (0, 5)


FORKS: list = []
os.register_at_fork(before=lambda: FORKS and FORKS.pop()())


@pytest.mark.parametrize("where", ["before", "while workers start", "in a layer"])
def test_a_signal_in_validation_stops_it_and_loses_no_step(run, whole, monkeypatch, longer, where):
    options = (*longer, "run.checkpoint_freq=0")
    evaluation, block = UniAdapterRetrievalTask.evaluation, AdaptedBlock.forward
    layers = []

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(task, model, data_loader, **kwargs):
        if where == "before":
            stop()
        elif where == "while workers start":
            FORKS.append(stop)
        monkeypatch.setattr(AdaptedBlock, "forward", forward_and_stop)
        return evaluation(task, model, data_loader, **kwargs)

    def forward_and_stop(self, *args, **kwargs):
        layers.append(None)
        if where == "in a layer":
            stop()
        return block(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(UniAdapterRetrievalTask, "evaluation", interrupted)
        with pytest.raises(Interrupted):
            run("shapes_retrieval", *options, "run.job_id=signalled")
        monkeypatch.setattr(AdaptedBlock, "forward", block)
    assert len(layers) == (where == "in a layer")
    folder = Path("output/shapes_retrieval/signalled")
    (state,) = run_checkpoints.read(folder / LATEST)["ranks"]
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (0, 5)
    resumed = run("shapes_retrieval", *options, "run.job_id=signalled", "run.resume=auto")
    assert first_difference(whole()[0], ended(resumed)) is None


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a file is there, or the process has ended."""
    import time

    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.processes
def test_the_command_ends_with_a_code_of_its_own(tmp_path, tiny_cache, longer):
    """After a signal to its whole group, data workers included, as schedulers send it."""
    options = [
        *options_of("shapes_retrieval", tiny_cache),
        *longer,
        "run.job_id=one",
        "run.max_epoch=500",
    ]
    command = [sys.executable, str(ROOT / "train.py"), "--cfg-path"]
    command += [str(TRAIN / "shapes_retrieval.yaml"), "--options", *options]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "output/shapes_retrieval/one"
    wait_for(folder / LATEST, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, error
    assert "Traceback" not in error
    assert "SIGTERM: the run was stopped before its end, and is saved in" in error
    run_checkpoints.read(folder / LATEST)


# --- LAVIS's checkpoints ------------------------------------------------------------------------


def as_lavis_saves(runner, epoch):
    """What ``lavis.runners.RunnerBase._save_checkpoint`` puts into a file."""
    model = runner.unwrap_dist_model(runner.model)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    state = model.state_dict()
    for name in list(state):
        if name in trained and not trained[name]:
            del state[name]
    return {
        "model": state,
        "optimizer": runner.optimizer.state_dict(),
        "config": runner.config.to_dict(),
        "scaler": None,
        "epoch": epoch,
    }


@pytest.fixture
def run_lavis_blip(run, tmp_path, monkeypatch, build_model, small_med_config):
    """Train LAVIS's own retrieval model, a small one, on the tiny stills."""
    tokenizer = build_model().tokenizer

    def build(cls, cfg):
        vit = {"width": 32, "depth": 1, "num_heads": 4, "patch_size": 16, "mlp_ratio": 2}
        return cls(
            build_visual_encoder("custom", 64, vit),
            build_text_encoder(small_med_config, 32),
            queue_size=8,
            embed_dim=16,
        )

    monkeypatch.setattr(BlipRetrieval, "init_tokenizer", classmethod(lambda cls: tokenizer))
    monkeypatch.setattr(BlipRetrieval, "from_config", classmethod(build))
    fixed = ("model.arch=blip_retrieval", "model.model_type=coco", "model.image_size=64")
    fixed += ("model.queue_size=8",)
    fixed += ("run.valid_splits=[]", "run.test_splits=[]")
    return lambda *options: run("shapes_pretrain", *fixed, *options)


@pytest.mark.parametrize("model", ["ours", "LAVIS's own"])
def test_a_checkpoint_of_lavis_own_runner_resumes(run, run_lavis_blip, tmp_path, model, caplog):
    def train(*options):
        if model == "LAVIS's own":
            return run_lavis_blip(*options)
        return run("shapes_retrieval", "run.valid_splits=[]", "run.test_splits=[]", *options)

    first = train("run.max_epoch=1")
    path = tmp_path / "checkpoint_0.pth"
    torch.save(as_lavis_saves(first.runner, epoch=0), path)
    with caplog.at_level("WARNING"):
        resumed = train(f"run.resume_ckpt_path={path}", "run.max_epoch=2")
    assert "new ones are used" in caplog.text
    assert ("no momentum encoders" in caplog.text) == (model == "LAVIS's own")
    log = (resumed.output_dir / "log.txt").read_text().splitlines()
    assert [json.loads(line)["train_epoch"] for line in log] == [1]


def test_lavis_own_model_resumes_with_its_momentum_encoders(run_lavis_blip):
    whole = run_lavis_blip("run.job_id=whole", "run.max_epoch=2")
    first = run_lavis_blip("run.job_id=first", "run.max_epoch=1")
    resumed = run_lavis_blip("run.max_epoch=2", f"run.resume_ckpt_path={first.output_dir / LATEST}")
    assert any(key.startswith("visual_encoder_m.") for key in ended(whole)["model"])
    assert first_difference(ended(whole)["model"], ended(resumed)["model"]) is None


# --- reading the data does not touch the run's random numbers -----------------------------------


def test_items_do_not_depend_on_workers_or_on_where_the_epoch_began(run, longer):
    options = (*longer, "run.test_splits=[]", "run.max_epoch=1")
    first = None
    for workers in (0, 2):
        runner = run("shapes_retrieval", *options, f"run.num_workers={workers}").runner
        loader = runner.train_loader
        assert isinstance(loader, BatchLoader)
        loader.start(3)
        state = torch.get_rng_state()
        batches = [batch.samples for batch in loader]
        assert torch.equal(torch.get_rng_state(), state)
        loader.start(3, first_step=3)
        rest = [batch.samples for batch in loader]
        assert first_difference(batches[3:], rest) is None
        first = first or batches
        assert first_difference(first, batches) is None
    loader.start(4)
    assert first_difference(first, [batch.samples for batch in loader]) is not None


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="run.resume is 'always'"):
        launch.run(TRAIN / "shapes_retrieval.yaml", ["run.resume=always"])
    path = tmp_path / "x.pth"
    path.touch()
    with pytest.raises(ConfigError, match="both set"):
        launch.run(
            TRAIN / "shapes_retrieval.yaml", ["run.resume=auto", f"run.resume_ckpt_path={path}"]
        )
