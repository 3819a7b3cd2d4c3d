"""Recipes, shrunk to run on miniature data in seconds."""

from __future__ import annotations

import json
from concurrent.futures import Executor, Future
from pathlib import Path

from miniature import BENCHMARKS
from omegaconf import OmegaConf

from lavis_uniadapter.runners import launch
from uniadapter_cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = ROOT / "projects/uniadapter"
SIZE = 32
SMALL_MODEL = (
    "model.tokenizer=configs/tokenizers/shapes",
    "model.vit_type=custom",
    *("model.vit.width=32", "model.vit.depth=2", "model.vit.num_heads=4"),
    *("model.vit.patch_size=16", "model.vit.mlp_ratio=2"),
    f"model.image_size={SIZE}",
    *("model.adapter.bottleneck=8", "model.adapter.kv_bottleneck=4"),
)
SMALL_RUN = ("run.num_workers=0", "run.batch_size_eval=3", "run.device=cpu")
SMALL_TRAINING = ("run.batch_size_train=3", "run.max_epoch=2")


def small_options(path, med_config):
    """Options that shrink a benchmark's model, pictures and number of frames."""
    config = OmegaConf.load(path)
    options = [*SMALL_MODEL, f"model.med_config_path={med_config}"]
    if config.model.arch == "blip_uniadapter_retrieval":
        options += ["model.embed_dim=16", "model.queue_size=12", "run.k_test=2"]
    for name, section in config.datasets.items():
        for mode, processor in section.vis_processor.items():
            where = f"datasets.{name}.vis_processor.{mode}"
            options.append(f"{where}.image_size={SIZE}")
            if "n_frms" in processor:
                options.append(f"{where}.n_frms={processor.n_frms // 4}")
    return options


def change(path, edit):
    content = json.loads(path.read_text())
    content = edit(content) or content
    path.write_text(json.dumps(content))


def two_retrieval_sets(start, *options):
    """MSR-VTT and DiDeMo trained together."""
    BENCHMARKS["msrvtt_retrieval"](start.cache)
    BENCHMARKS["didemo_retrieval"](start.cache)
    path = PROJECTS / "train/msrvtt_retrieval.yaml"
    config = OmegaConf.load(path)
    config.datasets.didemo_retrieval = config.datasets.msrvtt_retrieval
    OmegaConf.save(config, "both.yaml")
    common = [*small_options("both.yaml", start.med_config), *SMALL_RUN, *SMALL_TRAINING]
    common += ["model.pretrained=null", f"run.cache_root={start.cache}", "run.max_epoch=1"]
    return launch.run("both.yaml", [*common, *options])


class InThisProcess(Executor):
    """Stands for the pool of a comparison, and for the processes that it starts."""

    def __init__(self, jobs_or_command, **kwargs):
        self._command = jobs_or_command

    def submit(self, do, *args, **kwargs):
        future = Future()
        future.set_result(do(*args, **kwargs))
        return future

    def wait(self):
        return main(self._command[self._command.index("uniadapter_cli") + 1 :])
