"""Every benchmark's configuration, run on a miniature of its data in LAVIS's own layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from lavis.common.registry import registry
from miniature import BENCHMARKS, coco_ground_truth, custom
from miniature_runs import (
    PROJECTS,
    ROOT,
    SMALL_RUN,
    change,
    small_options,
    two_retrieval_sets,
)
from omegaconf import OmegaConf

from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.evaluation.caption_metrics import has_java
from lavis_uniadapter.runners.run_checkpoints import LATEST
from lavis_uniadapter.runners.runner import BEST_ADAPTER, LATEST_ADAPTER

LAVIS_BUILDERS = {
    "msrvtt_retrieval": "retrieval_builder",
    "didemo_retrieval": "retrieval_builder",
    "coco_retrieval": "retrieval_builder",
    "flickr30k": "retrieval_builder",
    "msrvtt_qa": "video_qa_builder",
    "msvd_qa": "video_qa_builder",
    "coco_vqa": "vqa_builder",
    "vg_vqa": "vqa_builder",
    "coco_caption": "caption_builder",
    "msrvtt_caption": "caption_builder",
    "msvd_caption": "caption_builder",
}


METRIC = {
    "msrvtt_retrieval": "t2v_r1",
    "didemo_retrieval": "v2t_r1",
    "coco_retrieval": "t2i_r1",
    "flickr_retrieval": "i2t_medr",
    "msrvtt_qa": "accuracy_where",
    "msvd_qa": "accuracy",
    "vqav2": None,
    "coco_caption": "cider",
    "msrvtt_caption": "bleu_4",
    "msvd_caption": "rouge_l",
}


def items_of(run):
    return json.loads((run.output_dir / "result/test_epoch_best.json").read_text())


def all_captions_are_references(trained):
    assert [len(item["references"]) for item in items_of(trained)] == [2, 2]
    assert len(trained.runner.datasets["test"]) == 2


def image_ids_are_those_that_coco_wants(trained):
    assert [int(item["image_id"]) for item in items_of(trained)] == [17, 18]


def evaluation_has_more_frames_than_training(trained):
    datasets = trained.runner.datasets
    assert datasets["train"][0]["video"].shape[1] == 2
    assert datasets["test"][0]["video"].shape[1] == 4


WHAT_IT_LEAVES = {
    "msrvtt_caption": all_captions_are_references,
    "coco_caption": image_ids_are_those_that_coco_wants,
    "didemo_retrieval": evaluation_has_more_frames_than_training,
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_trains_and_evaluates(start, name):
    trained = start(name)
    assert (trained.output_dir / LATEST).is_file()
    log = [json.loads(line) for line in (trained.output_dir / "log.txt").read_text().splitlines()]
    assert sum("train_loss" in line for line in log) == 2
    state = torch.load(trained.output_dir / LATEST, weights_only=True)["model"]
    # what starts at zero has moved
    assert all(value.any() for key, value in state.items() if key.endswith("up.textual.weight"))
    config = OmegaConf.load(PROJECTS / "train" / f"{name}.yaml")
    assert list(trained.runner.config.datasets_cfg) == list(config.datasets)
    for dataset_name in config.datasets:
        builder = registry.get_builder_class(dataset_name)
        assert builder.__module__ == f"lavis.datasets.builders.{LAVIS_BUILDERS[dataset_name]}"
    datasets = trained.runner.datasets
    parts = datasets["train"].datasets
    assert len(parts) == len(config.datasets)
    for dataset in (*parts, datasets["test"]):
        assert type(dataset).__module__.startswith("lavis.datasets.datasets."), type(dataset)

    WHAT_IT_LEAVES.get(name, lambda trained: None)(trained)

    # The best epoch is tested, or the last where nothing chooses.
    folder = BEST_ADAPTER if config.run.valid_splits else LATEST_ADAPTER
    adapter = f"model.adapter_ckpt={trained.output_dir / folder}"
    evaluated = start(name, adapter, evaluate=True)
    for metrics in (evaluated.metrics["test"], trained.metrics["test"]):
        metrics.pop("agg_metrics", None)  # by the selection metric, which training alone has
    assert evaluated.metrics == trained.metrics
    if name == "vqav2":
        assert trained.metrics == {"test": {}}  # has no answers
        files = [run.output_dir / "result/test_vqa_result.json" for run in (trained, evaluated)]
        written, again = (json.loads(path.read_text()) for path in files)
        assert written == again
        assert {item["question_id"] for item in written} == {60, 61, 70, 71}
        val = start(name, adapter, 'run.test_splits=["val"]', evaluate=True).metrics["val"]
        assert set(val) == {"agg_metrics", "other"} and 0 <= val["agg_metrics"] <= 100
    else:
        assert METRIC[name] in trained.metrics["test"]


@pytest.mark.parametrize("task", ["retrieval", "qa", "caption"])
def test_own_data_trains_and_evaluates(start, tmp_path, task):
    """The example of the README, in the current folder; nothing is copied anywhere."""
    start.cache.mkdir()
    custom(tmp_path / "my_data", task)
    name = f"custom_{task}"
    trained = start(name)
    metric = {"retrieval": "t2v_r1", "qa": "accuracy", "caption": "cider"}[task]
    assert metric in trained.metrics["test"]
    adapter = f"model.adapter_ckpt={trained.output_dir / BEST_ADAPTER}"
    # Only evaluated, it still chooses from the training answers.
    evaluated = start(name, adapter, "run.evaluate=True")
    assert evaluated.metrics == trained.metrics
    assert set(evaluated.runner.datasets) == {"test"}
    assert list(start.cache.iterdir()) == []
    prefix = "qa_" if task == "qa" else ""
    assert {p.name for p in (tmp_path / "my_data").iterdir()} == {
        *(f"{prefix}{split}.csv" for split in ("train", "val", "test")),
        "videos",
    }


def test_evaluation_builds_no_training_data(start):
    """Visual Genome has training questions alone, and is then not asked for."""
    evaluated = start("vqav2", evaluate=True)
    assert set(evaluated.runner.datasets) == {"test"}
    assert list(evaluated.runner.config.datasets_cfg) == ["coco_vqa"]


def test_video_qa_learns_all_answers_and_saves_each_question(start, monkeypatch):
    """A training index is the answer that LAVIS's dataset meant, even if it is not a class."""
    from lavis_uniadapter.models import BlipUniAdapterVQA

    learnt = []
    original = BlipUniAdapterVQA.forward

    def forward(self, samples):
        learnt.extend(zip(samples["question_id"].tolist(), samples["answer"], strict=True))
        return original(self, samples)

    monkeypatch.setattr(BlipUniAdapterVQA, "forward", forward)
    result = start("msrvtt_qa", "run.selection_metric=accuracy_what", "run.max_epoch=1")
    path = start.cache / "msrvtt/annotations/qa_train.json"
    truth = {r["question_id"]: r["answer"] for r in json.loads(path.read_text())}
    assert dict(learnt) == truth and "star" in truth.values()

    metrics, items = result.metrics["test"], items_of(result)
    assert len(items) == 6 and len({item["question_id"] for item in items}) == 6
    assert {"question", "question_type", "answer", "prediction", "file"} <= set(items[0])
    right = [item["prediction"] == item["answer"] for item in items]
    assert [item["correct"] for item in items] == right
    assert metrics["accuracy"] == pytest.approx(100 * sum(right) / 6)
    assert metrics["agg_metrics"] == metrics["accuracy_what"]
    assert {"accuracy_what", "accuracy_who", "accuracy_where"} <= set(metrics)
    assert not {"accuracy_how", "accuracy_when", "accuracy_other"} & set(metrics)
    # "star" is not a class: ranking cannot give it, and it counts as wrong
    unknown = [item["answer"] == "star" for item in items]
    assert 0 < sum(unknown) < 6
    assert metrics["unknown_answers"] == pytest.approx(100 * sum(unknown) / 6)
    assert all(item["prediction"] != "star" for item in items)
    assert metrics["accuracy_who"] == 0


