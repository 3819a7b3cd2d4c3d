"""LAVIS's own runner on models of this package: its real ``RunnerBase``, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill_and_resume import first_difference
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.tasks.base_task import BaseTask
from lavis_stand_ins import stand_in_for_cuda
from omegaconf import OmegaConf
from stock_runs import OPTIONS as STOCK_OPTIONS
from tiny_runs import ROOT, TRAIN

from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.runners import launch, run_checkpoints, run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.tasks import (
    UniAdapterCaptionTask,
    UniAdapterRetrievalTask,
    VideoQATask,
)
from lavis_uniadapter.tools.compare.running import _has_checkpoint

STOCK = "run.runner=runner_base"


@pytest.fixture
def stock(run, monkeypatch):
    """Run LAVIS's runner here, in one process."""
    stand_in_for_cuda(monkeypatch.setattr)
    return lambda name, *options, **how: run(name, STOCK, *options, **how)


def logged(folder: Path, key: str) -> list:
    """The values of a key in ``log.txt``, in their order."""
    return [line[key] for line in run_folders.logged(folder) if key in line]


def steps_in(checkpoint: Path) -> int:
    """Steps that the optimizer in a checkpoint has taken."""
    state = run_checkpoints.read(checkpoint)["optimizer"]["state"]
    return int(next(iter(state.values()))["step"])


# --- one process --------------------------------------------------------------------------------


def test_trains_validates_keeps_the_best_and_tests_it(stock, run, tmp_path):
    result = stock("shapes_retrieval", "run.job_id=stock")
    folder = tmp_path / "output/shapes_retrieval/stock"
    assert result.output_dir == folder
    assert isinstance(result.runner, RunnerBase)
    assert len(logged(folder, "train_loss")) == 2
    scores = logged(folder, "val_agg_metrics")
    epoch = scores.index(max(scores))
    best = run_checkpoints.read(folder / BEST)
    assert best["epoch"] == epoch
    assert not any(key.startswith("visual_encoder") for key in best["model"])
    # the best epoch was loaded as it is, without LAVIS's fallback to strict=False
    assert "Key mismatch" not in (folder / "run.log").read_text()
    assert first_difference(best["model"], model_state(result.runner, best["model"])) is None

    summary = json.loads((folder / run_folders.SUMMARY).read_text())
    assert summary["best"] == {"score": max(scores), "epoch": epoch}
    assert summary["metrics"] == result.metrics
    noted = json.loads((folder / "result/metrics_test_epoch_best.json").read_text())
    assert result.metrics == {"test": noted}
    read = run_folders.read(folder)
    assert read.best == max(scores) and read.metrics.get("t2v_r1") == noted["t2v_r1"]
    assert read.seconds == summary["seconds"] > 0

    tested = f"run.resume_ckpt_path={folder / BEST}"
    for evaluate in (stock, run):
        again = evaluate("shapes_retrieval", tested, evaluate=True)
        assert again.metrics == result.metrics
        assert run_folders.is_finished(again.output_dir)


def model_state(runner, names) -> dict:
    state = runner._model.state_dict()
    return {name: state[name] for name in names}


@pytest.mark.parametrize("name", ["shapes_qa", "shapes_caption"])
def test_questions_and_captions(stock, monkeypatch, name):
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)  # takes seconds to start
    generate = f"datasets.{name}.generate"
    result = launch.run(
        TRAIN / f"{name}.yaml",
        [
            *(
                STOCK,
                "run.device=cpu",
                "run.num_workers=0",
                "run.max_epoch=1",
                "run.valid_splits=[]",
            ),
            *(f"{generate}.num_train=6", f"{generate}.num_val=4", f"{generate}.num_test=5"),
            *(f"{generate}.num_frames=6", "run.batch_size_train=4", "model.vit.depth=1"),
        ],
    )
    assert "agg_metrics" in result.metrics["test"]
    assert (result.output_dir / "checkpoint_0.pth").is_file()
    assert (result.output_dir / "result/test_epoch_0.json").is_file()


def test_lavis_own_task_under_the_names_of_lavis(stock):
    result = stock("shapes_retrieval", "run.task=retrieval", "run.max_epoch=1")
    assert "img_r1" in result.metrics["test"]
    read = run_folders.read(result.output_dir)
    assert read.metrics.get("t2v_r1") == result.metrics["test"]["img_r1"]


