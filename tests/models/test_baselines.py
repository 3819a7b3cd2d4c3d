"""LAVIS's own models by ``projects/baselines``, on this package's runner and in its tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import small_lavis
import torch
import transformers
import yaml
from lavis.common.utils import get_abs_path
from miniature import BENCHMARKS
from miniature_runs import SMALL_RUN, InThisProcess, change
from miniature_runs import small_options as our_small_options
from omegaconf import OmegaConf
from tiny_runs import ROOT, TRAIN

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.models import lavis_models
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST, LATEST
from lavis_uniadapter.tasks import retrieval
from lavis_uniadapter.tools.compare import running
from lavis_uniadapter.tools.prepare.command import main as prepare
from uniadapter_cli.compare import main as compare

BASELINES = ROOT / "projects/baselines"
# By a file's name: the miniature that it reads, a metric of it, and LAVIS's project file.
FILES = {
    "blip_retrieval_coco": ("coco_retrieval", "t2i_r1", "blip/train/retrieval_coco_ft"),
    "blip_retrieval_flickr": ("flickr_retrieval", "mean_recall", "blip/train/retrieval_flickr_ft"),
    "albef_retrieval_flickr": ("flickr_retrieval", "i2t_r1", "albef/train/ret_flickr30k_ft"),
    "alpro_retrieval_msrvtt": ("msrvtt_retrieval", "t2v_r1", "alpro/train/msrvtt_retrieval_ft"),
    "alpro_retrieval_didemo": ("didemo_retrieval", "v2t_medr", "alpro/train/didemo_ret_ft"),
    "alpro_qa_msrvtt": ("msrvtt_qa", "accuracy", "alpro/train/msrvtt_qa_ft"),
    "alpro_qa_msvd": ("msvd_qa", "accuracy_where", "alpro/train/msvd_qa_ft"),
    "blip_vqa_vqav2": ("vqav2", "accuracy", "blip/train/vqav2_ft"),
    "blip_vqa_vqav2_val": ("vqav2", "accuracy", "blip/train/vqav2_ft"),
    "blip_caption_coco": ("coco_caption", "cider", "blip/train/caption_coco_ft"),
    "clip_flickr": ("flickr_retrieval", "t2i_r1", "clip/exp_flickr_ret_eval"),
    "clip_coco": ("coco_retrieval", "i2t_r5", "clip/exp_coco_ret_eval"),
}


def is_refused(name):
    """Whether a baseline cannot train with the versions installed here."""
    if name.startswith("alpro_retrieval"):  # torchmetrics, once imported, gives np.Inf back
        return not hasattr(np, "Inf")
    return name == "blip_caption_coco" and not transformers.__version__.startswith("4.26.")


def path_of(name):
    return BASELINES / f"{name}.yaml"


@pytest.fixture(autouse=True)
def quick_caption_scores(monkeypatch):
    """METEOR takes Java several seconds to start."""
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)


@pytest.fixture
def options_of(tmp_path, monkeypatch):
    """Options that make a baseline small and name its miniature; LAVIS's models become small."""
    monkeypatch.chdir(tmp_path)
    small_lavis.shrink(monkeypatch.setattr)

    def options(name):
        cache = tmp_path / "cache"
        if not cache.exists():
            BENCHMARKS[FILES[name][0]](cache)
        small = small_lavis.small_options(path_of(name), tmp_path)
        if not name.startswith("clip"):
            weights = tmp_path / f"{name}.pth"
            if not weights.exists():
                small_lavis.write_weights(path_of(name), small, weights)
            small.append(f"model.pretrained={weights}")
        small += [f"run.cache_root={cache}", *SMALL_RUN]
        return [*small, "run.batch_size_train=3", "run.max_epoch=2"]

    return options


@pytest.fixture
def start(options_of):
    """Run a small baseline in an empty folder."""

    def run(name, *options, evaluate=False):
        return launch.run(path_of(name), [*options_of(name), *options], evaluate)

    yield run
    launch.destroy_process_group()


