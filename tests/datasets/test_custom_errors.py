"""A user's own data: every error in it is named."""

import logging
import re
import reprlib

import pytest
from custom_data import FORMATS, answered, build, builder_of, config_of, error_of, rows_of, write
from omegaconf import OmegaConf

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.building import check_built
from lavis_uniadapter.datasets.custom import CustomQABuilder, CustomRetrievalBuilder
from lavis_uniadapter.datasets.layouts import layout
from lavis_uniadapter.datasets.records import DatasetError, check_records, problems

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
            {"build_info": {"annotations": {"train": {"storage": None}}}},
            DatasetError,
            r"annotations\.train\.storage is missing; set it to the annotation file",
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
        (
            {"build_info": {"annotations": {"val": {"storage": None}}}},
            DatasetError,
            r"cannot be used:\n- \S*annotations\.val\.storage is missing; set it .* file\.$",
        ),
        (
            {"build_info": {"annotations": {"train": None}}},
            DatasetError,
            "names none of train, val, test; add at least one",
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
    assert f"{path}:3: repeats the question_id 1 of {path}:2" in message
    write(mine / "a.csv", rows[2:])
    train = build("qa", "images", {"train": "mine/a.csv"})["train"]
    assert [record["question_id"] for record in train.annotation] == [4, 1]


def test_a_question_id_is_unique_within_its_split_alone(mine):
    rows = [{**QA, "question_id": i} for i in ("3", "03", "4")]
    path = write(mine / "a.csv", rows)
    message = error_of("qa", "images", {"train": "mine/a.csv"})
    assert f"{path}:3: repeats the question_id 3 of {path}:2" in message
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
    assert re.search(rf"{path}:4: repeats the image_id '?1'? of {path}:2", message)
    assert "has 1 problem(s)" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_has_one_image_id(split, mine):
    rows = [{"image": "two.png", "caption": "a", "image_id": i} for i in ("1", "2")]
    path = write(mine / "a.csv", rows)
    message = error_of("retrieval", "images", {split: "mine/a.csv"})
    expected = f"{path}:3: 'two.png' has the image_id '2' here, and '1' in {path}:2; give each file"
    assert expected in message


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


# Errors of candidate answers


def test_without_candidates_both_fixes_are_named(mine):
    config = config_of("images", {"test": answered(mine, "test.csv", ["b"])})
    with pytest.raises(ConfigError, match=r"(?s)annotations\.train\.storage.*answer_list\.storage"):
        builder_of("qa", config).prepare()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", '["a",\n " "]', ", record 1: needs a non-empty string under 'answer', has ' '"),
        ("a.json", '["a",\n 3]', ", record 1: needs a non-empty string under 'answer', has 3"),
        ("a.json", '{"a": 0}', ": must be a list"),
        ("a.json", "[]", ": has no records"),
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


@pytest.mark.parametrize("value", [True, 3.0, "3.0", "1_000", -1, 2**63])
def test_what_is_no_whole_number_is_no_question_id(value):
    record = {"video": "a.mp4", "question": "b", "answer": "c", "question_id": value}
    schema = layout("video", **CustomQABuilder.fields)
    (problem,) = problems(check_records([record], schema, "a.json"))
    assert "question_id" in problem.text


@pytest.mark.parametrize("value", [2**63 - 1, str(2**63 - 1), " 7 ", "007", 0])
def test_whole_numbers_are_question_ids(value):
    record = {"video": "a.mp4", "question": "b", "answer": "c", "question_id": value}
    schema = layout("video", **CustomQABuilder.fields)
    (found,) = check_records([record], schema, "a.json")
    assert found.record.question_id == int(value)


def test_a_number_of_json_is_that_of_a_table():
    schema = layout("image", **CustomRetrievalBuilder.fields)
    records = [{"image": "a.png", "caption": "b", "image_id": value} for value in (7, "7", " 7 ")]
    found = list(check_records(records, schema, "a.json"))
    assert [item.record.image_id for item in found] == ["7"] * 3
