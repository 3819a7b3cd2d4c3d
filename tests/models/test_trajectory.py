"""Six optimizer steps of the released implementation, taken again by this package's runner."""

from __future__ import annotations

import pytest
from golden_cases import Case, GivenTokens, assert_close
from lavis.tasks import setup_task
from tiny_runs import TRAIN

from lavis_uniadapter.checkpoints.released import load_released_checkpoint, released_to_ours
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import destroy_process_group, init_process_group
from lavis_uniadapter.datasets.loading import Batch
from lavis_uniadapter.runners.epoch import EpochProgress
from lavis_uniadapter.runners.runner import RunnerUniAdapter


class Trajectory(Case):
    """A golden trajectory; a batch names its own step in place of texts."""

    def model(self):
        dims = self.about["dims"]
        self.tensors.update({"in.input_ids": None, "in.attention_mask": None})
        model = super().model(alpha_rampup_epochs=1)
        model.tokenizer = StepTokens(self, dims["enc"])
        load_released_checkpoint(model, self.under("state."))
        for name, p in model.named_parameters():
            if ".norm_cross_modal." in name:
                p.requires_grad_(self.about["norm_cross_modal_trained"])
        return model

    def batch(self, step: int) -> dict:
        visual = self[f"step{step}.visual"]
        key = "image" if self.about["frames"] is None else "video"
        return {
            key: visual if key == "image" else visual.transpose(1, 2),
            "text_input": [str(step)] * len(visual),
            "image_id": self[f"step{step}.idx"],
        }


class StepTokens(GivenTokens):
    def __init__(self, case: Case, enc_token_id: int):
        self._case = case
        self.enc_token_id = enc_token_id

    def __call__(self, texts, **kwargs):
        step = f"step{texts[0]}"
        given = GivenTokens(
            self._case[f"{step}.input_ids"], self._case[f"{step}.attention_mask"], 0
        )
        return given(texts)


class Batches:
    """Stands for the training loader: the batches of an epoch in the recorded order."""

    batch_size = 2

    def __init__(self, case: Trajectory):
        self._case = case
        self.dataset = ()  # that faults would be logged with

    def __len__(self):
        return self._case.about["steps"]

    def start(self, epoch: int, step: int) -> None:
        self._first = epoch * len(self)

    def __iter__(self):
        return (Batch(self._case.batch(self._first + i), []) for i in range(len(self)))


@pytest.fixture(params=["trajectory_image", "trajectory_image_released"])
def trajectory(request) -> Trajectory:
    return Trajectory(request.param)


@pytest.fixture
def runner(trajectory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = trajectory.about
    config = load_config(
        TRAIN / "shapes_retrieval.yaml",
        [
            *("run.device=cpu", "run.warmup_lr=-1", "run.weight_decay_on=all"),
            *(f"run.max_epoch={about['epochs']}", f"run.init_lr={about['lr']}"),
            f"run.weight_decay={about['weight_decay']}",
        ],
    )
    init_process_group("cpu")
    splits = {split: None for split in ("train", "val", "test")}
    datasets = {"shapes_retrieval": splits}
    runner = RunnerUniAdapter(config, setup_task(config), trajectory.model(), datasets, "golden")
    runner._dataloaders = {"train": Batches(trajectory)}
    yield runner
    destroy_process_group()


def test_losses_and_weights_after_six_steps(trajectory, runner, monkeypatch):
    """Optimizer, learning rates and the ramp of alpha are the runner's own."""
    steps = []
    original = runner.losses

    def losses(samples):
        values = original(samples)
        steps.append((runner.optimizer.param_groups[0]["lr"], values))
        return values

    monkeypatch.setattr(runner, "losses", losses)
    for epoch in range(trajectory.about["epochs"]):
        runner.train_epoch(EpochProgress(epoch))

    assert len(steps) == 6
    for i, (lr, values) in enumerate(steps):
        assert lr == pytest.approx(trajectory[f"step{i}.lr"].item())
        for name in ("loss_itc", "loss_itm"):
            assert_close(values[name].detach(), trajectory[f"step{i}.{name}"].squeeze(), 1e-5)

    final = released_to_ours(trajectory.under("final."), "default")
    state = runner.model.state_dict()
    trained = {name for name, p in runner.model.named_parameters() if p.requires_grad}
    momentum = {name for name in state if name.startswith("momentum_average.")}
    queues = {name for name in state if "queue" in name}
    assert trained | momentum | queues <= set(final)
    for name in trained | momentum | queues:
        # Adding the same to all keys changes no softmax: these biases follow rounding noise.
        if ".key_value." in name and ".key." in name and name.endswith("bias"):
            continue
        relative = 1e-5 if name in queues else 1e-4
        assert_close(state[name].float(), final[name].float(), relative)
