"""A user's own data: how it is read, what LAVIS's datasets make of it, and every error in it."""

import csv
import io
import json
import logging
import re
import reprlib
import tempfile
from pathlib import Path

import pytest
import torch
from clips import write_clip
from lavis.common.registry import registry
from lavis.datasets.builders import load_dataset
from lavis.datasets.datasets import (
    caption_datasets,
    retrieval_datasets,
    video_caption_datasets,
    video_vqa_datasets,
)
from omegaconf import OmegaConf
from PIL import Image
from tiny_runs import TRAIN
from torch.utils.data import default_collate

import lavis_uniadapter.runners.launch  # noqa: F401  (registers LAVIS's schedules, which configurations name)
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.building import check_built
from lavis_uniadapter.datasets.image_qa import ImageQADataset
from lavis_uniadapter.datasets.records import DatasetError

TASKS = ("retrieval", "qa", "caption")
KINDS = ("images", "videos")
FORMATS = ("json", "jsonl", "csv", "tsv")
KEY = {"images": "image", "videos": "video"}
SUFFIX = {"images": "png", "videos": "mp4"}
DATASETS = {
    ("retrieval", "images"): (
        retrieval_datasets.RetrievalDataset,
        retrieval_datasets.RetrievalEvalDataset,
    ),
    ("retrieval", "videos"): (
        retrieval_datasets.VideoRetrievalDataset,
        retrieval_datasets.VideoRetrievalEvalDataset,
    ),
    ("caption", "images"): (caption_datasets.CaptionDataset, caption_datasets.CaptionEvalDataset),
    ("caption", "videos"): (
        video_caption_datasets.VideoCaptionDataset,
        video_caption_datasets.VideoCaptionEvalDataset,
    ),
    ("qa", "images"): (ImageQADataset, ImageQADataset),
    ("qa", "videos"): (video_vqa_datasets.VideoQADataset, video_vqa_datasets.VideoQADataset),
}
# Commas, quotes, tabs, a line break and letters beyond ASCII, that formats treat in their own way.
CAPTIONS = ['A "red" disc, left', "ein blauer\nKreis – ☃", "one\tmore"]
QUESTIONS = ["Which colour,\n exactly?", 'Is it "red"?', "How many?"]
ANSWERS = ["red", "yes", "red"]