@pytest.fixture
def interrupted(monkeypatch):
    """Stop training at its fifth step."""
    step = BaseTask.train_step
    seen = []

    def step_or_stop(task, model, samples):
        seen.append(None)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return step(task, model, samples)

    monkeypatch.setattr(BaseTask, "train_step", step_or_stop)


@pytest.mark.parametrize(("job_id", "valid_splits"), [("", "[val]"), ("named", "[]")])
def test_resume_auto_continues_from_what_lavis_saved(stock, interrupted, job_id, valid_splits):
    options = (f"run.valid_splits={valid_splits}", f"run.job_id={job_id}", "run.resume=auto")
    with pytest.raises(KeyboardInterrupt):
        stock("shapes_retrieval", *options)
    (folder,) = Path("output/shapes_retrieval").iterdir()
    assert _has_checkpoint(folder)
    with pytest.raises(ConfigError, match="holds a run already"):
        stock("shapes_retrieval", f"run.job_id={folder.name}")
    result = stock("shapes_retrieval", *options)
    assert result.output_dir == folder.resolve()
    assert len(logged(folder, "train_loss")) == 2
    ended = BEST if valid_splits == "[val]" else "checkpoint_1.pth"
    assert run_checkpoints.read(folder / ended)["epoch"] == 1
    assert steps_in(folder / ended) == 6


def test_checkpoints_resume_in_either_runner(stock, run):
    options = ("run.valid_splits=[]", "run.test_splits=[]")
    first = run("shapes_retrieval", *options, "run.max_epoch=1")
    for number, (start, name) in enumerate(
        ((stock, "checkpoint_1.pth"), (run, "checkpoint_latest.pth"))
    ):
        path = f"run.resume_ckpt_path={first.output_dir / run_checkpoints.LATEST}"
        resumed = start("shapes_retrieval", *options, path, f"run.job_id={number}")
        assert steps_in(resumed.output_dir / name) == 6


def test_a_checkpoint_without_its_queue_resumes_in_neither_runner(stock, run):
    path = run("shapes_retrieval", "run.max_epoch=1", "run.test_splits=[]").output_dir / BEST
    content = run_checkpoints.read(path)
    del content["model"]["queue_ptr"]
    torch.save(content, path)
    for start in (stock, run):
        with pytest.raises(CheckpointError, match="missing: queue_ptr"):
            start("shapes_retrieval", f"run.resume_ckpt_path={path}")


def test_a_run_without_a_best_epoch_says_so_and_keeps_the_last(stock, monkeypatch):
    """LAVIS saves an epoch only if ``agg_metrics`` is above 0."""
    after_evaluation = UniAdapterRetrievalTask.after_evaluation

    def nothing_found(task, *args, **kwargs):
        return {**after_evaluation(task, *args, **kwargs), "agg_metrics": 0.0}

    with monkeypatch.context() as patch:
        patch.setattr(UniAdapterRetrievalTask, "after_evaluation", nothing_found)
        with pytest.raises(CheckpointError, match="agg_metrics of 'val' is above 0") as error:
            stock("shapes_retrieval", "run.job_id=none")
    last = Path("output/shapes_retrieval/none/checkpoint_1.pth").resolve()
    assert f"uniadapter evaluate RECIPE run.resume_ckpt_path={last}" in str(error.value)
    tested = stock("shapes_retrieval", f"run.resume_ckpt_path={last}", evaluate=True)
    assert "t2v_r1" in tested.metrics["test"]


def test_a_complete_run_without_validation_has_nothing_to_train(stock):
    options = ("run.valid_splits=[]", "run.test_splits=[]", "run.job_id=one", "run.max_epoch=1")
    stock("shapes_retrieval", *options)
    with pytest.raises(
        CheckpointError, match=r"checkpoint_0.pth' is of the last epoch\. .*evaluate"
    ):
        stock("shapes_retrieval", *options, "run.resume=auto")


# --- what LAVIS's runners skip or misread -------------------------------------------------------


