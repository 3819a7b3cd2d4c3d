"""Whole runs through the runner: training, evaluation, resuming, several processes, errors."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from tiny_runs import ROOT, TINY_CLIPS, TINY_RUN, TRAIN

from lavis_uniadapter.checkpoints.adapter_files import TENSORS
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.host_copy import HostCopy
from lavis_uniadapter.datasets.loading import Batch
from lavis_uniadapter.runners import epoch, launch, run_checkpoints, runner
from lavis_uniadapter.runners.epoch import EpochProgress
from lavis_uniadapter.runners.run_checkpoints import BEST, LATEST
from lavis_uniadapter.runners.runner import BEST_ADAPTER, RunnerUniAdapter
from uniadapter_cli.main import main


def trained_state(path):
    return torch.load(path, weights_only=True)["model"]


def test_train_pretrain_evaluate_end_to_end(run, tmp_path):
    stills = run("shapes_pretrain", "run.job_id=stills")
    assert set(stills.metrics) == {"test"}
    assert {"t2i_r1", "i2t_r10", "t2i_medr", "i2t_meanr", "mean_recall"} <= set(
        stills.metrics["test"]
    )
    base = f"model.pretrained={stills.output_dir / BEST}"
    clips = run("shapes_retrieval", base, "run.job_id=clips")
    assert clips.output_dir == tmp_path / "output/shapes_retrieval/clips"
    for name in (BEST, LATEST, "log.txt", "config.json", "run.log", f"{BEST_ADAPTER}/{TENSORS}"):
        assert (clips.output_dir / name).is_file(), name
    # the log ends with the results, and with the run: a later message would fail without its folder
    assert "test: mean_recall" in (clips.output_dir / "run.log").read_text()
    assert str(tmp_path) not in str(logging.getLogger().handlers)
    log = [json.loads(line) for line in (clips.output_dir / "log.txt").read_text().splitlines()]
    assert [line["train_epoch"] for line in log if "train_epoch" in line] == [0, 1]
    assert [line["val_epoch"] for line in log if "val_epoch" in line] == [0, 1]
    metrics = json.loads((clips.output_dir / "result/metrics_test_epoch_best.json").read_text())
    assert metrics == clips.metrics["test"]
    saved = json.loads((clips.output_dir / BEST_ADAPTER / "adapter_config.json").read_text())
    assert saved["metrics"]["test_t2v_r1"] == metrics["t2v_r1"]
    assert "val_mean_recall" in saved["metrics"] and "epoch" in saved["metrics"]
    # the frozen backbone is not written again with each checkpoint
    assert not any(k.startswith("visual_encoder") for k in trained_state(clips.output_dir / BEST))

    again = run(
        "shapes_retrieval",
        base,
        f"model.adapter_ckpt={clips.output_dir / BEST_ADAPTER}",
        evaluate=True,
    )
    assert again.metrics["test"] == clips.metrics["test"]
    from_checkpoint = run(
        "shapes_retrieval",
        base,
        f"run.resume_ckpt_path={clips.output_dir / BEST}",
        evaluate=True,
    )
    assert from_checkpoint.metrics["test"] == clips.metrics["test"]


def test_resume_in_another_folder_equals_not_stopping(run):
    """Bit for bit on CPU, with dropout and a random draw of frames in play."""
    options = (
        "model.adapter.dropout=0.1",
        "run.max_epoch=3",
        "run.test_splits=[]",
        "run.num_workers=1",
    )
    whole = run("shapes_retrieval", *options, "run.job_id=whole")
    run("shapes_retrieval", *options, "run.job_id=first", "run.max_epoch=1")
    # The schedule must be that of the whole run, so only the number of epochs differs.
    first = torch.load("output/shapes_retrieval/first/checkpoint_latest.pth", weights_only=True)
    assert first["epoch"] == 0
    resumed = run(
        "shapes_retrieval",
        *options,
        "run.job_id=resumed",
        "run.seed=42",
        f"run.resume_ckpt_path={Path('output/shapes_retrieval/first').resolve() / LATEST}",
    )
    ended, expected = (
        torch.load(r.output_dir / LATEST, weights_only=True) for r in (resumed, whole)
    )
    assert ended["epoch"] == expected["epoch"] == 2
    for name, value in expected["model"].items():
        assert torch.equal(ended["model"][name], value), name
    assert ended["best"] == expected["best"]
    moments = expected["optimizer"]["state"]
    for index, state in moments.items():
        assert torch.equal(ended["optimizer"]["state"][index]["exp_avg"], state["exp_avg"])


def test_best_epoch_survives_resuming_twice(run, monkeypatch):
    """Later epochs that do not improve must not lose what was found before them."""
    from lavis_uniadapter.tasks import UniAdapterRetrievalTask

    values = iter([50.0, 40.0, 30.0])
    original = UniAdapterRetrievalTask.evaluation

    def worse_and_worse(task, model, data_loader, **kwargs):
        metrics, *rest = original(task, model, data_loader, **kwargs)
        return {**metrics, "agg_metrics": next(values, 0.0)}, *rest

    monkeypatch.setattr(UniAdapterRetrievalTask, "evaluation", worse_and_worse)
    folder = None
    for epochs in (1, 2, 3):
        resume = [] if folder is None else [f"run.resume_ckpt_path={folder / LATEST}"]
        tests = "run.test_splits=[]" if epochs < 3 else 'run.test_splits=["test"]'
        result = run("shapes_retrieval", f"run.max_epoch={epochs}", tests, *resume)
        folder = result.output_dir
    assert torch.load(folder / BEST, weights_only=True)["epoch"] == 0
    assert (folder / BEST_ADAPTER / TENSORS).is_file()
    assert "test" in result.metrics


def test_rank_metrics_are_reported_as_they_are(run):
    options = ("run.selection_metric=t2v_medr", "run.max_epoch=1", "run.test_splits=[]")
    result = run("shapes_retrieval", *options)
    log = [json.loads(line) for line in (result.output_dir / "log.txt").read_text().splitlines()]
    median = next(line["val_t2v_medr"] for line in log if "val_t2v_medr" in line)
    config = json.loads((result.output_dir / BEST_ADAPTER / "adapter_config.json").read_text())
    assert config["metrics"] == {"val_t2v_medr": median, "epoch": 0}


def test_accumulated_gradients_equal_a_larger_batch(run, monkeypatch):
    """For a loss that is a mean over items; an incomplete last window included."""
    runner = run("shapes_retrieval", "run.max_epoch=1", "run.test_splits=[]").runner
    weight = torch.nn.Parameter(torch.ones(3))

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, samples):
            return {"loss": (samples["x"] * self.weight).sum(dim=1).mean()}

    items = torch.arange(18.0).view(6, 3)
    gradients = []
    for size, accumulate in ((6, 1), (3, 2), (2, 3), (2, 2)):
        runner._model = runner._wrapped_model = Mean()
        runner._optimizer = torch.optim.SGD([weight], lr=0.0)
        runner.config.config.run.accum_grad_iters = accumulate
        seen = []

        def note(optimizer, scaler, max_norm, loss, seen=seen):
            seen.append(weight.grad.clone())
            weight.grad.zero_()
            return HostCopy(torch.ones(3))

        monkeypatch.setattr(epoch, "take_step", note)
        batches = [Batch({"x": part}, [0]) for part in items.split(size)]
        runner._dataloaders["train"] = FixedLoader(batches)
        runner.train_epoch(EpochProgress(0))
        gradients.append(torch.stack(seen).mean(dim=0) if len(seen) == 1 else seen)
    whole, halves, thirds, uneven = gradients
    torch.testing.assert_close(whole, items.mean(dim=0))
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(thirds, whole)
    # the last window holds one batch, and is divided by one
    torch.testing.assert_close(uneven[0], items[:4].mean(dim=0))
    torch.testing.assert_close(uneven[1], items[4:].mean(dim=0))


class FixedLoader(list):
    """A list of batches, all of them readable."""

    batch_size = 1
    dataset = None

    def start(self, epoch, first_step):
        assert first_step == 0


def test_mixed_precision_is_near_full_precision_and_not_it(run):
    losses = {}
    for amp in ("null", "bf16", "fp16"):
        options = (f"run.amp={amp}", "run.max_epoch=1", "run.valid_splits=[]", "run.test_splits=[]")
        log = (run("shapes_retrieval", *options).output_dir / "log.txt").read_text().splitlines()
        losses[amp] = json.loads(log[0])["train_loss"]
    assert len(set(losses.values())) == 3
    assert losses["bf16"] == pytest.approx(losses["null"], rel=0.05)
    assert losses["fp16"] == pytest.approx(losses["null"], rel=0.05)


@pytest.mark.parametrize("tuning", ["uniadapter", "lora"])
def test_compiled_visual_encoder_trains_alike(run, monkeypatch, tuning):
    """Traced, differentiated and functionalised as for the real backend, without its compiler."""
    monkeypatch.setattr(runner, "COMPILE_BACKEND", "aot_eager")
    options = (f"model.tuning={tuning}", "run.max_epoch=1", "run.valid_splits=[]")
    options += ("run.test_splits=[]",)
    results = [run("shapes_retrieval", *options, f"run.compile={value}") for value in (False, True)]
    compiled = results[1].runner._model.visual_encoder.blocks[0]
    assert compiled._compiled_call_impl is not None
    expected, actual = (trained_state(result.output_dir / LATEST) for result in results)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


def test_every_block_is_compiled_however_many(build_model, video_batch, monkeypatch):
    """Dynamo gives up after a number of specialisations of one function."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(runner, "COMPILE_BACKEND", count)
    model = build_model(vit={"depth": 4}).train()
    runner.compile_visual_encoder(model)
    torch._dynamo.reset()
    model(video_batch).loss.backward()
    assert len(graphs) == 2 * 4  # averages without gradient, and training
    model.eval()
    with torch.no_grad():
        model.encode_visual(video_batch)
    assert len(graphs) == 3 * 4


