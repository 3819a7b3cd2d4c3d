"""Losses and gradients that are not finite, and ranks that add up."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_runs import ROOT

from lavis_uniadapter.models.retrieval import _sample_negatives
from lavis_uniadapter.runners import run_checkpoints, run_folders
from lavis_uniadapter.runners.epoch import EpochProgress
from lavis_uniadapter.runners.faults import SKIPPED_STEPS
from lavis_uniadapter.runners.run_checkpoints import LATEST
from lavis_uniadapter.runners.runner import RunnerUniAdapter

SHORT = ("run.test_splits=[]", "run.valid_splits=[]", "run.batch_size_train=2")


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of some steps, counted from 1, or its gradient alone, not finite."""

    def arrange(steps, what):
        losses = RunnerUniAdapter.losses
        seen = []

        def spoiled(runner, samples):
            seen.append(None)
            output = losses(runner, samples)
            if len(seen) in steps:
                loss = output["loss"]
                if what == "gradient":  # of the square root of nothing
                    output["loss"] = loss + torch.sqrt((loss - loss.detach()).abs())
                else:
                    output["loss"] = loss * float(what)
            return output

        monkeypatch.setattr(RunnerUniAdapter, "losses", spoiled)

    return arrange


@pytest.mark.parametrize(("what", "amp"), [("nan", "null"), ("inf", "bf16"), ("gradient", "null")])
def test_a_step_without_finite_numbers_is_skipped_and_noted(run, spoil, what, amp, caplog):
    spoil({2, 5}, what)
    with caplog.at_level("WARNING"):
        result = run("shapes_retrieval", *SHORT, f"run.amp={amp}")
    log = [json.loads(line) for line in (result.output_dir / "log.txt").read_text().splitlines()]
    assert sum(line["train_skipped_steps"] for line in log) == 2
    moments = result.runner.optimizer.state.values()
    assert {int(moment["step"]) for moment in moments} == {2 * len(result.runner.train_loader) - 2}
    assert all(torch.isfinite(torch.tensor(line["train_loss"])) for line in log)
    noted = [
        json.loads(line) for line in (result.output_dir / SKIPPED_STEPS).read_text().splitlines()
    ]
    assert len(noted) == 2
    assert len(noted[0]["items"]) == 2 and noted[0]["items"][0]["file"].endswith(".mp4")
    assert "caption" in noted[0]["items"][0]
    assert "the step is skipped" in caplog.text
    state = run_checkpoints.read(result.output_dir / LATEST)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_skipped_step_leaves_everything_but_the_queue(run, spoil):
    """Weights and moments are those of a run that never saw the batch's gradient."""
    runner = run("shapes_retrieval", *SHORT, "run.max_epoch=1").runner
    model = runner.unwrap_dist_model(runner.model)
    before = {k: v.clone() for k, v in model.trainable_parameters().items()}
    moments = [s["exp_avg"].clone() for s in runner.optimizer.state.values()]
    spoil(set(range(1, 100)), "nan")
    runner.train_epoch(EpochProgress(0))
    for name, value in model.trainable_parameters().items():
        assert torch.equal(value, before[name]), name
    for state, moment in zip(runner.optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)


def test_too_many_in_a_row_end_the_run_and_name_the_batch(run, spoil):
    spoil({2, 3, 5, 6, 7}, "nan")
    options = (*SHORT, "run.max_skipped_steps=3", "run.job_id=one", "run.checkpoint_freq=1")
    with pytest.raises(FloatingPointError, match=rf"3 steps in a row.*{SKIPPED_STEPS}"):
        run("shapes_retrieval", *options, "run.max_epoch=4")
    folder = Path("output/shapes_retrieval/one")
    assert len((folder / SKIPPED_STEPS).read_text().splitlines()) == 5
    state = run_checkpoints.read(folder / LATEST)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_an_epoch_of_skipped_steps_shows_no_loss(run, spoil, caplog):
    """A finite loss whose gradient is not finite is the loss of no step."""
    spoil({1, 2, 3, 4, 5, 6}, "gradient")
    with caplog.at_level("INFO"):
        result = run("shapes_retrieval", *SHORT, "run.max_epoch=2")
    first, second = run_folders.logged(result.output_dir)
    assert first["train_skipped_steps"] == len(result.runner.train_loader) == 6
    assert not [name for name in first if "loss" in name]
    assert second["train_skipped_steps"] == 0 and second["train_loss"] > 0
    assert "epoch 1/2: no step was taken" in caplog.text
    assert "epoch 2/2: loss" in caplog.text


