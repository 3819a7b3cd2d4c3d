"""A user's own data: what LAVIS's datasets make of it."""

import json
import logging
import tempfile
from pathlib import Path

import pytest
import torch
from custom_data import (
    CAPTIONS,
    FORMATS,
    KEY,
    KINDS,
    QUESTIONS,
    TASKS,
    answered,
    build,
    builder_of,
    config_of,
    records,
    rows_of,
    snapshot,
    write,
)
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset
from omegaconf import OmegaConf
from PIL import Image
from tiny_runs import TRAIN
from torch.utils.data import default_collate

import lavis_uniadapter.runners.launch  # noqa: F401  (registers LAVIS's schedules, which configurations name)
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.building import make_buildable
from lavis_uniadapter.datasets.records import DatasetError

# What is built


@pytest.mark.parametrize(
    ("form", "task", "kind"),
    [
        *(("jsonl", task, kind) for task in TASKS for kind in KINDS),
        *((form, "qa", "images") for form in FORMATS if form != "jsonl"),
    ],
)
def test_every_format_gives_the_same_datasets_and_nothing_is_written(
    form, task, kind, mine, tmp_path, monkeypatch
):
    rows = rows_of(task, kind)
    for split in ("train", "val", "test"):
        write(mine / f"{split}.{form}", rows)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path.parent / f"{tmp_path.name}-temp"))
    Path(tempfile.tempdir).mkdir()
    before = snapshot(tmp_path)
    splits = {split: f"mine/{split}.{form}" for split in ("train", "val", "test")}
    datasets = build(task, kind, splits)
    assert snapshot(tmp_path) == before
    assert list(Path(tempfile.tempdir).iterdir()) == []

    assert list(datasets) == ["train", "val", "test"]
    prefix = "Video" if kind == "videos" else "Own"
    train_cls, eval_cls = f"{prefix}{task.title()}Dataset", f"{prefix}{task.title()}EvalDataset"
    if task == "qa":
        train_cls = eval_cls = f"{KEY[kind].title()}QADataset"
    names = [type(dataset).__name__ for dataset in datasets.values()]
    assert names == [train_cls, eval_cls, eval_cls]
    key, (one, two, _) = KEY[kind], [row[KEY[kind]] for row in rows]
    ids = {one: 0, two: 1} if task == "caption" else {one: one, two: two}
    if task == "qa":
        expected = [{**row, "question_id": number} for number, row in enumerate(rows)]
        for dataset in datasets.values():
            assert records(dataset) == expected
            assert dataset.class_labels == {"red": 0, "yes": 1}
    else:
        assert records(datasets["train"]) == [{**row, "image_id": ids[row[key]]} for row in rows]
        assert records(datasets["test"]) == [
            {key: one, "caption": [CAPTIONS[0], CAPTIONS[2]], "image_id": ids[one]},
            {key: two, "caption": [CAPTIONS[1]], "image_id": ids[two]},
        ]
        assert records(datasets["val"]) == records(datasets["test"])

    shape = (3, 32, 32) if kind == "images" else (3, 2, 32, 32)
    for split, dataset in datasets.items():
        item = dataset[0]
        assert item[key].shape == shape and item[key].isfinite().all()
        if task == "qa":
            assert (item["text_input"], item["answers"]) == (QUESTIONS[0], 0)
            assert (item["question_id"], item["instance_id"]) == (0, "0")
        elif split == "train":
            assert item["text_input"] == CAPTIONS[0]
            assert [dataset[i]["image_id"] for i in range(3)] == [0, 1, 0]


def test_items_show_the_file_that_they_name(mine):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(mine / "images" / "red.png")
    Image.new("RGB", (8, 8), (0, 0, 255)).save(mine / "images" / "blue.png")
    rows = [
        {"image": f"{answer}.png", "question": "Which colour?", "answer": answer}
        for answer in ("red", "blue")
    ]
    write(mine / "train.csv", rows)
    dataset = build("qa", "images", {"train": "mine/train.csv"})["train"]
    pixels = torch.stack([dataset[i]["image"].mean(dim=(1, 2)) for i in range(2)])
    assert pixels.argmax(dim=1).tolist() == [0, 2]


def test_a_list_of_captions_is_an_item_each_in_training_and_one_in_evaluation(mine):
    row = {"image": "two.png", "caption": ["one", " two "]}
    write(mine / "a.json", [row])
    datasets = build("retrieval", "images", {"train": "mine/a.json", "test": "mine/a.json"})
    assert [record["caption"] for record in datasets["train"].annotation] == ["one", "two"]
    assert [record["caption"] for record in datasets["test"].annotation] == [["one", "two"]]
    assert datasets["test"].txt2img == {0: 0, 1: 0}


