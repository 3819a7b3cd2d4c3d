"""Annotations that are damaged, or hold something else than they should: refused, and in short."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from fuzzing import (
    EXTREMES,
    FORMATS,
    examples,
    files,
    harmed,
    list_text,
    object_text,
    proper,
    record_texts,
    strange,
    value_texts,
)
from hypothesis import example, given
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.data import read_dataset
from lavis_uniadapter.datasets.layouts import (
    LAYOUTS,
    Answer,
    answer_problems,
    label_problems,
    layout_of,
)
from lavis_uniadapter.datasets.preflight import check_annotations
from lavis_uniadapter.datasets.records import (
    DatasetError,
    FileName,
    Found,
    Problem,
    Record,
    check_records,
    problems,
    read_records,
)
from lavis_uniadapter.tools.prepare import benchmarks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the files that records name."""
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "files").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / "files" / name).write_bytes(b"")
    return folder


class Named(Record):
    """What every record of these tests has."""

    video: FileName


def check_items(items: list[Found | Problem], content: bytes) -> None:
    assert items
    for item in items:
        assert 0 <= item.place.number <= 1 + len(content)
        if item.place.unit == "line":
            assert item.place.number <= 1 + content.count(b"\n") + content.count(b"\r")
        if isinstance(item, Problem):
            assert item.text and len(str(item)) < 2000


@given(files(*FORMATS))
def test_records_are_read_or_problems_named(folder, file):
    ending, content = file
    path = folder / f"records{ending}"
    path.write_bytes(content)
    items = list(read_records(path, Named))
    check_items(items, content)
    assert all(is_filled(item.record.video) for item in items if isinstance(item, Found))


@given(files(".json", ".txt"))
def test_strings_are_read_or_problems_named(folder, file):
    ending, content = file
    path = folder / f"strings{ending}"
    path.write_bytes(content)
    check_items(list(read_records(path, Answer, [".json", ".txt"])), content)


@pytest.mark.parametrize("extreme", sorted(EXTREMES))
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_extreme_values_are_named_by_their_line(folder, extreme, ending):
    path = folder / f"extreme{ending}"
    text = f'{{"video": {EXTREMES[extreme]}}}'
    path.write_text(f"[\n{text}]" if ending == ".json" else f"\n{text}")
    (problem,) = read_records(path, Named)
    # json tells no place of what it cannot read at all, so only a line of its own has one
    assert (problem.place.number == 2) == (ending == ".jsonl")
    assert "is not valid JSON" in problem.text


def test_a_table_without_a_header_is_shown_in_short(folder):
    path = folder / "headless.csv"
    path.write_text(f"a.mp4,{'a long caption ' * 200}\n")
    (problem,) = read_records(path, Named)
    assert "has no column 'video'; its columns are 'a.mp4', 'a long" in problem.text
    assert len(problem.text) < 200


@pytest.mark.parametrize("name", ["train", "ans2label"])
def test_a_file_that_holds_null_is_no_annotation(folder, name):
    for key, text in {"train": "[]", "ans2label": '{"red": 0}', name: "null"}.items():
        (folder / f"{key}.json").write_text(text)
    config = {
        "data_type": "videos",
        "build_info": {
            "annotations": {
                key: {"storage": str(folder / f"{key}.json")} for key in ("train", "ans2label")
            },
            "videos": {"storage": str(folder / "files")},
        },
    }
    with pytest.raises(
        DatasetError, match=rf"{name}\.json: must be a (list|mapping of non-empty answers)"
    ):
        check_annotations(registry.get_builder_class("msrvtt_qa")(OmegaConf.create(config)))


def test_true_is_no_number():
    video_qa = next(layout for cls, layout in LAYOUTS.items() if cls.__name__ == "VideoQADataset")
    record = {"video": "a", "question": "b", "answer": "c"}
    (problem,) = check_records([{**record, "question_id": True}], video_qa, "a.json")
    assert "question_id" in problem.text
    assert label_problems({"yes": True, "no": False}, "a.json")


