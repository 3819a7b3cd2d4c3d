"""Small models and data that tests share."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network

import pytest
import torch
from hypothesis import settings
from lavis.common.registry import registry
from omegaconf import OmegaConf
from small_models import CAPTIONS, SMALL
from tiny_runs import TRAIN, options_of

import lavis_uniadapter  # noqa: F401
from lavis_uniadapter.runners import launch
from lavis_uniadapter.tools.compare.running import environment

# one each, where pytest-xdist runs tests side by side, and for the processes that they start
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(environment(int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# What fails once fails again, and a busy machine makes nothing fail. To search further:
# pytest --hypothesis-profile=search, with ten times the examples, others each time.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=False)
settings.register_profile("search", max_examples=1000, deadline=None, print_blob=False)
settings.load_profile("repeatable")

# Each run ends with a garbage collection, which need not look at all that was imported.
gc.freeze()


@pytest.fixture(scope="session")
def small_med_config(tmp_path_factory) -> str:
    """A two-layer text encoder of width 32, as a JSON file."""
    import json

    from lavis_uniadapter.common.paths import PACKAGE_ROOT

    config = json.loads((PACKAGE_ROOT / "configs/models/shapes_med_config.json").read_text())
    config.update(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    path = tmp_path_factory.mktemp("med") / "med.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="session")
def build_model(small_med_config):
    """Build a small retrieval model from its real configuration file, with overrides."""

    def build(seed: int = 0, **overrides):
        cls = registry.get_model_class("blip_uniadapter_retrieval")
        cfg = OmegaConf.load(cls.default_config_path("shapes")).model
        cfg = OmegaConf.merge(
            cfg, {"vit": None}, {**SMALL, "med_config_path": small_med_config}, overrides
        )
        torch.manual_seed(seed)
        return cls.from_config(cfg)

    return build


@pytest.fixture
def video_batch():
    """A training batch of four videos of three frames, with distinct ids."""
    generator = torch.Generator().manual_seed(7)
    return {
        "video": torch.randn(4, 3, 3, 32, 32, generator=generator),
        "text_input": list(CAPTIONS),
        "image_id": torch.arange(4),
        "epoch": 0,
        "iters": 3,
        "num_iters_per_epoch": 10,
    }


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """One cache of generated data for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def emoji_folder(tmp_path, monkeypatch):
    """The current folder has the file that the recipe ``emoji_pretrain`` starts from."""
    (tmp_path / "emoji/start").mkdir(parents=True)
    (tmp_path / "emoji/start/start.pth").touch()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path, tiny_cache, monkeypatch):
    """Run a configuration of the embedded example, made tiny, here and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def start(name="shapes_retrieval", *options, evaluate=False):
        tiny = options_of(str(name), tiny_cache)
        return launch.run(TRAIN / f"{name}.yaml", [*tiny, *options], evaluate)

    yield start
    launch.destroy_process_group()


@pytest.fixture(scope="session")
def build_small(small_med_config):
    """Build a small model of any kind and tuning from its real configuration file."""
    from small_models import VIT

    def build(arch: str, tuning: str = "uniadapter", seed: int = 0, **overrides):
        cls = registry.get_model_class(arch)
        cfg = OmegaConf.load(cls.default_config_path("shapes")).model
        small = {
            **{"image_size": 32, "vit": VIT, "med_config_path": small_med_config},
            "tuning": tuning,
            "adapter": {"bottleneck": 8, "kv_bottleneck": 4, "frame_aware": False},
            "lora": {"rank": 2},
        }
        cfg = OmegaConf.merge(cfg, {"vit": None}, small, overrides)
        torch.manual_seed(seed)
        return cls.from_config(cfg)

    return build