def test_records_of_the_same_file_merge_whatever_way_it_is_spelt(mine):
    rows = [
        {"image": "sub/one.png", "caption": "a"},
        {"image": "two.png", "caption": "b"},
        {"image": "./sub/../sub//one.png", "caption": "c"},
    ]
    write(mine / "a.csv", rows)
    dataset = build("retrieval", "images", {"val": "mine/a.csv"})["val"]
    assert [(r["image"], r["caption"]) for r in dataset.annotation] == [
        ("sub/one.png", ["a", "c"]),
        ("two.png", ["b"]),
    ]


def test_several_files_of_a_split_are_read_in_turn(mine):
    rows = rows_of("qa", "images")
    write(mine / "a.csv", rows[:2])
    write(mine / "b.json", rows[2:])
    dataset = build("qa", "images", {"train": ["mine/a.csv", "mine/b.json"]})["train"]
    assert records(dataset) == [{**row, "question_id": i} for i, row in enumerate(rows)]


def test_evaluation_splits_may_have_names_of_their_own(mine):
    rows = rows_of("retrieval", "images")
    write(mine / "a.csv", rows)
    write(mine / "b.csv", rows[:1])
    files = {"train": "mine/a.csv", "test": "mine/a.csv", "test_unseen": "mine/b.csv"}
    built = build("retrieval", "images", files)
    assert [record["image"] for record in records(built["test_unseen"])] == [rows[0]["image"]]
    assert len(records(built["test"])) > 1
    configs = {"custom_retrieval": config_of("images", files)}
    make_buildable(configs, {"train", "test_unseen"})
    kept = configs["custom_retrieval"].build_info.annotations
    assert set(kept) == {"train", "test_unseen"}


@pytest.mark.parametrize("form", FORMATS)
def test_given_identifiers_are_kept_as_numbers_or_strings(form, mine):
    write(
        mine / f"qa.{form}",
        [{**row, "question_id": 7 - i} for i, row in enumerate(rows_of("qa", "images"))],
    )
    qa = build("qa", "images", {"train": f"mine/qa.{form}"})["train"]
    assert default_collate([qa[i] for i in range(3)])["question_id"].tolist() == [7, 6, 5]

    ids = {"sub/one.png": 40, "two.png": 30}
    rows = [{**row, "image_id": ids[row["image"]]} for row in rows_of("caption", "images")]
    write(mine / f"captions.{form}", rows)
    caption = build("caption", "images", {"test": f"mine/captions.{form}"})["test"]
    assert default_collate([caption[i] for i in range(2)])["image_id"].tolist() == [40, 30]
    retrieval = build("retrieval", "images", {"test": f"mine/captions.{form}"})["test"]
    assert [int(record["image_id"]) for record in retrieval.annotation] == [40, 30]


def test_training_images_may_share_an_identifier(mine):
    rows = [{"image": name, "caption": "a", "image_id": "x"} for name in ("two.png", "sub/one.png")]
    write(mine / "a.csv", rows)
    dataset = build("retrieval", "images", {"train": "mine/a.csv"})["train"]
    assert [dataset[i]["image_id"] for i in range(2)] == [0, 0]


@pytest.mark.parametrize("form", FORMATS)
def test_fields_that_nothing_reads_and_empty_identifiers_do_no_harm(form, mine):
    rows = [{**row, "image_id": "", "note": "x"} for row in rows_of("caption", "images")]
    write(mine / f"a.{form}", rows)
    dataset = build("caption", "images", {"train": f"mine/a.{form}"})["train"]
    assert records(dataset)[1] == {"image": "two.png", "caption": CAPTIONS[1], "image_id": 1}


# Candidate answers


def test_candidates_are_the_training_answers_the_most_frequent_first(mine):
    train = answered(mine, "train.csv", ["d", "c", "a ", "b", "a", "c", " a"])
    test = answered(mine, "test.csv", ["c", "new"])
    datasets = build("qa", "images", {"train": train, "test": test})
    labels = {"a": 0, "c": 1, "d": 2, "b": 3}
    assert datasets["train"].class_labels == datasets["test"].class_labels == labels
    assert list(datasets["test"].class_labels) == ["a", "c", "d", "b"]
    assert [datasets["test"][i]["answers"] for i in range(2)] == [1, 4]