def test_lavis_own_task_runs_on_our_runner(run, tmp_path):
    config = OmegaConf.load(TRAIN / "shapes_retrieval.yaml")
    del config.run.selection_metric  # that of our task
    OmegaConf.save(config, tmp_path / "lavis_task.yaml")
    result = run(tmp_path / "lavis_task", "run.task=retrieval", "run.max_epoch=1")
    assert {"txt_r1", "img_r1"} <= set(result.metrics["test"])


@pytest.mark.parametrize("tear", ["cut", "empty"])
def test_torn_checkpoint_is_refused(run, tear, tmp_path):
    path = tmp_path / "torn.pth"
    torch.save({"model": {"x": torch.zeros(1000)}, "optimizer": {}, "epoch": 0}, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if tear == "cut" else b"")
    with pytest.raises(CheckpointError, match="torn.pth"):
        run("shapes_retrieval", f"run.resume_ckpt_path={path}")
    # its folder has been removed, and so has the log in it
    assert str(tmp_path) not in str(logging.getLogger().handlers)


def test_checkpoint_of_another_tuning_is_refused_by_name(run):
    linear = run("shapes_retrieval", "model.tuning=linear", "run.max_epoch=1", "run.test_splits=[]")
    with pytest.raises(
        CheckpointError, match="model.tuning 'linear', and this one has 'uniadapter'"
    ):
        run("shapes_retrieval", f"run.resume_ckpt_path={linear.output_dir / LATEST}")
    with pytest.raises(CheckpointError, match=r"adapters\.default\.layers"):
        run("shapes_retrieval", f"run.resume_ckpt_path={linear.output_dir / LATEST}", evaluate=True)