@pytest.mark.parametrize(
    "options, named",
    [
        (["run.amp=bf16"], "run.amp is 'bf16'"),
        (["run.max_grad_norm=1.0"], "run.max_grad_norm"),
        (["run.compile=True"], "run.compile"),
        (["run.checkpoint_freq=100"], "run.checkpoint_freq"),
        (["run.data_timeout=10"], "run.data_timeout"),
        (["run.unreadable_threshold=0"], "run.unreadable_threshold"),
        (["run.max_skipped_steps=3"], "run.max_skipped_steps"),
        (["run.valid_splits=[test]"], "'val'"),
        (["run.runner=runner_iter", "run.resume=auto"], "run.resume"),
    ],
)
def test_settings_that_lavis_would_skip_or_misread_are_refused(options, named):
    load_config(TRAIN / "shapes_retrieval.yaml", [*options, "run.runner=runner_uniadapter"])
    with pytest.raises(ConfigError, match=named) as error:
        load_config(TRAIN / "shapes_retrieval.yaml", [STOCK, *options])
    assert "runner_uniadapter" in str(error.value)


@pytest.mark.parametrize(
    "option",
    ["run.amp=True", "run.amp=fp16", "run.amp=null", "run.compile=False", "run.max_grad_norm=null"],
)
def test_settings_that_lavis_reads_as_they_are_meant_pass(option):
    load_config(TRAIN / "shapes_retrieval.yaml", [STOCK, option])


@pytest.mark.parametrize(
    "task, arch",
    [
        (UniAdapterRetrievalTask, "blip_uniadapter_retrieval"),
        (VideoQATask, "blip_uniadapter_vqa"),
        (UniAdapterCaptionTask, "blip_uniadapter_caption"),
    ],
)
def test_tasks_refuse_it_under_lavis_own_train_script(task, arch):
    """Which asks the task first, and takes runner_base where ``run.runner`` is not given."""
    cfg = SimpleNamespace(
        run_cfg=OmegaConf.create({"amp": "bf16"}), model_cfg=OmegaConf.create({"arch": arch})
    )
    with pytest.raises(ConfigError, match="run.amp is 'bf16'"):
        task.setup_task(cfg)


def test_a_cpu_is_refused_before_anything_is_built(run, monkeypatch):
    monkeypatch.setattr(BaseTask, "build_datasets", None)
    with pytest.raises(ConfigError, match="needs CUDA, and run.device is cpu"):
        run("shapes_retrieval", STOCK)


# --- weights ------------------------------------------------------------------------------------


