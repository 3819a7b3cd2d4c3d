"""The models, tasks and runner with LAVIS as its main branch has it."""

from __future__ import annotations

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip import BlipBase
from lavis.tasks.base_task import BaseTask
from lavis.tasks.retrieval import RetrievalTask
from omegaconf import OmegaConf

from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.tasks import VideoQATask


def main_train_step(self, model, samples):
    output = model(samples)
    return output["loss"], {k: v for k, v in output.items() if "loss" in k}


def main_init(self):
    super(BlipBase, self).__init__()
    raise AssertionError("BLIP models are not compatible with transformers>=4.27")


@pytest.fixture(params=["1.0.2", "main"])
def lavis(request, monkeypatch):
    """LAVIS as it is installed, and as main has it."""
    if request.param == "main":
        monkeypatch.setattr(BaseTask, "train_step", main_train_step)
        monkeypatch.setattr(BlipBase, "__init__", main_init, raising=False)
    return request.param


@pytest.mark.parametrize("kind", ["retrieval", "vqa", "caption"])
def test_models_start(lavis, kind):
    cls = registry.get_model_class(f"blip_uniadapter_{kind}")
    model = cls.from_config(OmegaConf.load(cls.default_config_path("shapes")).model)
    assert isinstance(model, BlipBase) and model.trainable_parameters()


class Output(dict):
    """As BlipOutput: items that are no losses, and more than one that is."""


def fake_model(samples):
    loss = torch.tensor(3.0, requires_grad=True)
    return Output(loss=loss, loss_itc=torch.tensor(2.0), logits=torch.zeros(4))


def test_losses_of_a_task_of_lavis(lavis):
    task = RetrievalTask(cfg={})
    losses = lavis_versions.losses(task, fake_model, {})
    assert {k: v.item() for k, v in losses.items()} == {"loss": 3.0, "loss_itc": 2.0}
    assert losses["loss"].requires_grad


class TaskOfItsOwn(BaseTask):
    def train_step(self, model, samples):
        output = model(samples)
        return lavis_versions.train_step_result(output["loss"] * 2)


def test_losses_of_a_task_with_a_train_step(lavis):
    losses = lavis_versions.losses(TaskOfItsOwn(), fake_model, {})
    assert {k: v.item() for k, v in losses.items()} == {"loss": 6.0}
    assert losses["loss"].requires_grad


def test_losses_that_are_numbers():
    class Task(BaseTask):
        def train_step(self, model, samples):
            return torch.tensor(1.0), {"loss": torch.tensor(1.0), "loss_a": 0.5}

    losses = lavis_versions.losses(Task(), fake_model, {})
    assert {k: v.item() for k, v in losses.items()} == {"loss": 1.0, "loss_a": 0.5}


def test_video_qa_returns_what_the_loop_of_lavis_takes(lavis):
    task = VideoQATask(OmegaConf.create({}))
    task._answers = ["red", "blue"]
    seen = {}

    def model(samples):
        seen.update(samples)
        return {"loss": torch.tensor(1.5)}

    # main's batches have lists where 1.0.2's have tensors
    answers = [1, 0] if lavis == "main" else torch.tensor([1, 0])
    result = task.train_step(model, {"answers": answers})
    assert seen["answer"] == ["blue", "red"]
    if lavis == "main":
        loss, losses = result
        assert float(loss) == 1.5 and losses.keys() == {"loss"}
    else:
        assert float(result) == 1.5


def test_ids_in_a_list_train_as_ids_in_a_tensor(build_model, video_batch):
    losses = []
    for ids in (video_batch["image_id"], video_batch["image_id"].tolist()):
        model = build_model().train()
        torch.manual_seed(0)
        losses.append(model({**video_batch, "image_id": ids})["loss"])
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_empty_model_is_a_module(lavis):
    class Empty(BlipBase):
        def __init__(self):
            lavis_versions.init_blip(self)

    assert isinstance(Empty(), BaseModel) and not Empty().state_dict()