def test_tuned_checkpoint_is_no_base(run):
    tuned = run("shapes_retrieval", "run.max_epoch=1", "run.test_splits=[]")
    with pytest.raises(CheckpointError, match="does not fit this .* missing: visual_encoder"):
        run("shapes_retrieval", f"model.pretrained={tuned.output_dir / LATEST}")


@pytest.mark.processes
def test_script_says_what_it_does(tmp_path, tiny_cache):
    """A plain ``python train.py`` without torchrun."""
    options = [*TINY_CLIPS, *TINY_RUN, f"run.cache_root={tiny_cache}", "run.max_epoch=1"]
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "train.py")),
            *("--cfg-path", str(TRAIN / "shapes_retrieval.yaml"), "--options", *options),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "run folder",
        "cpu, 1 process(es), global batch 4, queue 10",
        "base checkpoint: random weights (",
        "randomly initialised: everything",
        *("trained", "epoch 1/1: loss", "test t2v: r1", "results in"),
    ):
        assert expected in done.stdout


# --- errors before training ---------------------------------------------------------------------


@pytest.fixture
def fails(tmp_path, tiny_cache, monkeypatch, capsys):
    """The command line's message for options that cannot work; no training may start."""
    monkeypatch.chdir(tmp_path)

    def attempt(*options, cache=tiny_cache, name="shapes_retrieval"):
        tiny = (*TINY_CLIPS, *TINY_RUN, f"run.cache_root={cache}")
        path = str(TRAIN / f"{name}.yaml")
        status = main(["train", "--cfg-path", path, "--options", *tiny, *options])
        captured = capsys.readouterr()
        assert status == 2
        assert "Traceback" not in captured.err
        assert "epoch 1" not in captured.out
        assert not (tmp_path / "output").exists()
        return captured.err

    return attempt