def write(path, rows):
    """Write rows (dicts of the same keys) in the format that the path's ending names."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps(rows, indent=1)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        buffer = io.StringIO(newline="")
        dialect = {".csv": "excel", ".tsv": "excel-tab"}[path.suffix]
        writer = csv.DictWriter(buffer, rows[0], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    path.write_bytes(text.encode())
    return path


def rows_of(task, kind):
    """Three rows on two files, the first and the last on the same."""
    names = [f"sub/one.{SUFFIX[kind]}", f"two.{SUFFIX[kind]}", f"sub/one.{SUFFIX[kind]}"]
    if task == "qa":
        columns = zip(names, QUESTIONS, ANSWERS, strict=True)
        return [{KEY[kind]: n, "question": q, "answer": a} for n, q, a in columns]
    return [{KEY[kind]: n, "caption": c} for n, c in zip(names, CAPTIONS, strict=True)]


def write_files(folder):
    for name in ("sub/one", "two"):
        path = folder / "videos" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path)
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 10), 200).save(path)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A current folder with a folder `mine`, where the images and videos are."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "mine")
    return tmp_path / "mine"


def config_of(kind, annotations, **section):
    """A dataset section; annotations: by split, what goes below `storage`."""
    processor = {"name": f"blip_{KEY[kind]}_eval", "image_size": 32}
    if kind == "videos":
        processor["n_frms"] = 2
    return OmegaConf.create(
        {
            "data_type": kind,
            "vis_processor": {"train": processor, "eval": processor},
            "build_info": {
                "annotations": {key: {"storage": path} for key, path in annotations.items()},
                kind: {"storage": f"mine/{kind}"},
            },
            **section,
        }
    )


def builder_of(task, config):
    return registry.get_builder_class(f"custom_{task}")(config)


def build(task, kind, annotations, **section):
    return builder_of(task, config_of(kind, annotations, **section)).build_datasets()


def error_of(task, kind, annotations, **section):
    """The message of the DatasetError that both checking and building raise."""
    builder = builder_of(task, config_of(kind, annotations, **section))
    with pytest.raises(DatasetError) as checked:
        builder.prepare()
    with pytest.raises(DatasetError) as built:
        builder.build_datasets()
    assert str(checked.value) == str(built.value)
    return str(built.value)


def records(dataset):
    return [{k: v for k, v in r.items() if k != "instance_id"} for r in dataset.annotation]


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


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
    train_cls, eval_cls = DATASETS[task, kind]
    assert type(datasets["train"]) is train_cls
    assert type(datasets["val"]) is type(datasets["test"]) is eval_cls
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


@pytest.mark.parametrize("form", FORMATS)
def test_given_identifiers_are_kept_as_numbers_or_strings(form, mine):
    write(mine / f"qa.{form}", [{**row, "question_id": 7 - i} for i, row in qa_rows()])
    qa = build("qa", "images", {"train": f"mine/qa.{form}"})["train"]
    assert default_collate([qa[i] for i in range(3)])["question_id"].tolist() == [7, 6, 5]

    ids = {"sub/one.png": 40, "two.png": 30}
    rows = [{**row, "image_id": ids[row["image"]]} for row in rows_of("caption", "images")]
    write(mine / f"captions.{form}", rows)
    caption = build("caption", "images", {"test": f"mine/captions.{form}"})["test"]
    assert default_collate([caption[i] for i in range(2)])["image_id"].tolist() == [40, 30]
    retrieval = build("retrieval", "images", {"test": f"mine/captions.{form}"})["test"]
    assert [int(record["image_id"]) for record in retrieval.annotation] == [40, 30]


def qa_rows():
    return enumerate(rows_of("qa", "images"))


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


def answered(mine, name, answers, **more):
    rows = [{"image": "two.png", "question": f"{i}?", "answer": a} for i, a in enumerate(answers)]
    return str(write(mine / name, rows))


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
    assert f"{train}:5: the first of 1 of 4 questions whose answer is not among" in caplog.text
    assert f"{test}:3: the first of 2 of 3 questions whose answer is not among" in caplog.text


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


def test_without_candidates_both_mends_are_named(mine):
    config = config_of("images", {"test": answered(mine, "test.csv", ["b"])})
    with pytest.raises(ConfigError, match=r"(?s)annotations\.train\.storage.*answer_list\.storage"):
        builder_of("qa", config).prepare()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", '["a",\n " "]', ", record 1: needs a non-empty string under 'answer', has ' '"),
        ("a.json", '["a",\n 3]', ", record 1: needs a non-empty string under 'answer', has 3"),
        ("a.json", '{"a": 0}', ": must be a list"),
        ("a.json", "[]", ": holds no records"),
        ("a.txt", "a\n\nb\n", ":2: needs a non-empty string under 'answer', has ''"),
        ("a.txt", "", ": is empty"),
        ("a.xml", "a\n", ": the file's name must end in .json or"),
    ],
)
def test_wrong_answer_lists_are_named(name, content, problem, mine):
    path = mine / name
    path.write_text(content)
    test = answered(mine, "test.csv", ["b"])
    message = error_of("qa", "images", {"test": test, "answer_list": str(path)})
    assert f"{path}{problem}" in message
    assert "build_info.annotations.answer_list has 1 problem(s)" in message


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


# Errors of the configuration


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"data_type": "features"}, ConfigError, "data_type is 'features'"),
        ({"skip_missing": "yes"}, ConfigError, "skip_missing is 'yes'; it must be True or False"),
        (
            {"build_info": {"annotations": {"valid": {"storage": "a.csv"}}}},
            ConfigError,
            r"'build_info\.annotations\.valid'\. Did you mean 'val'\?",
        ),
        ({"build_info": {"annotations": {"train": "a.csv"}}}, ConfigError, "train is 'a.csv'; it"),
        (
            {"build_info": {"annotations": {"train": {"storage": True}}}},
            ConfigError,
            r"annotations\.train\.storage is True; it must be a text",
        ),
        (
            {"build_info": {"images": {"storage": ["a", "b"]}}},
            DatasetError,
            "images.storage is missing",
        ),
        (
            {"build_info": {"annotations": {"val": {"storage": None}}}},
            DatasetError,
            r"annotations\.val\.storage is missing; set it to a file, or remove 'val'",
        ),
        (
            {"build_info": {"annotations": {"val": None}}},
            DatasetError,
            r"annotations\.val\.storage is missing",
        ),
        (
            {"build_info": {"annotations": None}},
            DatasetError,
            "names none of train, val, test; add at least one",
        ),
        (
            {"build_info": {"images": None}},
            DatasetError,
            r"build_info\.images\.storage is missing; set it to the folder of the images",
        ),
        (
            {"build_info": {"images": {"storage": "mine/nowhere"}}},
            DatasetError,
            "mine/nowhere does not exist; create it or correct",
        ),
        ({"build_info": None}, DatasetError, "(?s)images.storage is missing.*names none of train"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(change, error, named, mine):
    write(mine / "a.csv", rows_of("retrieval", "images"))
    config = OmegaConf.merge(config_of("images", {"train": "mine/a.csv"}), change)
    with pytest.raises(error, match=named):
        builder_of("retrieval", config).prepare()


# Errors of the files


QA = {"image": "two.png", "question": "?", "answer": "x"}


@pytest.mark.parametrize("form", FORMATS)
def test_all_wrong_records_of_all_splits_are_listed_by_line(form, mine):
    rows = [
        {"image": "two.png", "caption": "fine"},
        {"image": "two.png", "caption": ""},
        {"image": "nowhere.png", "caption": ""},
        {"image": "", "caption": "x"},
        {"image": "../mine/images/two.png", "caption": "x"},
        {"image": str(mine / "images" / "two.png"), "caption": "x"},
    ]
    for split in ("train", "val"):
        write(mine / f"{split}.{form}", rows)
    train, val = mine / f"train.{form}", mine / f"val.{form}"
    message = error_of("retrieval", "images", {"train": str(train), "val": str(val)})
    # A table has a header; a record of a JSON list has a number instead of a line.
    place = {"json": ", record {}".format, "jsonl": lambda i: f":{1 + i}"}
    place = place.get(form, lambda i: f":{2 + i}")
    outside = "needs a file name below the visual folder under 'image', has"
    expected = [
        (1, "needs a non-empty string (or a list) under 'caption', has ''"),
        (2, "needs a non-empty string (or a list) under 'caption', has ''"),
        (3, f"{outside} ''"),
        (4, f"{outside} '../mine/images/two.png'"),
        (5, f"{outside} {reprlib.repr(str(mine / 'images' / 'two.png'))}"),
    ]
    for split, path in (("train", train), ("val", val)):
        section = message.split(f"build_info.annotations.{split} has 5 problem(s)")[1]
        shown = section.split("\n- ")[0].splitlines()[1:]
        assert shown == [f"    {path}{place(index)}: {text}" for index, text in expected]


def test_an_identifier_that_equals_a_default_is_named(mine):
    rows = [{**QA, "question_id": i} for i in ("1", "", "4", "")]
    path = write(mine / "a.csv", rows)
    message = error_of("qa", "images", {"train": "mine/a.csv"})
    assert f"{path}:3: has the question_id 1, as {path}:2 has" in message
    write(mine / "a.csv", rows[2:])
    train = build("qa", "images", {"train": "mine/a.csv"})["train"]
    assert [record["question_id"] for record in train.annotation] == [4, 1]


def test_a_question_id_is_unique_within_its_split_alone(mine):
    rows = [{**QA, "question_id": i} for i in ("3", "03", "4")]
    path = write(mine / "a.csv", rows)
    message = error_of("qa", "images", {"train": "mine/a.csv"})
    assert f"{path}:3: has the question_id 3, as {path}:2 has" in message
    write(mine / "a.csv", rows[1:])
    assert len(build("qa", "images", {"train": "mine/a.csv", "val": "mine/a.csv"})["val"]) == 2


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_an_image_id_is_of_one_file_in_evaluation(task, mine):
    rows = [
        {"image": "two.png", "caption": "a", "image_id": "1"},
        {"image": "two.png", "caption": "b", "image_id": "1"},
        {"image": "sub/one.png", "caption": "c", "image_id": "1"},
    ]
    path = write(mine / "a.csv", rows)
    assert len(build(task, "images", {"train": "mine/a.csv"})["train"]) == 3
    message = error_of(task, "images", {"val": "mine/a.csv"})
    assert re.search(rf"{path}:4: has the image_id '?1'?, as {path}:2 has", message)
    assert "has 1 problem(s)" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_has_one_image_id(split, mine):
    rows = [{"image": "two.png", "caption": "a", "image_id": i} for i in ("1", "2")]
    path = write(mine / "a.csv", rows)
    message = error_of("retrieval", "images", {split: "mine/a.csv"})
    assert f"{path}:3: gives 'two.png' the image_id '2', and {path}:2 gives it '1'" in message


def test_missing_annotation_files_and_folders_are_named(mine):
    message = error_of("retrieval", "images", {"train": "mine/no.csv", "test": "mine/images"})
    assert f"{mine / 'no.csv'}: cannot be read (No such file or directory)" in message
    assert f"{mine / 'images'}: the file's name must end in" in message
    (mine / "folder.csv").mkdir()
    message = error_of("retrieval", "images", {"test": "mine/folder.csv"})
    assert f"{mine / 'folder.csv'}: cannot be read (Is a directory)" in message


# Files that are not there


def test_missing_files_are_left_out_of_training_if_asked_to(mine, caplog):
    rows = [
        {"image": "./gone.png", "question": "a?", "answer": "gone"},
        {"image": "two.png", "question": "b?", "answer": "x"},
        {"image": "gone.png", "question": "c?", "answer": "gone"},
        {"image": "gone too.png", "question": "d?", "answer": "x"},
    ]
    write(mine / "a.csv", rows)
    config = config_of("images", {"train": "mine/a.csv"}, skip_missing=True)
    datasets = builder_of("qa", config).build_datasets()
    with caplog.at_level(logging.WARNING, "lavis_uniadapter"):
        check_built({"mine": datasets}, {"mine": config})
    assert [record["question"] for record in datasets["train"].annotation] == ["b?"]
    assert "2 files cannot be read; 3 records left out (skip_missing)" in caplog.text
    # the candidates are the same on a machine that has the files
    assert datasets["train"].class_labels == {"gone": 0, "x": 1}


def test_a_training_split_without_any_file_is_refused(mine):
    write(mine / "a.csv", [{"image": "gone.png", "caption": "x"}])
    config = config_of("images", {"train": "mine/a.csv"}, skip_missing=True)
    datasets = builder_of("retrieval", config).build_datasets()
    with pytest.raises(DatasetError, match=r"None of the 1 files.*gone\.png"):
        check_built({"mine": datasets}, {"mine": config})
