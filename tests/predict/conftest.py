"""Small recipes of each kind with trained weights, and a folder of clips and images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lavis.common.registry import registry
from search_media import write_clip, write_image
from small_models import perturb

from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import destroy_process_group
from lavis_uniadapter.tools import recipes

TASKS = ("retrieval", "qa", "caption")


@pytest.fixture(scope="session", params=TASKS)
def every_task(request, recipe_of) -> SimpleNamespace:
    return recipe_of(request.param)


@pytest.fixture(scope="session")
def recipe_of(tmp_path_factory):
    """A task's recipe by name, options that make it small, and an adapter."""
    made: dict[str, SimpleNamespace] = {}

    def make(task: str) -> SimpleNamespace:
        if task not in made:
            made[task] = _make(task, tmp_path_factory.mktemp(task))
        return made[task]

    return make


def _make(task: str, folder: Path) -> SimpleNamespace:
    name = f"shapes_{task}"
    options = ["model.vit.depth=1", "run.device=cpu", "run.amp=null", "run.batch_size_eval=3"]
    options += [f"datasets.{name}.vis_processor.eval.n_frms=2", f"run.cache_root={folder}"]
    config = load_config(recipes.runs()[name], [*options, "run.evaluate=True"])
    cls = registry.get_model_class(config.model_cfg.arch)
    options += [f"model.pretrained={folder / 'base.pth'}"]
    torch.manual_seed(3)
    model = cls.from_config(config.model_cfg)
    perturb(model, by=0.05)
    base = {k: v for k, v in model.state_dict().items() if not k.startswith("adapters.")}
    torch.save({"model": base}, folder / "base.pth")
    config.model_cfg.pretrained = str(folder / "base.pth")
    model = cls.from_config(config.model_cfg)
    perturb(model.adapters, by=0.1)
    model.save_adapter(folder / "adapter")
    return SimpleNamespace(task=task, name=name, options=options, adapter=folder / "adapter")


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """Six clips, two images and a file that is no video."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "sub").mkdir()
    for i in range(5):
        write_clip(folder / f"{i}.mp4", 1 + i % 2, seed=i)
    write_clip(folder / "sub/long.mp4", 25, seed=9)
    write_image(folder / "a.png", seed=4)
    write_image(folder / "sub/b.jpg", seed=5)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(autouse=True)
def _leave_the_group():
    yield
    destroy_process_group()