# --- the files ----------------------------------------------------------------------------------


def test_every_file_is_tested():
    assert {path.stem for path in BASELINES.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_baseline_runs_and_a_comparison_reads_it(start, name, tmp_path):
    if is_refused(name):
        with pytest.raises(ConfigError, match=r"DEPENDENCIES=lavis, constraints/lavis\.txt"):
            start(name)
        return
    result = start(name)
    folder, model = result.output_dir, result.runner._model
    assert type(model).__module__.startswith("lavis.models.")
    summary = run_folders.read(folder)
    if name == "blip_vqa_vqav2":  # the answers to its test questions are not public
        assert result.metrics == {"test": {}}
        weights = ("model.load_finetuned=True", f"model.finetuned={folder / LATEST}")
        val = start(name, *weights, 'run.test_splits=["val"]', evaluate=True).output_dir
        assert 0 <= run_folders.read(val).metrics["val_accuracy"] <= 100
    else:
        metric = FILES[name][1]
        theirs = "agg_metrics" if name.startswith("blip_vqa") else metric  # LAVIS's task
        assert summary.metrics.get(metric) == result.metrics["test"][theirs]
    sizes = {n: p.numel() for n, p in model.named_parameters() if not re.match(r"\w+_m\.", n)}
    assert summary.total_parameters == sum(sizes.values())
    if name.startswith("clip"):
        assert summary.trained_parameters == 0
        return
    assert summary.trained_parameters == summary.total_parameters
    before, after = (
        torch.load(path, weights_only=True)["model"]
        for path in (tmp_path / f"{name}.pth", folder / LATEST)
    )
    changed = [key for key in sizes if not torch.equal(before[key], after[key])]
    assert len(changed) > 0.8 * len(sizes)


def plain(value):
    """A value of a YAML file, where 1e-5 is a string."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@pytest.mark.parametrize("name", [name for name in FILES if name != "blip_vqa_vqav2_val"])
def test_values_are_those_of_the_project_file_of_lavis(name):
    project = FILES[name][2]
    ours, theirs = (
        OmegaConf.to_container(OmegaConf.load(path))
        for path in (path_of(name), get_abs_path(f"projects/{project}.yaml"))
    )
    assert f"lavis/projects/{project}.yaml" in path_of(name).read_text().splitlines()[0]
    evaluates = theirs["run"]["evaluate"]
    # for distributed training, or decided by the runner and the tasks of this package
    others = {"task", "valid_splits", "device", "world_size", "dist_url", "distributed", "amp"}
    others |= {"use_dist_eval_sampler", "resume_ckpt_path", "output_dir"}
    others |= {"batch_size_train"} if evaluates else set()
    added = {"runner", "task", "valid_splits", "device", "amp", "output_dir", "selection_metric"}

    assert ours["model"] == theirs["model"]
    defaults = {"image_size": 384} if name == "blip_caption_coco" else {}
    for dataset, section in theirs["datasets"].items():
        given = ours["datasets"][dataset]
        for kind, processors in section.items():
            wanted = {k: v for k, v in processors.items() if k == "eval" or not evaluates}
            if kind == "vis_processor":
                wanted = {mode: {**defaults, **options} for mode, options in wanted.items()}
            assert given[kind] == wanted
    assert ours["datasets"].keys() == theirs["datasets"].keys()
    for key, value in theirs["run"].items():
        if key not in others and (key, value) != ("evaluate", False):
            assert plain(ours["run"][key]) == plain(value), key
    assert set(ours["run"]) <= set(theirs["run"]) | added


# --- metrics ------------------------------------------------------------------------------------


def test_recalls_are_those_of_lavis_own_task(start, tmp_path, options_of):
    """Under the names of this package, whichever task measured them."""
    name = "blip_retrieval_flickr"
    options_of(name)
    annotations = tmp_path / "cache/flickr30k/annotations"
    train = json.loads((annotations / "train.json").read_text())
    # Three images of three colours, so that nothing ties; four captions of the first, so that the
    # two directions differ.
    captions = [[0, 1, 6, 7], [2], [4]]
    change(
        annotations / "test.json",
        lambda _: [
            {"image": train[texts[0]]["image"], "caption": [train[i]["caption"] for i in texts]}
            for texts in captions
        ],
    )
    ours = start(name, "run.k_test=3", evaluate=True)
    theirs = start(name, "run.k_test=3", "run.task=retrieval", evaluate=True)
    assert ours.metrics["test"]["t2i_r1"] != ours.metrics["test"]["i2t_r1"]
    read = run_folders.read(theirs.output_dir)
    for name in ("t2i_r1", "t2i_r5", "i2t_r1"):  # i2t_r5 is beyond the texts that are reranked
        assert read.metrics.get(name) == pytest.approx(ours.metrics["test"][name]), name


def test_accuracy_is_that_of_lavis_own_task_in_percent(start, tmp_path):
    name = "alpro_qa_msrvtt"
    first = start(name, evaluate=True)
    items = json.loads((first.output_dir / "result/test_epoch_best.json").read_text())
    predicted = {item["question_id"]: item["prediction"] for item in items}

    def answer_some_as_predicted(records):
        for record in records[::2]:
            record["answer"] = predicted[record["question_id"]]

    change(tmp_path / "cache/msrvtt/annotations/qa_test.json", answer_some_as_predicted)
    ours = start(name, evaluate=True)
    theirs = start(name, "run.task=multimodal_classification", evaluate=True)
    fraction = theirs.metrics["test"]["acc"]
    assert 0.5 <= fraction < 1
    expected = pytest.approx(100 * fraction)
    assert run_folders.read(theirs.output_dir).metrics.get("accuracy") == expected
    assert run_folders.read(ours.output_dir).metrics.get("accuracy") == expected
    # as LAVIS's own runner leaves it
    (theirs.output_dir / run_folders.SUMMARY).unlink()
    assert run_folders.read(theirs.output_dir).metrics.get("accuracy") == expected


def test_accuracy_that_lavis_gives_in_percent_stays(tmp_path):
    """Its ``gqa`` has the names of ``multimodal_classification``."""
    (tmp_path / run_folders.LAVIS_RESULTS).write_text('{"agg_metrics": 0.5, "acc": 0.5}\n')
    assert run_folders.read(tmp_path).metrics.get("accuracy") == 0.5


def test_evaluation_under_autocast_scores_in_float32(start, monkeypatch):
    scores = []
    measure = retrieval.retrieval_ranks

    def keep(scores_v2t, scores_t2v, *args):
        scores.append(scores_t2v)
        return measure(scores_v2t, scores_t2v, *args)

    monkeypatch.setattr(retrieval, "retrieval_ranks", keep)
    start("blip_retrieval_flickr", evaluate=True)
    start("blip_retrieval_flickr", "run.amp=bf16", evaluate=True)
    np.testing.assert_array_equal(*scores)


def test_trains_under_autocast(start):
    assert "t2i_r1" in start("albef_retrieval_flickr", "run.amp=bf16").metrics["test"]


class Elsewhere(torch.Tensor):
    """Indices that, like those on CUDA, a tensor on the CPU refuses."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], cls):
            raise RuntimeError("indices should be either on cpu or on the same device")
        if func is torch.Tensor.to:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_alpro_indexes_features_on_the_cpu_by_indices_that_are_elsewhere(start, monkeypatch):
    topk = torch.Tensor.topk

    def topk_elsewhere(self, *args, **kwargs):
        values, indices = topk(self, *args, **kwargs)
        return values, indices.as_subclass(Elsewhere)

    expected = start("alpro_retrieval_msrvtt", evaluate=True).metrics
    monkeypatch.setattr(torch.Tensor, "topk", topk_elsewhere)
    assert start("alpro_retrieval_msrvtt", evaluate=True).metrics == expected


# --- what does not stop a run, and what does ----------------------------------------------------


def test_options_of_our_models_do_not_stop_a_baseline(start, caplog):
    options = ("run.itc_weight=0", "run.rerank_batch=8", "run.feature_memory=1")
    with caplog.at_level("INFO", logger="lavis_uniadapter"):
        start("blip_retrieval_flickr", *options, "model.tuning=full", evaluate=True)
    ignored = "run.feature_memory, run.itc_weight, run.rerank_batch."
    assert f"'blip_retrieval' does not read {ignored}" in caplog.text
    start("clip_flickr", "run.k_test=0")  # which never reranks


def test_training_questions_without_a_class_are_left_out(start, caplog):
    with caplog.at_level("INFO", logger="lavis_uniadapter"):
        result = start("alpro_qa_msrvtt", "run.max_epoch=1")
    assert "5 of 15 questions left out" in caplog.text
    train = result.runner.datasets["train"]
    assert len(train) == 10
    assert all(train[i]["answers"] < 5 for i in range(10))
    assert result.metrics["test"]["unknown_answers"] > 0  # those of the test split stay


TO_VQA = ("model.arch=blip_vqa", "model.model_type=vqav2", "model.image_size=32")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("blip_retrieval_flickr", ["run.batch_size_train=5"], r"queue_size is 12.*multiple.*\(5\)"),
        ("albef_retrieval_flickr", ["model.queue_size=0"], r"queue_size is 0.*multiple.*\(3\)"),
        ("blip_retrieval_coco", ["run.k_test=0"], "run.k_test is 0.*always reranks"),
        ("blip_retrieval_coco", ["run.itc_wieght=0"], "Did you mean 'itc_weight'"),
        ("blip_retrieval_coco", ["model.image_size=64"], "model.image_size is 64"),
        ("blip_retrieval_coco", ["model.pretrained=null"], "model.pretrained is None"),
        ("alpro_qa_msvd", ["model.pretrained=no.pth"], "model.pretrained is 'no.pth'"),
        (
            "albef_retrieval_flickr",
            ["model.load_finetuned=True", "model.finetuned=no.pth"],
            "model.finetuned is 'no.pth'",
        ),
        ("alpro_qa_msvd", ["model.num_classes=7"], "num_classes is 7.*5 answer classes"),
        (
            "alpro_retrieval_didemo",
            ["datasets.didemo_retrieval.vis_processor.eval.n_frms=4", "run.evaluate=True"],
            "eval.n_frms is 4 and model.timesformer.n_frms is 2",
        ),
        ("alpro_qa_msrvtt", TO_VQA, "msrvtt_qa has videos.*'blip_vqa' reads images"),
    ],
)
def test_what_would_stop_a_baseline_later_is_refused(start, name, options, expected):
    with pytest.raises(ConfigError, match=expected):
        start(name, *options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("alpro_retrieval_msrvtt", [], "AlproRetrieval trains with np.Inf"),
        ("blip_caption_coco", ["run.evaluate=True"], "BlipCaption generates.*before 4.27"),
        ("blip_vqa_vqav2", ["run.inference_method=generate"], "BlipVQA generates.*before 4.27"),
    ],
)
def test_versions_that_break_lavis_are_named_with_the_set(
    start, monkeypatch, name, options, expected
):
    monkeypatch.delattr(np, "Inf", raising=False)
    monkeypatch.setattr(transformers, "__version__", "4.55.4")
    with pytest.raises(ConfigError, match=rf"{expected}.*DEPENDENCIES=lavis, constraints/lavis"):
        start(name, *options)
    if name == "alpro_retrieval_msrvtt":
        assert "t2v_r1" in start(name, evaluate=True).metrics["test"]
    elif name == "blip_vqa_vqav2":
        start(name, evaluate=True)