@pytest.mark.parametrize(
    "option, expected",
    [
        ("run.init_rl=1", "Unknown configuration key 'run.init_rl'. Did you mean 'init_lr'?"),
        ("model.tunning=full", "Unknown configuration key 'model.tunning'. Did you mean 'tuning'?"),
        ("model.adapter.bottelneck=8", "Did you mean 'bottleneck'?"),
        ("model.adapter.bottleneck=0", "model.adapter.bottleneck is 0"),
        ("model.tuning=unidapter", "Did you mean 'uniadapter'?"),
        ("model.vit_type=huge", "model.vit_type is 'huge'"),
        ("model.tokenizer=no/such/folder", "no tokenizer at 'no/such/folder'"),
        ("model.med_config_path=no/such.json", "no file 'no/such.json'"),
        ("model.pretrained=no/such.pth", "No checkpoint at 'no/such.pth'"),
        ("model.adapter_ckpt=no/such", "'no/such' is not an adapter folder"),
        ("model.arch=blip_uniadapter_retrival", "Did you mean 'blip_uniadapter_retrieval'?"),
        ("model.model_type=shape", "model.model_type is 'shape'"),
        ("datasets.shape_retrieval.data_type=videos", "Unknown dataset 'shape_retrieval'"),
        ("datasets.shapes_retrieval.vis_procesor=1", "Did you mean 'vis_processor'?"),
        ("datasets.shapes_retrieval.vis_processor.eval.name=blip_video", "'blip_video'"),
        ("datasets.shapes_retrieval.vis_processor.eval.frames=8", "frames"),
        ("run.task=retreival", "Did you mean 'retrieval'?"),
        ("run.selection_metric=t2v_r2", "run.selection_metric is 't2v_r2'"),
        ("run.batch_size_train=0", "run.batch_size_train is 0"),
        ("run.batch_size_train=500", "run.batch_size_train 500"),
        ("run.device=tpu", "run.device is 'tpu'"),
        ("run.amp=fp8", "run.amp is 'fp8'"),
        ("run.matmul_precision=medium", "run.matmul_precision is 'medium'"),
        ("run.compile=maybe", "run.compile is 'maybe'"),
        ("run.k_test=-1", "run.k_test is -1"),
        ("run.init_lr=fast", "run.init_lr is 'fast'"),
        ("run.weight_decay=null", "run.weight_decay is missing"),
        ("run.accum_grad_iters=0", "run.accum_grad_iters is 0"),
        ("run.num_workers=-1", "run.num_workers is -1"),
        ("run.output_dir=null", "run.output_dir is None"),
        ("run.max_iters=10", "run.max_iters is not read by runner_uniadapter"),
        ("run.valid_splits=[vall]", "run.valid_splits names 'vall'"),
        ("run.test_splits=[tset]", "run.test_splits names 'tset'"),
        ("run.test_splits=[train]", "run.test_splits names 'train', whose records"),
        ("run.valid_splits=[train]", "run.valid_splits names 'train', whose records"),
        ("run.train_splits=[trian]", "run.train_splits names 'trian'"),
        ("run.resume_ckpt_path=no/such.pth", "run.resume_ckpt_path: no file 'no/such.pth'"),
        ("model.queue_size=-1", "model.queue_size is -1"),
        ("model.momentum=2", "model.momentum is 2"),
        ("model.max_txt_len=0", "model.max_txt_len is 0"),
        ("datasets.shapes_retrieval.vis_processor.trian.name=x", "Did you mean 'train'?"),
        ("datasets.shapes_retrieval.text_processor.train.promtp=x", "Did you mean 'prompt'?"),
        ("datasets.shapes_retrieval.build_info.vidoes.storage=x", "Did you mean 'videos'?"),
        ("preprocess.x=1", "Unknown configuration key 'preprocess'"),
        ("run.init_lr", "Option 'run.init_lr' has no '='"),
    ],
)
def test_wrong_configuration_ends_in_one_clear_error(fails, option, expected):
    assert expected in fails(option)