@pytest.mark.parametrize("amp", ["null", "fp16"])
def test_a_run_that_took_no_step_fails(run, spoil, scale, amp):
    spoil(set(range(1, 100)), "nan" if amp == "null" else "1")
    scale(2.0**100)
    options = (f"run.amp={amp}", "run.batch_size_train=2", "run.job_id=one")
    for more in ((), ("run.resume=auto",)):
        with pytest.raises(FloatingPointError, match="The run took no step"):
            run("shapes_retrieval", *options, *more)
    folder = Path("output/shapes_retrieval/one")
    assert not run_folders.is_finished(folder)
    assert not list(folder.glob("result/metrics_test*"))


@pytest.fixture
def scale(monkeypatch):
    """Set the scale that a GradScaler starts with."""

    def arrange(scale):
        scaler = partial(torch.amp.GradScaler, init_scale=scale)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)

    return arrange


def test_a_scaler_that_finds_its_scale_is_no_fault(run, scale, caplog):
    """The gradient overflows in the first steps, more of them than may be skipped in a row."""
    scale(2.0**28)
    options = (*SHORT, "run.amp=fp16", "run.max_epoch=4", "run.max_skipped_steps=2")
    with caplog.at_level("WARNING"):
        result = run("shapes_retrieval", *options)
    runner = result.runner
    (taken,) = {int(moments["step"]) for moments in runner.optimizer.state.values()}
    overflows = 4 * len(runner.train_loader) - taken
    assert overflows > 2 and taken > 2
    assert runner.scaler.get_scale() == 2.0 ** (28 - overflows)
    assert not (result.output_dir / SKIPPED_STEPS).exists() and "skipped" not in caplog.text
    log = [json.loads(line) for line in (result.output_dir / "log.txt").read_text().splitlines()]
    assert {line["train_skipped_steps"] for line in log} == {0}


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(run, spoil, scale):
    scale(4.0)
    spoil(set(range(1, 100)), "gradient")
    options = (*SHORT, "run.amp=fp16", "run.max_skipped_steps=3", "run.job_id=one")
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        run("shapes_retrieval", *options)
    noted = (Path("output/shapes_retrieval/one") / SKIPPED_STEPS).read_text().splitlines()
    # at scales of 4 and 2 the scale was the cause
    assert [json.loads(line)["step"] for line in noted] == [2, 3, 4]


def test_weights_that_are_not_finite_are_not_saved(run, caplog):
    result = run("shapes_retrieval", *SHORT, "run.max_epoch=1")
    runner, path = result.runner, result.output_dir / LATEST
    before = path.read_bytes()
    model = runner.unwrap_dist_model(runner.model)
    next(iter(model.trainable_parameters().values())).data.view(-1)[0] = float("inf")
    with caplog.at_level("WARNING"):
        runner.save_latest(EpochProgress(1))
    assert "weights are not finite" in caplog.text
    assert path.read_bytes() == before


@pytest.mark.parametrize("amp", ["null", "fp16"])
def test_accumulated_batches_are_skipped_together(run, spoil, amp):
    spoil({1}, "nan")
    options = ("run.accum_grad_iters=2", "run.max_epoch=1", f"run.amp={amp}")
    result = run("shapes_retrieval", *SHORT, *options)
    (noted,) = (result.output_dir / SKIPPED_STEPS).read_text().splitlines()
    assert len(json.loads(noted)["items"]) == 4


def test_features_that_are_not_finite_stay_out_of_the_queue(build_model, video_batch):
    model = build_model().train()
    with torch.no_grad():
        model(video_batch)
        queues = model.image_queue.clone(), model.idx_queue.clone()
        spoiled = {**video_batch, "image_id": video_batch["image_id"] + 10}
        spoiled["video"] = video_batch["video"].clone()
        spoiled["video"][1] = float("nan")
        output = model(spoiled)
    assert not torch.isfinite(output.loss)
    for queue in (model.image_queue, model.text_queue):
        assert torch.isfinite(queue).all()
    assert 11 not in model.idx_queue and 10 in model.idx_queue  # the others are there
    assert not torch.equal(model.image_queue, queues[0])
    with torch.no_grad():
        assert torch.isfinite(model(video_batch).loss)


