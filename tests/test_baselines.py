"""LAVIS's own models by ``projects/baselines``, on this package's runner and in its tables."""

from __future__ import annotations

import json

import pytest
import small_lavis
import torch
from miniature import BENCHMARKS
from tiny_runs import ROOT

from lavis_uniadapter import launch, run_folders

BASELINES = ROOT / "projects/baselines"
# the miniature that each reads, and a metric that its test split has
DATA = {
    "blip_retrieval_coco": ("coco_retrieval", "t2i_r1"),
    "blip_retrieval_flickr": ("flickr_retrieval", "mean_recall"),
    "albef_retrieval_flickr": ("flickr_retrieval", "i2t_r1"),
    "alpro_retrieval_msrvtt": ("msrvtt_retrieval", "t2v_r1"),
    "alpro_retrieval_didemo": ("didemo_retrieval", "v2t_medr"),
    "alpro_qa_msrvtt": ("msrvtt_qa", "accuracy"),
    "alpro_qa_msvd": ("msvd_qa", "accuracy_where"),
    "blip_vqa_vqav2": ("vqav2", None),
    "blip_caption_coco": ("coco_caption", "cider"),
    "clip_flickr": ("flickr_retrieval", "t2i_r1"),
    "clip_coco": ("coco_retrieval", "i2t_r5"),
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run a baseline, made small, on its miniature, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    small_lavis.shrink(monkeypatch.setattr)
    cache = tmp_path / "cache"

    def run(name, *options, evaluate=False):
        path = BASELINES / f"{name}.yaml"
        small = small_lavis.small_options(path, tmp_path)
        if not cache.exists():
            BENCHMARKS[DATA[name][0]](cache)
        if not name.startswith("clip"):
            weights = tmp_path / f"{name}.pth"
            if not weights.exists():
                torch.manual_seed(0)
                small_lavis.write_weights(path, small, weights)
            small.append(f"model.pretrained={weights}")
        small += [f"run.cache_root={cache}", "run.device=cpu", "run.num_workers=0"]
        small += ["run.batch_size_train=3", "run.batch_size_eval=3", "run.max_epoch=2"]
        return launch.run(path, [*small, *options], evaluate)

    run.cache = cache
    yield run
    launch.destroy_process_group()


@pytest.mark.parametrize("name", DATA)
def test_baseline_trains_and_is_tested(start, name):
    result = start(name)
    summary = json.loads((result.output_dir / run_folders.SUMMARY).read_text())
    print(summary)