@pytest.fixture
def own_data(run, tmp_path, tiny_cache):
    """A configuration for LAVIS's own MSR-VTT builder over a folder in LAVIS's layout."""
    import shutil

    run("shapes_retrieval", evaluate=True)  # generates the clips
    shutil.copytree(tiny_cache / "shapes/clips", tmp_path / "data")
    config = OmegaConf.load(TRAIN / "shapes_retrieval.yaml")
    section = config.datasets.shapes_retrieval
    section.build_info = {
        "annotations": {
            split: {"storage": str(tmp_path / f"data/annotations/{split}.json"), "url": None}
            for split in ("train", "val", "test")
        },
        "videos": {"storage": str(tmp_path / "data/videos")},
    }
    config.datasets = {"msrvtt_retrieval": section}
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(TINY_RUN)))
    OmegaConf.save(config, tmp_path / "own.yaml")
    return tmp_path


def test_lavis_own_builder_trains_on_a_folder_in_place(own_data):
    result = launch.run(own_data / "own.yaml", ["run.max_epoch=1"])
    builder = registry.get_builder_class("msrvtt_retrieval")
    assert builder.__module__.startswith("lavis.")
    assert "t2v_r1" in result.metrics["test"]


@pytest.mark.parametrize("harm", ["no videos", "no annotation", "caption no list", "truncated mp4"])
def test_broken_data_end_in_one_clear_error(own_data, harm, capsys):
    data = own_data / "data"
    test = data / "annotations/test.json"
    if harm == "no videos":
        (data / "videos").rename(data / "elsewhere")
        expected = str(data / "videos")
    elif harm == "no annotation":
        test.unlink()
        expected = str(test)
    elif harm == "caption no list":
        records = json.loads(test.read_text())
        records[2]["caption"] = records[2]["caption"][0]
        test.write_text(json.dumps(records))
        expected = "record 2"
    else:
        video = sorted((data / "videos").iterdir())[0]
        video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
        expected = video.name
    assert main(["train", str(own_data / "own.yaml")]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "epoch 1" not in captured.out


def test_configuration_error_is_raised_to_python_callers(tmp_path):
    with pytest.raises(ConfigError, match="No configuration file"):
        launch.run(tmp_path / "none.yaml")


def test_a_best_checkpoint_of_another_epoch_is_named(run, caplog):
    result = run("shapes_retrieval", "run.max_epoch=1", "run.test_splits=[]")
    content = run_checkpoints.read(result.output_dir / BEST)
    run_checkpoints.write({**content, "epoch": 7}, result.output_dir / BEST)
    with caplog.at_level("WARNING"):
        result.runner.eval_epoch("val", cur_epoch="best")
    assert "is of epoch 7, and epoch 0 was the best" in caplog.text


def test_only_the_first_validation_split_needs_the_selection_metric(run, monkeypatch):
    """Others may lack it (question types), and LAVIS's tasks may measure nothing at all."""
    measured = {"val": {"agg_metrics": 1.0, "mean_recall": 1.0}, "test": {"agg_metrics": 2.0}}

    def eval_epoch(runner, split, cur_epoch, skip_reload=False):
        return None if cur_epoch == 1 else measured[split]

    monkeypatch.setattr(RunnerUniAdapter, "eval_epoch", eval_epoch)
    result = run("shapes_retrieval", "run.valid_splits=[val,test]", "run.test_splits=[]")
    assert result.runner.best == {"epoch": 0, "value": 1.0, "agg_metrics": 1.0}
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["best"] == {"score": 1.0, "epoch": 0}