@pytest.mark.parametrize("name", ["answers.json", "answers.txt"])
def test_an_answer_list_wins_and_what_it_lacks_is_counted(name, mine, caplog):
    answers = ["zebra", "a b", "é"]
    path = mine / name
    text = json.dumps(answers) if path.suffix == ".json" else "zebra\n a b\r\né\n"
    path.write_text(text, encoding="utf-8", newline="")
    train = answered(mine, "train.csv", ["é", "é", "a b", "unknown"])
    test = answered(mine, "test.csv", ["zebra", "no", "neither"])
    splits = {"train": train, "test": test, "answer_list": str(path)}
    with caplog.at_level(logging.WARNING, "lavis_uniadapter"):
        datasets = build("qa", "images", splits)
    assert datasets.keys() == {"train", "test"}
    assert list(datasets["test"].class_labels.items()) == [("zebra", 0), ("a b", 1), ("é", 2)]
    assert [datasets["train"][i]["answers"] for i in range(4)] == [2, 2, 1, 3]
    said = "answers are not among the candidates, so they are never predicted. The first is in"
    assert f"1 of 4 {said} {train}:5." in caplog.text
    assert f"2 of 3 {said} {test}:3." in caplog.text


def test_evaluation_alone_has_the_candidates_of_training(mine):
    # Their images need not be there.
    rows = [{"image": "gone.png", "question": "?", "answer": answer} for answer in "bcc"]
    train = str(write(mine / "train.csv", rows))
    test = answered(mine, "test.csv", ["b"])
    config = config_of("images", {"train": train, "test": test})
    builder_of("qa", config)
    del config.build_info.annotations.train  # as a run that only evaluates does
    datasets = builder_of("qa", config).build_datasets()
    assert datasets.keys() == {"test"}
    assert datasets["test"].class_labels == {"c": 0, "b": 1}

    Path(train).unlink()
    with pytest.raises(DatasetError, match="train.csv: cannot be read") as caught:
        builder_of("qa", config).prepare()
    assert "build_info.annotations.answer_list has 1 problem(s)" in str(caught.value)


# Where the files lie


def test_relative_paths_start_at_the_current_folder_not_at_the_cache(mine, monkeypatch):
    write(mine / "a.csv", rows_of("retrieval", "images"))
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", "/nowhere")
    config = config_of("images", {"train": "mine/a.csv", "val": ["mine/a.csv"]})
    before = config.copy()
    builder = builder_of("retrieval", config)
    for _ in range(2):  # building again is from the same files
        datasets = builder.build_datasets()
        assert datasets["train"].vis_root == str(mine / "images")
        assert [len(dataset) for dataset in datasets.values()] == [3, 2]
        assert config == before


def test_the_home_folder_may_be_abbreviated(mine, monkeypatch):
    monkeypatch.setenv("HOME", str(mine))
    write(mine / "a.csv", rows_of("retrieval", "images"))
    assert len(build("retrieval", "images", {"train": "~/a.csv"})["train"]) == 3


def test_lavis_loads_the_dataset_by_name(mine):
    write(mine / "a.csv", rows_of("retrieval", "videos"))
    config = config_of("videos", {"val": "mine/a.csv"})
    config.build_info.videos.storage = None
    OmegaConf.save({"datasets": {"custom_retrieval": config}}, "mine.yaml")
    datasets = load_dataset("custom_retrieval", "mine.yaml", vis_path="mine/videos")
    assert datasets["val"][0]["video"].shape == (3, 2, 32, 32)


@pytest.mark.parametrize("task", TASKS)
def test_the_defaults_ask_for_what_is_missing(task, mine):
    cls = registry.get_builder_class(f"custom_{task}")
    with pytest.raises(ConfigError, match="data_type is None; set it to 'images' or 'videos'"):
        cls()
    defaults = OmegaConf.load(cls.default_config_path()).datasets[f"custom_{task}"]
    write(mine / "a.csv", rows_of(task, "images"))
    given = config_of("images", {"train": "mine/a.csv"})
    datasets = cls(OmegaConf.merge(defaults, given)).build_datasets()
    assert datasets.keys() == {"train"}


@pytest.mark.parametrize("task", TASKS)
def test_the_example_runs_are_ready_but_for_the_data(task, mine):
    config = load_config(TRAIN / f"custom_{task}.yaml").datasets_cfg[f"custom_{task}"]
    rows = rows_of(task, "videos")
    for split in ("train", "val", "test"):
        write(f"my_data/{'qa_' if task == 'qa' else ''}{split}.csv", rows)
    (mine / "videos").rename("my_data/videos")
    datasets = builder_of(task, config).build_datasets()
    assert datasets["train"][0]["video"].shape == (3, 8, 224, 224)
    assert datasets["test"][0]["video"].shape == (3, 8, 224, 224)
    text = datasets["train"][0]["text_input"]
    assert text.startswith("a picture of ") == (task == "caption")