def is_filled(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


@examples(150)
@given(
    files(*FORMATS),
    st.sampled_from(["retrieval", "caption", "qa"]),
    st.sampled_from(["images", "videos"]),
    st.sampled_from(["train", "test", "answer_list"]),
)
def test_own_annotations_are_checked(folder, file, task, data_type, split):
    ending, content = file
    sound = folder / "sound.jsonl"
    sound.write_text(
        '{"video": "a.mp4", "image": "a.mp4", "caption": "c", "question": "q", "answer": "red"}'
    )
    fuzzed = folder / f"own{ending}"
    fuzzed.write_bytes(content)
    storages = {"train": sound, split: fuzzed}
    if split == "answer_list" and task != "qa":
        del storages[split]
    builder = registry.get_builder_class(f"custom_{task}")(
        OmegaConf.create(
            {
                "data_type": data_type,
                "build_info": {
                    "annotations": {key: {"storage": str(p)} for key, p in storages.items()},
                    data_type: {"storage": str(folder / "files")},
                },
            }
        )
    )
    try:
        datasets = builder.build()
    except (DatasetError, ConfigError) as error:
        assert "own." in str(error)
        return
    for name, dataset in datasets.items():
        ids = set()
        for record in dataset.annotation:
            assert record[data_type.removesuffix("s")] in ("a.mp4", "b.mp4")
            if task == "qa":
                assert is_filled(record["question"]) and is_filled(record["answer"])
                assert record["question_id"] in range(2**63)
                ids.add(record["question_id"])
            elif name == "train":
                assert is_filled(record["caption"])
            else:
                assert record["caption"] and all(map(is_filled, record["caption"]))
            if task == "caption":
                assert record["image_id"] in range(2**63)
        assert dataset.annotation and len(ids) in (0, len(dataset.annotation))
    if task == "qa":
        labels = datasets["train"].class_labels
        assert sorted(labels.values()) == list(range(len(labels))) and all(map(is_filled, labels))


BUILDERS = {"msrvtt_retrieval": "test", "msrvtt_caption": "train", "msrvtt_qa": "train"}


@given(files(".json"), st.sampled_from(sorted(BUILDERS)))
def test_published_annotations_are_checked(folder, file, name):
    _, content = file
    fuzzed, labels = folder / "published.json", folder / "labels.json"
    fuzzed.write_bytes(content)
    labels.write_text('{"red": 0}')
    builder_cls = registry.get_builder_class(name)
    # under another name than the builder's in one of them
    (config,) = OmegaConf.load(builder_cls.default_config_path()).datasets.values()
    config.build_info.annotations = {
        BUILDERS[name]: {"storage": str(fuzzed)},
        "ans2label": {"storage": str(labels)},
    }
    config.build_info.videos.storage = str(folder / "files")
    try:
        check_annotations(builder_cls(config))
    except DatasetError as error:
        assert "published.json" in str(error)
        return
    records = json.loads(content.decode())
    assert records and isinstance(records, list)
    for record in records:
        assert is_filled(record["video"])
        if name == "msrvtt_retrieval":
            assert isinstance(record["caption"], list) and all(map(is_filled, record["caption"]))
        elif name == "msrvtt_caption":
            assert isinstance(record["caption"], str) and record["image_id"] is not None
        else:
            assert is_filled(record["question"]) and is_filled(record["answer"])


# What an option on the command line may set to anything.
SETTABLE = [
    ("data_type",),
    ("skip_missing",),
    *(
        ("build_info", *path, key)
        for path in (("videos",), ("annotations", "train"), ("annotations", "ans2label"))
        for key in ("storage", "url")
    ),
]


@given(
    st.sampled_from(["msrvtt_retrieval", "msrvtt_qa", "custom_caption"]),
    st.sampled_from(SETTABLE),
    st.none()
    | st.integers()
    | st.booleans()
    | st.floats()
    | st.sampled_from(["", "x", "a\0.json", "a" * 5000])
    | st.lists(st.integers() | st.none() | st.sampled_from(["x", "a.json"]), max_size=2)
    | st.dictionaries(st.sampled_from(["x", "storage"]), st.integers(), max_size=1),
)
@example("custom_caption", ("data_type",), ["videos"])
@example("msrvtt_qa", ("build_info", "annotations", "train", "storage"), 5)
@example("msrvtt_qa", ("build_info", "annotations", "ans2label", "storage"), [5])
@example("msrvtt_retrieval", ("build_info", "videos", "storage"), 5)
def test_any_path_is_taken_or_refused(folder, name, place, value):
    (folder / "empty.json").write_text("[]")
    config = {
        "data_type": "videos",
        "build_info": {
            "annotations": {
                key: {"storage": str(folder / "empty.json")} for key in ("train", "ans2label")
            },
            "videos": {"storage": str(folder / "files")},
        },
    }
    if name == "custom_caption":
        del config["build_info"]["annotations"]["ans2label"]
    inside = config
    for key in place[:-1]:
        inside = inside.setdefault(key, {})
    inside[place[-1]] = value
    with pytest.raises((DatasetError, ConfigError)):  # at least as the annotations are empty
        config = read_dataset(name, config)
        builder = registry.get_builder_class(name)(OmegaConf.create(config))
        if name == "custom_caption":
            builder.prepare()
        else:
            check_annotations(builder)


@given(value_texts | record_texts(), st.sampled_from(sorted(LAYOUTS, key=lambda c: c.__name__)))
def test_a_layout_says_of_any_value_whether_it_fits(text, dataset_cls):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    layout = layout_of(dataset_cls)
    wrong = problems(check_records([value], layout, "a.json"))
    assert all(0 < len(problem.text) < 500 for problem in wrong)
    if not wrong:
        assert is_filled(value[layout.visual_key])
    for check in (answer_problems, label_problems, *layout.side_files):
        assert all(0 < len(problem.text) < 500 for problem in check(value, "a.json"))
    if not answer_problems(value, "a.json"):
        assert all(map(is_filled, value))
    if not label_problems(value, "a.json"):
        assert sorted(value.values()) == list(range(len(value)))
        assert not any(isinstance(index, bool) for index in value.values())


# --- what benchmarks are published in -----------------------------------------------------------


@given(files(".json", ".csv", spoilt=["video", "caption"]))
@example((".json", b'[{"video": 5, "description": "a"}]'))
def test_published_lists_are_read_or_refused(folder, file):
    ending, content = file
    path = folder / f"list{ending}"
    path.write_bytes(content.replace(b"caption", b"description"))
    try:
        splits = list(benchmarks.didemo(Namespace(train=path, val=None, test=None)))
    except DatasetError as error:
        assert path.name in str(error)
        return
    (split,) = splits
    assert split.captions and all(map(is_filled, split.captions))


@st.composite
def msrvtt_texts(draw) -> bytes:
    ids = st.sampled_from(["video0", "video1"])
    video = st.fixed_dictionaries(
        {"video_id": ids.map(json.dumps), "split": st.just('"train"')},
        optional={"more": value_texts},
    ).map(object_text)
    sentence = st.fixed_dictionaries(
        {"video_id": ids.map(json.dumps) | value_texts, "caption": st.just('"a"') | value_texts}
    ).map(object_text)
    parts = {
        key: draw(st.lists(one | value_texts, max_size=3).map(list_text) | value_texts)
        for key, one in (("videos", video), ("sentences", sentence))
    }
    return object_text(parts).encode("utf-8", "surrogatepass")


@given(strange | proper(".json") | msrvtt_texts() | msrvtt_texts().flatmap(harmed))
def test_published_objects_are_read_or_refused(folder, content):
    path, test = folder / "object.json", folder / "test.csv"
    path.write_bytes(content)
    test.write_text("video_id,sentence\nvideo1,a\n")
    args = Namespace(data=path, test_csv=test, train_csv=None, split="9k", retrieval_only=False)
    try:
        splits = list(benchmarks.msrvtt(args))
    except DatasetError as error:
        assert path.name in str(error)
    else:
        assert len(splits) == 5
        assert all(re.fullmatch(r"video\d\.mp4", v) for split in splits for v in split.captions)
