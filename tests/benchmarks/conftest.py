"""Recipes on miniature data."""

import pytest
import torch
from lavis.common.registry import registry
from miniature import BENCHMARKS
from miniature_runs import PROJECTS, SMALL_RUN, SMALL_TRAINING, small_options
from omegaconf import OmegaConf

from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.evaluation.caption_metrics import has_java
from lavis_uniadapter.runners import launch


@pytest.fixture
def start(tmp_path, small_med_config, monkeypatch):
    """Run a benchmark's configuration on its miniature, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    base = tmp_path / "blip.pth"

    def run(name, *options, evaluate=False):
        path = PROJECTS / f"train/{name}.yaml"
        small = small_options(path, small_med_config)
        if not cache.exists():
            BENCHMARKS[name](cache)
        if not base.exists():
            model_cfg = OmegaConf.from_dotlist(
                [o.removeprefix("model.") for o in small if o.startswith("model.")]
            )
            config = OmegaConf.load(path).model
            cls = registry.get_model_class(config.arch)
            defaults = OmegaConf.load(cls.default_config_path(config.model_type)).model
            model = cls.from_config(OmegaConf.merge(defaults, model_cfg, {"pretrained": None}))
            torch.save({"model": base_state_dict(model)}, base)
        training = () if evaluate else SMALL_TRAINING
        common = (f"model.pretrained={base}", f"run.cache_root={cache}")
        options = [*small, *common, *SMALL_RUN, *training, *options]
        return launch.run(path, options, evaluate)

    run.cache = cache
    run.med_config = small_med_config
    yield run
    launch.destroy_process_group()


@pytest.fixture(autouse=True)
def quick_caption_scores(monkeypatch):
    """Without METEOR, for which Java takes seconds to start, unless a test asks for it."""
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)


@pytest.fixture
def java_scores(quick_caption_scores, monkeypatch):
    monkeypatch.setattr(caption_metrics, "has_java", has_java)
