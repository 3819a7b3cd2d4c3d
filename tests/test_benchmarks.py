"""Every benchmark's configuration, run on a miniature of its data in LAVIS's own layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from miniature import BENCHMARKS, coco_ground_truth, custom
from omegaconf import OmegaConf

from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.evaluation.caption_metrics import has_java
from lavis_uniadapter.runners import launch
from lavis_uniadapter.runners.run_checkpoints import LATEST
from lavis_uniadapter.runners.runner import BEST_ADAPTER, LATEST_ADAPTER

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
    """METEOR takes Java several seconds to start; a test of it asks for ``java_scores``."""
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)


@pytest.fixture
def java_scores(quick_caption_scores, monkeypatch):
    monkeypatch.setattr(caption_metrics, "has_java", has_java)


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


def test_wrong_rows_of_own_data_are_named_by_line(start, tmp_path):
    start.cache.mkdir()
    custom(tmp_path / "my_data", "qa")
    path = tmp_path / "my_data/qa_train.csv"
    lines = path.read_text().splitlines()
    lines[3] = "clip_1.mp4,what colour is it?,"
    lines[5] = "../clip_1.mp4,what colour is it?,red"
    path.write_text("\n".join(lines))
    with pytest.raises(
        DatasetError, match=r"(?s)train\.csv:4: .*'answer'.*train\.csv:6: .*'video'"
    ):
        start("custom_qa")


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

    class NoSpice:  # it downloads a parser
        def compute_score(self, gts, res):
            return 0.0, [{"All": {"f": 0.0}}] * len(gts)

        def method(self):
            return "SPICE"

    monkeypatch.setattr(pycocoevalcap.eval, "Spice", NoSpice)
    ours = start("coco_caption", "run.valid_splits=[]")
    coco_ground_truth(start.cache)
    theirs = start("coco_caption", "run.task=captioning", "run.valid_splits=[]")
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


def test_caption_task_on_another_kind_of_data_is_refused(start):
    BENCHMARKS["msrvtt_retrieval"](start.cache)
    config = OmegaConf.load(PROJECTS / "train/msrvtt_caption.yaml")
    config.datasets = {"msrvtt_retrieval": config.datasets.msrvtt_caption}
    OmegaConf.save(config, "mixed.yaml")
    with pytest.raises(ConfigError, match="not one of LAVIS's caption datasets"):
        launch.run("mixed.yaml", [f"run.cache_root={start.cache}", "run.device=cpu"])


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


def test_two_test_splits_are_refused_before_anything_is_built(start):
    with pytest.raises(ConfigError, match=r"(?s)all have a 'test' split.*annotations.test=null"):
        two_retrieval_sets(start)


def test_unreadable_image_is_found_before_training(start):
    BENCHMARKS["coco_caption"](start.cache)
    (start.cache / "coco/images/val2014/COCO_val2014_000000000016.jpg").write_text("no image")
    with pytest.raises(DatasetError, match=r"(?s), val: 1 files.*16.jpg: it cannot be read as"):
        start("coco_caption")


def test_lavis_retrieval_task_works_unchanged(start):
    result = start("flickr_retrieval", "run.task=retrieval", "run.use_dist_eval_sampler=False")
    assert "txt_r1" in result.metrics["test"]


# --- bad data, found before training ------------------------------------------------------------


def change(path, edit):
    content = json.loads(path.read_text())
    content = edit(content) or content
    path.write_text(json.dumps(content))


def refused(start, name, path, edit, expected, *options, evaluate=False, error=DatasetError):
    BENCHMARKS[name](start.cache)
    change(start.cache / path, edit)
    with pytest.raises(error, match=expected):
        start(name, *options, evaluate=evaluate)
    assert not list(Path("output").rglob("*.pth"))


def test_empty_answer_in_the_answer_list(start):
    edit = lambda answers: [*answers[:2], " ", *answers[2:]]  # noqa: E731
    path = "coco/annotations/answer_list.json"
    refused(
        start,
        "vqav2",
        path,
        edit,
        r"record 2: needs a non-empty string under 'answer', has ' '",
        evaluate=True,
    )


def test_empty_answer_among_the_labels(start):
    edit = lambda labels: {**labels, "": 5}  # noqa: E731
    refused(start, "msvd_qa", "msvd/annotations/qa_ans2label.json", edit, "non-empty answers")


@pytest.mark.parametrize("indices", [[0, 2], [1, 2], [0, 0], ["0", "1"]])
def test_labels_that_are_no_numbering(start, indices):
    edit = lambda labels: dict(zip(labels, indices, strict=False))  # noqa: E731
    path = "msvd/annotations/qa_ans2label.json"
    refused(start, "msvd_qa", path, edit, "a mapping of non-empty answers to the numbers from 0 on")


def test_question_id_twice(start):
    def edit(records):
        records[3]["question_id"] = records[1]["question_id"]

    path = "msrvtt/annotations/qa_test.json"
    refused(start, "msrvtt_qa", path, edit, r"record 3: has the question_id 22, as .*record 1 has")


@pytest.mark.parametrize("evaluate", [True, False])
def test_evaluation_never_leaves_a_video_out(start, evaluate):
    BENCHMARKS["msrvtt_qa"](start.cache)
    (start.cache / "msrvtt/videos/video8.mp4").unlink()
    with pytest.raises(DatasetError, match=r"(?s)1 files cannot .*video8\.mp4: there is no"):
        start("msrvtt_qa", "datasets.msrvtt_qa.skip_missing=True", evaluate=evaluate)


def test_missing_training_videos_stop_the_run_or_are_left_out(start, caplog):
    BENCHMARKS["msrvtt_qa"](start.cache)
    (start.cache / "msrvtt/videos/video0.mp4").unlink()
    (start.cache / "msrvtt/videos/video2.mp4").write_bytes(b"no video")
    with pytest.raises(DatasetError, match=r"(?s)2 files cannot .*video0.*video2"):
        start("msrvtt_qa")
    with caplog.at_level("WARNING", logger="lavis_uniadapter"):
        result = start("msrvtt_qa", "datasets.msrvtt_qa.skip_missing=True", "run.max_epoch=1")
    assert len(result.runner.datasets["train"]) == 9
    assert "6 records left out" in caplog.text
    assert "2 files cannot be read" in caplog.text
    assert "9 records remain" in caplog.text


def test_no_training_video_at_all(start):
    BENCHMARKS["msvd_caption"](start.cache)
    for index in range(5):
        (start.cache / f"msvd/videos/clip_{index}_{index + 5}.avi").unlink()
    with pytest.raises(DatasetError, match="None of the 5 files"):
        start("msvd_caption", "datasets.msvd_caption.skip_missing=True")


def test_video_shorter_than_the_number_of_frames(start):
    """Its frames are repeated: every clip of a batch has the same length."""
    from miniature import write_video

    BENCHMARKS["msrvtt_qa"](start.cache)
    write_video(start.cache / "msrvtt/videos/video1.mp4", 1, num_frames=1)
    result = start("msrvtt_qa", "run.max_epoch=1")
    assert result.runner.datasets["train"][3]["video"].shape[1] == 2


def test_captions_without_references_are_refused_or_written(start):
    edit = lambda records: [{**r, "caption": []} for r in records]  # noqa: E731
    path = "coco/annotations/coco_karpathy_test.json"

    def without(records):
        for record in records:
            del record["caption"]

    refused(start, "coco_caption", path, edit, "no caption to score against")
    refused(start, "coco_caption", path, without, "no caption to score against")
    written_alone = ("run.report_metric=False", "run.max_epoch=1")
    # nothing would choose the best epoch
    with pytest.raises(ConfigError, match=r"valid_splits=\[\]"):
        start("coco_caption", *written_alone)
    result = start("coco_caption", *written_alone, "run.valid_splits=[]")
    assert len(json.loads((result.output_dir / "result/test_epoch_0.json").read_text())) == 2


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("msrvtt_caption", ["model.prompt=there is"], "Give both the same"),
        ("msrvtt_caption", ["run.selection_metric=ciderr"], "Did you mean 'cider'"),
        ("msrvtt_caption", ["run.task=video_qa"], "has no method 'predict_answers'"),
        ("msrvtt_qa", ["run.task=uniadapter_captioning"], "has no method 'generate'"),
        ("msrvtt_qa", ["run.inference_method=guess"], "one of rank, generate"),
        ("vqav2", ["run.task=video_qa"], "run.task: vqa"),
        ("vqav2", ['run.valid_splits=["test"]'], "measures nothing"),
        ("msrvtt_qa", ["run.selection_metric=accuracy_wht"], "Did you mean 'accuracy_what'"),
        ("msrvtt_qa", ["run.selection_metric=accuracy_when"], "has no question of that type"),
        ("msrvtt_caption", ["run.min_len=25"], "exceeds run.max_len 20"),
        ("msrvtt_retrieval", ["run.task=uniadapter_captioning"], "has no method 'generate'"),
        ("msrvtt_qa", ["datasets.msrvtt_qa.type=evl"], "Known: default"),
        ("msrvtt_qa", ["model.image_size=64"], "image_size is 32 and model.image_size is 64"),
        (
            "msrvtt_qa",
            ["run.evaluate=True", 'run.test_splits=["tset"]'],
            "splits are tset, and the datasets have test, train, val",
        ),
        ("msrvtt_qa", ["datasets.msrvtt_qa.skip_missing=often"], "True or False"),
    ],
)
def test_what_does_not_go_together_is_refused(start, name, options, expected):
    with pytest.raises(ConfigError, match=expected):
        start(name, *options)


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "processes"), [("msrvtt_qa", 2), ("msrvtt_qa", 3), ("msrvtt_caption", 3)]
)
def test_processes_evaluate_as_one(start, name, processes, small_med_config, tmp_path):
    """Seven questions, on ranks of uneven shares: each is predicted once."""
    BENCHMARKS[name](start.cache)
    kind = "qa" if name == "msrvtt_qa" else "cap"

    def grow(records):
        more = [{**r, "video": "video0.mp4"} for r in records[:2]]
        for number, record in enumerate(more):
            record.update(question_id=100 + number, image_id=100)
        return (records + more)[: 7 if kind == "qa" else None]

    change(start.cache / f"msrvtt/annotations/{kind}_test.json", grow)
    alone = start(name, evaluate=True)
    path = PROJECTS / f"train/{name}.yaml"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(
            f"--nproc_per_node={processes}",
            str(ROOT / "evaluate.py"),
            "--cfg-path",
            str(path),
            "--options",
        ),
        *small_options(path, small_med_config),
        *(f"model.pretrained={tmp_path / 'blip.pth'}", f"run.cache_root={start.cache}"),
        *(*SMALL_RUN, "run.job_id=two"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = str(tmp_path)  # without Java, as above
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [alone.output_dir / "result", alone.output_dir.parent / "two/result"]
    for written in ("metrics_test_epoch_best.json", "test_epoch_best.json"):
        one, two = (json.loads((folder / written).read_text()) for folder in files)
        assert one == two
    assert len(one) == (7 if kind == "qa" else 3)