def as_lavis_saves(model) -> dict[str, torch.Tensor]:
    """A copy of what ``RunnerBase._save_checkpoint`` keeps of a model."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {k: v.clone() for k, v in model.state_dict().items() if k not in frozen}


@pytest.mark.parametrize("tuning", TUNING_METHODS)
def test_strict_loading_accepts_that_frozen_weights_are_absent(build_model, tuning):
    saved = as_lavis_saves(build_model(seed=1, tuning=tuning))
    model = build_model(seed=2, tuning=tuning)
    backbone = {k: v.clone() for k, v in model.state_dict().items() if k not in saved}
    assert bool(backbone) == (tuning != "full")
    assert first_difference(saved, as_lavis_saves(model)) is not None
    model.load_state_dict(saved)
    assert first_difference(saved, as_lavis_saves(model)) is None
    state = model.state_dict()
    assert first_difference(backbone, {name: state[name] for name in backbone}) is None


@pytest.mark.parametrize("tuning", ["uniadapter", "lora", "full"])
def test_strict_loading_refuses_anything_else(build_model, tuning):
    model = build_model(tuning=tuning)
    saved = as_lavis_saves(model)
    trained = next(iter(model.trainable_parameters()))
    buffers = ("image_queue", "queue_ptr", "momentum_average.visual_encoder/cls_token")
    for name in (trained, *(b for b in buffers if b in saved)):
        with pytest.raises(CheckpointError, match=f"missing: {name}"):
            model.load_state_dict({k: v for k, v in saved.items() if k != name})
    with pytest.raises(CheckpointError, match="unexpected: extra"):
        model.load_state_dict({**saved, "extra": torch.zeros(1)})
    for name in (trained, "visual_encoder.cls_token"):
        with pytest.raises(CheckpointError, match=f"misshapen: {name}"):
            model.load_state_dict({**saved, name: torch.zeros(9, 9)})


def test_a_model_that_someone_froze_needs_its_trained_weights_all_the_same(build_model):
    model = build_model().requires_grad_(False)
    with pytest.raises(CheckpointError, match="missing: adapters.default"):
        model.load_state_dict(dict(model.named_buffers()))


def test_a_merged_model_needs_all_its_weights(build_model):
    model = build_model(tuning="lora")
    model.merge_adapter()
    with pytest.raises(CheckpointError, match="missing: temp"):
        model.load_state_dict({})
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("tuning", TUNING_METHODS)
@pytest.mark.parametrize("name", ["retrieval", "vqa", "caption"])
def test_every_trained_parameter_has_a_gradient(name, tuning):
    """LAVIS builds its DDP without ``find_unused_parameters``."""
    cls = registry.get_model_class(f"blip_uniadapter_{name}")
    cfg = OmegaConf.load(cls.default_config_path("shapes")).model
    model = cls.from_config(OmegaConf.merge(cfg, {"tuning": tuning, "vit": {"depth": 1}})).train()
    model(
        {
            "image": torch.randn(2, 3, 64, 64),
            "text_input": ["a red circle", "a blue star"],
            "answer": ["red", "blue"],
            "n_answers": torch.tensor([1, 1]),
            "weight": torch.ones(2),
            "image_id": torch.arange(2),
            **{"epoch": 0, "iters": 0, "num_iters_per_epoch": 1},
        }
    ).loss.backward()
    assert [n for n, p in model.trainable_parameters().items() if p.grad is None] == []


# --- one and two processes, killed and resumed --------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """What ``stock_runs.py`` leaves."""
    folder = tmp_path_factory.mktemp("stock_runs")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/stock_runs.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metrics_in(folder: Path) -> dict[str, float]:
    (path,) = folder.glob("*/result/metrics_test_epoch_*.json")
    return json.loads(path.read_text())


@pytest.mark.processes
def test_two_killed_processes_resume_and_end_with_what_runner_uniadapter_measures(folders, run):
    there = folders / "launcher"
    (folder,) = (there / "output").iterdir()
    assert len(logged(folder, "train_loss")) == 2
    assert steps_in(folder / BEST) == 6
    summary = json.loads((folder / run_folders.SUMMARY).read_text())
    assert summary["processes"] == 2 and summary["best"]["epoch"] == 1
    assert summary["metrics"] == {"test": metrics_in(there / "output")}
    assert metrics_in(there / "evaluated") == summary["metrics"]["test"]
    again = evaluated_by_ours(run, folders, folder / BEST)
    assert again == summary["metrics"]["test"]


def evaluated_by_ours(run, folders: Path, trained: Path) -> dict[str, float]:
    result = run(
        "shapes_retrieval",
        *STOCK_OPTIONS,
        "run.runner=runner_uniadapter",
        f"run.cache_root={folders / 'cache'}",
        f"model.pretrained={folders / 'base.pth'}",
        f"run.resume_ckpt_path={trained}",
        evaluate=True,
    )
    return result.metrics["test"]


@pytest.mark.processes
def test_lavis_own_train_script_with_one_line_more(folders, run):
    there = folders / "lavis"
    (folder,) = (there / "resumed").iterdir()
    assert len(logged(folder, "train_loss")) == 1
    assert steps_in(folder / "checkpoint_1.pth") == 6
    tested = metrics_in(there / "resumed")
    assert metrics_in(there / "evaluated") == tested
    assert evaluated_by_ours(run, folders, folder / "checkpoint_1.pth") == tested


@pytest.mark.processes
@pytest.mark.parametrize("started_by", ["launcher", "lavis"])
def test_all_processes_have_the_same_weights_averages_and_queues(folders, started_by):
    """LAVIS's DDP overwrites every process's buffers with the main one's each step."""
    for epoch in (0, 1):
        first, second = (
            torch.load(folders / started_by / f"rank{rank}_epoch{epoch}.pt") for rank in (0, 1)
        )
        assert first["queue_ptr"].item() == 12 * (epoch + 1) % 10
        assert first_difference(first, second) is None