def test_negatives_of_what_is_no_number_are_still_indices():
    logits = torch.tensor([[float("nan")] * 3, [0.0, float("inf"), 0.0], [1.0, 2.0, 3.0]])
    same = torch.eye(3, dtype=torch.bool)
    chosen, has_negative = _sample_negatives(logits, same)
    assert has_negative.all() and ((chosen >= 0) & (chosen < 3)).all()
    assert chosen[2] != 2


def test_spoiled_weights_are_not_evaluated(run):
    result = run("shapes_retrieval", evaluate=True)
    model = result.runner.unwrap_dist_model(result.runner.model)
    next(iter(model.trainable_parameters().values())).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="features are not finite"):
        model.compute_sim_matrix(result.runner.dataloaders["test"], result.runner.config.run_cfg)


# --- ranks --------------------------------------------------------------------------------------


@pytest.mark.processes
def test_two_ranks_step_is_the_average_of_theirs(build_model, small_med_config, tmp_path):
    """Against the same two batches one after the other in one process, dropout included."""
    from lavis.common.registry import registry
    from small_models import CAPTIONS, SMALL

    cls = registry.get_model_class("blip_uniadapter_retrieval")
    config = OmegaConf.load(cls.default_config_path("shapes")).model
    config = OmegaConf.merge(
        config,
        {"vit": None},
        {**SMALL, "med_config_path": small_med_config, "negative_all_rank": False},
    )
    config.adapter.dropout = 0.1
    model = cls.from_config(config)
    for name, parameter in model.trainable_parameters().items():
        torch.manual_seed(len(name))
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    model.reset_momentum()
    content = {
        "config": OmegaConf.to_container(config, resolve=True),
        "state": model.state_dict(),
        "video": torch.randn(4, 3, 2, 32, 32, generator=torch.Generator().manual_seed(3)),
        "text_input": CAPTIONS,
    }
    torch.save(content, tmp_path / "model.pt")

    def gradients_of(rank):
        model = cls.from_config(config)
        model.load_state_dict(content["state"])
        torch.manual_seed(rank)
        part = slice(2 * rank, 2 * rank + 2)
        model.train()(
            {
                "video": content["video"][part],
                "text_input": CAPTIONS[part],
                "image_id": torch.arange(4)[part],
                **{"epoch": 1, "iters": 1, "num_iters_per_epoch": 4},
            }
        ).loss.backward()
        return {n: p.grad for n, p in model.trainable_parameters().items()}

    one_after_the_other = [gradients_of(rank) for rank in (0, 1)]
    script = str(ROOT / "tests/step_over_ranks.py")
    command = [sys.executable, script, str(tmp_path / "model.pt"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (
        torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert first.keys() == one_after_the_other[0].keys()
    largest = max(float(gradient.abs().max()) for gradient in one_after_the_other[0].values())
    for name, value in first.items():
        expected = (one_after_the_other[0][name] + one_after_the_other[1][name]) / 2
        # of the tensor's largest; float32 rounds what nearly cancels out
        atol = max(1e-5 * float(expected.abs().max()), 1e-7 * largest)
        torch.testing.assert_close(value, expected, rtol=0, atol=atol)
        assert torch.equal(value, second[name])
    alone = torch.cat([g.flatten() for g in one_after_the_other[0].values()])
    both = torch.cat([g.flatten() for g in first.values()])
    assert (alone - both).abs().max() > 1e-3  # the ranks' gradients differ


# --- leaks --------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads memory from /proc")
def test_memory_and_files_stay_flat(run):
    """Over 90 steps with checkpoints between, and 8 evaluations."""
    options = ('run.valid_splits=["val"]', "run.checkpoint_freq=4", "run.max_epoch=1")
    options += ("model.vit.width=32", "model.vit.num_heads=2")
    runner = run("shapes_retrieval", *SHORT, *options).runner
    loader = runner.train_loader

    def steps(number):
        for epoch in range(number // len(loader)):
            runner.train_epoch(EpochProgress(epoch))

    def evaluations(number):
        for _ in range(number):
            runner.eval_epoch("val", cur_epoch=0)

    for work, few, many in ((steps, 30, 90), (evaluations, 3, 8)):
        work(few)
        gc.collect()
        before = open_files(), live_tensors(), resident_megabytes()
        work(many)
        gc.collect()
        assert open_files() <= before[0]
        assert live_tensors() <= before[1]
        # a leak of one batch's activations, or of a file's frames, would be far more
        assert resident_megabytes() - before[2] < 12


def live_tensors() -> int:
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