def test_extracted_frames_are_for_this_package_s_processors(start, options_of, tmp_path):
    options_of("alpro_qa_msrvtt")
    videos, frames = tmp_path / "cache/msrvtt/videos", tmp_path / "frames"
    assert prepare(["frames", "--videos", str(videos), "--output", str(frames)]) == 0
    storage = f"datasets.msrvtt_qa.build_info.videos.storage={frames}"
    with pytest.raises(DatasetError, match="5 files cannot be read"):
        start("alpro_qa_msrvtt", storage)
    ours = [
        f"datasets.msrvtt_qa.vis_processor.{mode}.name=blip_video_{mode}"
        for mode in ("train", "eval")
    ]
    assert "accuracy" in start("alpro_qa_msrvtt", storage, *ours).metrics["test"]


# --- several processes, and the table -----------------------------------------------------------


@pytest.mark.processes
def test_two_processes_train_and_test_as_one(start, options_of, tmp_path):
    name = "blip_retrieval_flickr"
    small = [*options_of(name), "run.batch_size_train=2", "run.max_epoch=1", "run.job_id=two"]
    annotations = tmp_path / "cache/flickr30k/annotations"
    records = [
        record
        for split in ("val", "test")
        for record in json.loads((annotations / f"{split}.json").read_text())
    ]
    for split in ("val", "test"):  # three images of three colours, so that nothing ties
        change(annotations / f"{split}.json", lambda _: records[:3])
    command = [sys.executable, small_lavis.__file__, "train", str(path_of(name)), *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "output/baselines/blip_retrieval_flickr/two"
    weights = ("model.load_finetuned=True", f"model.finetuned={folder / BEST}")
    alone = start(name, *weights, evaluate=True)
    assert run_folders.read(folder).metrics == alone.metrics["test"]


def test_a_gallery_that_leaves_a_process_nothing_is_refused(start, monkeypatch):
    monkeypatch.setattr(lavis_models, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="datasets.flickr30k, val is too small for 2 processes"):
        start("blip_retrieval_flickr")


def test_one_table_of_our_methods_and_lavis_models(
    start, options_of, tmp_path, small_med_config, monkeypatch, capsys
):
    """By one command; UniAdapter, full fine-tuning, and two of LAVIS's own models."""
    monkeypatch.setattr(running, "ThreadPoolExecutor", InThisProcess)
    monkeypatch.setattr(running.subprocess, "Popen", InThisProcess)
    blip = options_of("blip_retrieval_flickr")
    ours = our_small_options(TRAIN / "flickr_retrieval.yaml", small_med_config)
    ours.append(f"model.pretrained={tmp_path / 'blip_retrieval_flickr.pth'}")
    every = [*SMALL_RUN, "run.batch_size_train=3", "run.max_epoch=1", "run.k_test=2"]
    every += ["run.itc_weight=0", "run.rerank_batch=8", "run.feature_memory=1"]
    every += ["run.selection_metric=mean_recall", f"run.cache_root={tmp_path / 'cache'}"]
    full = [option for option in ours if not option.startswith("model.adapter.")]
    clip = {"cfg_path": str(path_of("clip_flickr")), "options": options_of("clip_flickr")}
    runs = {
        "UniAdapter": {"options": [*ours, "model.tuning=uniadapter"]},
        "full": {"options": [*full, "model.tuning=full"]},
        "BLIP": {"cfg_path": str(path_of("blip_retrieval_flickr")), "options": blip},
        "CLIP": {**clip, "evaluate": True},
    }
    plan = {
        "cfg_path": str(TRAIN / "flickr_retrieval.yaml"),
        "output_dir": "table",
        "metrics": ["mean_recall", "t2i_r1", "i2t_r1"],
        "seeds": [1],
        "options": every,
        "runs": runs,
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    assert compare(["plan.yaml"]) == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "table/comparison.json").read_text())
    assert [row["method"] for row in rows] == list(runs)
    for row in rows:
        assert not row["failures"]
        assert all(0 <= row[metric] <= 100 for metric in plan["metrics"])
    trained = {row["method"]: row["trained parameters"] for row in rows}
    assert trained["BLIP"] == trained["full"] > trained["UniAdapter"] > trained["CLIP"] == 0
