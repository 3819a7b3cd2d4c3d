"""Data and options that do not fit are refused by name, before a recipe trains."""

import json
from pathlib import Path

import pytest
from miniature import BENCHMARKS, custom
from miniature_runs import PROJECTS, change, two_retrieval_sets
from omegaconf import OmegaConf

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.runners import launch


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


def test_caption_task_on_another_kind_of_data_is_refused(start):
    BENCHMARKS["msrvtt_retrieval"](start.cache)
    config = OmegaConf.load(PROJECTS / "train/msrvtt_caption.yaml")
    config.datasets = {"msrvtt_retrieval": config.datasets.msrvtt_caption}
    OmegaConf.save(config, "mixed.yaml")
    with pytest.raises(ConfigError, match="not one of LAVIS's caption datasets"):
        launch.run("mixed.yaml", [f"run.cache_root={start.cache}", "run.device=cpu"])


def test_unreadable_image_is_found_before_training(start):
    BENCHMARKS["coco_caption"](start.cache)
    (start.cache / "coco/images/val2014/COCO_val2014_000000000016.jpg").write_text("no image")
    with pytest.raises(DatasetError, match=r"(?s), val: 1 files.*16.jpg: it cannot be read as"):
        start("coco_caption")


def test_two_test_splits_are_refused_before_anything_is_built(start):
    with pytest.raises(ConfigError, match=r"(?s)all have a 'test' split.*annotations.test=null"):
        two_retrieval_sets(start)


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
    refused(start, "msvd_qa", path, edit, "a mapping of non-empty answers to different numbers")


def test_question_id_twice(start):
    def edit(records):
        records[3]["question_id"] = records[1]["question_id"]

    path = "msrvtt/annotations/qa_test.json"
    refused(start, "msrvtt_qa", path, edit, r"record 3: repeats the question_id 22 of .*record 1")


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
        (  # LAVIS's builders know no other splits
            "msrvtt_qa",
            [
                "run.evaluate=True",
                'run.test_splits=["test_hard"]',
                "datasets.msrvtt_qa.build_info.annotations.test_hard.storage=x.json",
            ],
            "splits are test_hard, and the datasets have test, train, val",
        ),
        ("msrvtt_qa", ["datasets.msrvtt_qa.skip_missing=often"], "True or False"),
    ],
)
def test_what_does_not_go_together_is_refused(start, name, options, expected):
    with pytest.raises(ConfigError, match=expected):
        start(name, *options)