def test_video_qa_by_generation_may_give_unknown_answers(start, monkeypatch):
    from lavis_uniadapter.models import BlipUniAdapterVQA

    monkeypatch.setattr(
        BlipUniAdapterVQA, "_generate_answers", lambda self, samples, **_: ["star"] * 3
    )
    result = start("msrvtt_qa", "run.max_epoch=1", "run.inference_method=generate")
    assert result.metrics["test"]["accuracy_who"] == 100
    assert result.metrics["test"]["unknown_answers"] > 0


def test_vqav2_is_scored_on_val2014_after_training_on_train2014(start):
    BENCHMARKS["vqav2"](start.cache)
    result = start("vqav2_val", "run.max_epoch=1")
    assert result.metrics["test"]["agg_metrics"] >= 0
    (train,), test = result.runner.datasets["train"].datasets, result.runner.datasets["test"]
    assert {"train2014" in record["image"] for record in train.annotation} == {True}
    assert {"val2014" in record["image"] for record in test.annotation} == {True}


def test_lavis_captioning_task_works_unchanged(start):
    result = start(
        *("coco_caption", "run.task=captioning", "run.report_metric=False", "run.max_epoch=1"),
        "run.valid_splits=[]",
    )
    written = json.loads((result.output_dir / "result/test_epoch0.json").read_text())
    assert {item["image_id"] for item in written} == {17, 18}
    assert all(isinstance(item["caption"], str) for item in written)


@pytest.mark.skipif(not has_java(), reason="COCO's own evaluation needs Java")
def test_caption_scores_equal_those_of_lavis_and_coco(start, java_scores, monkeypatch):
    import pycocoevalcap.eval

    from lavis_uniadapter.models import BlipUniAdapterCaption

    class SharedWords:
        """In place of METEOR, which takes Java many seconds, and of SPICE, which downloads."""

        def compute_score(self, gts, res):
            shares = [len(set(gts[i][0].split()) & set(res[i][0].split())) / 10 for i in gts]
            return sum(shares), [{"All": {"f": share}} for share in shares]

        def method(self):
            return "SPICE"

    monkeypatch.setattr(pycocoevalcap.eval, "Spice", SharedWords)
    monkeypatch.setattr(pycocoevalcap.eval, "Meteor", SharedWords)
    monkeypatch.setattr(caption_metrics, "Meteor", SharedWords)
    predicted = "a red circle appears on the left"
    monkeypatch.setattr(
        BlipUniAdapterCaption, "generate", lambda self, samples, **_: [predicted] * 2
    )
    options = ("run.valid_splits=[]", "run.batch_size_eval=2")
    ours = start("coco_caption", *options, evaluate=True)
    coco_ground_truth(start.cache)
    theirs = start("coco_caption", "run.task=captioning", *options, evaluate=True)
    names = {"Bleu_1": "bleu_1", "Bleu_4": "bleu_4", "METEOR": "meteor"}
    names |= {"ROUGE_L": "rouge_l", "CIDEr": "cider"}
    for lavis_name, name in names.items():
        expected = 100 * theirs.metrics["test"][lavis_name]
        assert ours.metrics["test"][name] == pytest.approx(expected, abs=1e-6), name
    assert ours.metrics["test"]["bleu_1"] > 0


def test_predictions_are_on_file_before_they_are_scored(start, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("scoring")

    monkeypatch.setattr("lavis_uniadapter.tasks.captioning.caption_metrics", fail)
    with pytest.raises(RuntimeError, match="scoring"):
        start("msrvtt_caption", "run.valid_splits=[]", "run.max_epoch=1")
    (path,) = tmp_path.rglob("result/test_epoch_0.json")
    assert len(json.loads(path.read_text())) == 2


def test_visual_inputs_of_several_training_sets_are_told_apart(start):
    result = two_retrieval_sets(start, "datasets.didemo_retrieval.build_info.annotations.test=null")
    train = result.runner.datasets["train"]
    assert len(train.datasets) == 2
    ids = [train[i]["image_id"] for i in range(len(train))]
    assert sorted(set(ids)) == list(range(10))  # five videos each


@pytest.mark.parametrize("name", ["avsd_dialogue", "laion2B_multi", "imagenet", "nlvr"])
def test_other_datasets_of_lavis_are_left_to_lavis(name):
    from lavis.datasets.builders.base_dataset_builder import load_dataset_config

    from lavis_uniadapter.datasets.building import make_buildable

    cls = registry.get_builder_class(name)
    config = load_dataset_config(cls.default_config_path())
    make_buildable({name: config}, {"train"})


def test_lavis_retrieval_task_works_unchanged(start):
    result = start("flickr_retrieval", "run.task=retrieval", "run.use_dist_eval_sampler=False")
    assert "txt_r1" in result.metrics["test"]


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.processes
def test_processes_evaluate_as_one(start, tmp_path):
    """Ranks of uneven shares predict each of seven questions, and caption each of three clips."""

    def grow(records):
        more = [{**r, "video": "video0.mp4"} for r in records[:2]]
        for number, record in enumerate(more):
            record.update(question_id=100 + number, image_id=100)
        return (records + more)[:7]

    runs, calls = {}, []
    for name, kind, processes in (("msrvtt_qa", "qa", 3), ("msrvtt_caption", "cap", 2)):
        BENCHMARKS[name](start.cache)
        change(start.cache / f"msrvtt/annotations/{kind}_test.json", grow)
        runs[name] = start(name, evaluate=True)
        base = (tmp_path / "blip.pth").rename(tmp_path / f"{name}.pth")
        path = PROJECTS / f"train/{name}.yaml"
        options = [*small_options(path, start.med_config), *SMALL_RUN, "run.job_id=ranks"]
        options += [f"model.pretrained={base}", f"run.cache_root={start.cache}"]
        calls.append((processes, [str(path), *options]))
    command = [sys.executable, str(ROOT / "tests/evaluate_over_ranks.py"), json.dumps(calls)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = str(tmp_path)  # without Java, as above
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for (name, alone), number in zip(runs.items(), (7, 3), strict=True):
        files = [alone.output_dir / "result", alone.output_dir.parent / "ranks/result"]
        for written in ("metrics_test_epoch_best.json", "test_epoch_best.json"):
            one, ranks = (json.loads((folder / written).read_text()) for folder in files)
            assert one == ranks, name
        assert len(one) == number
