"""Files that are damaged, or hold something else than they should: refused, and in a few words."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from small_models import perturb
from test_properties import examples

from lavis_uniadapter.checkpoints.adapter_files import CONFIG, TENSORS
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
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
from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_frames, image_problem
from lavis_uniadapter.processors.extracted_frames import (
    ABOUT,
    EXTRACTED_SUFFIX,
    read_about,
    write_extracted_frames,
)
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.tools.prepare import didemo, msrvtt
from lavis_uniadapter.tools.prepare.annotations import Identifier, PlainName, read_published

# --- what files may hold ------------------------------------------------------------------------

strings = st.text(max_size=5) | st.sampled_from(["", " ", "\ud800", "\0", "../a.mp4", "/a.mp4"])
EXTREMES = {
    "digits": "1" * 5000,
    "lists in lists": "[" * 5000 + "]" * 5000,
    "objects in objects": '{"a":' * 5000 + "1" + "}" * 5000,
}
# JSON texts: of some no value of Python is the origin
scalar_texts = (
    st.builds(json.dumps, st.none() | st.booleans() | st.integers() | st.floats() | strings)
    | st.integers(10**30, 10**31).map(str)
    | st.sampled_from(sorted(EXTREMES)).map(EXTREMES.get)
)


def _list_text(items: list[str]) -> str:
    return f"[{', '.join(items)}]"


def _object_text(items: dict[str, str]) -> str:
    return f"{{{', '.join(f'{json.dumps(key)}: {text}' for key, text in items.items())}}}"


value_texts = st.recursive(
    scalar_texts,
    lambda inner: (
        st.lists(inner, max_size=3).map(_list_text)
        | st.dictionaries(strings, inner, max_size=3).map(_object_text)
    ),
    max_leaves=5,
)
FIELDS = ["video", "image", "caption", "question", "answer", "image_id", "question_id"]
NEARLY_RIGHT = [
    '"a"',
    '" a "',
    '""',
    '" "',
    "5",
    "true",
    "null",
    "[]",
    '["a"]',
    '["a", 5]',
    '[" "]',
]


@st.composite
def sound_records(draw, listed: bool = False) -> dict[str, object]:
    """A record as any task may read it; `listed`: with a list of captions, as in evaluation."""
    number = draw(st.integers(0, 1))
    name = draw(st.sampled_from(["", "./"])) + ["a.mp4", "b.mp4"][number]
    captions = draw(st.lists(st.sampled_from(["one", "two", " three"]), min_size=1, max_size=2))
    answer = draw(st.sampled_from(["red", "blue"]))
    caption = captions if listed else captions[0]
    values = (name, name, caption, "what?", answer, number, draw(st.integers(0, 9)))
    return dict(zip(FIELDS, values, strict=True))


@st.composite
def record_texts(draw, listed: bool = False, spoilt: Sequence[str] = FIELDS) -> str:
    """A record as JSON text, half of the time with one of the `spoilt` fields spoilt."""
    texts = {key: json.dumps(value) for key, value in draw(sound_records(listed)).items()}
    if draw(st.booleans()):
        key = draw(st.sampled_from(spoilt))
        near = st.sampled_from(NEARLY_RIGHT)
        texts[key] = draw(near | near | value_texts | st.none())
        if texts[key] is None:
            del texts[key]
    return _object_text(texts)


@st.composite
def harmed(draw, content: bytes) -> bytes:
    """Content with a byte changed, bytes put in or taken out, or the end cut off."""
    at = draw(st.integers(0, max(0, len(content) - 1)))
    harm = draw(st.sampled_from(["change", "insert", "remove", "cut"]))
    if harm == "cut":
        return content[:at]
    if harm == "remove":
        return content[:at] + content[at + draw(st.integers(1, 4)) :]
    new = draw(st.binary(min_size=1, max_size=1 if harm == "change" else 4))
    return content[:at] + new + content[at + (harm == "change") :]


cells = st.text('",\t \r\n\0ab', max_size=6) | st.sampled_from(["a.mp4", "b.mp4", "1"])


@st.composite
def tables(draw, delimiter: str) -> str:
    """A table with a header, most of its rows as they should be."""
    header = draw(st.permutations(FIELDS) | st.lists(st.sampled_from(FIELDS), max_size=4))
    rows = []
    for _ in range(draw(st.integers(0, 3))):
        record = draw(sound_records())
        row = [str(record[key]) for key in header]
        if row and draw(st.integers(0, 2)) == 0:
            row[draw(st.integers(0, len(row) - 1))] = draw(cells)
        if draw(st.integers(0, 4)) == 0:
            row += draw(st.lists(cells, max_size=2))
        rows.append(row)
    if draw(st.booleans()):  # nothing quoted that should be
        return "\n".join(delimiter.join(row) for row in [header, *rows])
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows([header, *rows])
    return buffer.getvalue()


def encoded(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """In UTF-8, with a byte-order mark or without."""
    return st.builds(
        lambda mark, text: mark + text.encode("utf-8", "surrogatepass"),
        st.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
        texts,
    )


def proper(ending: str, spoilt: Sequence[str] = FIELDS) -> st.SearchStrategy[bytes]:
    """A file of the format that its ending names, with records whose `spoilt` fields may be so."""
    if ending in (".csv", ".tsv"):
        return encoded(tables({".csv": ",", ".tsv": "\t"}[ending]))
    if ending == ".txt":
        return encoded(st.lists(st.sampled_from(["red", "blue", "", " "])).map("\n".join))
    join = {".json": _list_text, ".jsonl": "\n".join}[ending]
    return encoded(
        st.booleans().flatmap(
            lambda listed: st.lists(record_texts(listed, spoilt), min_size=1, max_size=3).map(join)
        )
    )


strange = st.binary(max_size=30) | encoded(
    value_texts
    | st.lists(value_texts, max_size=3).map(_list_text)
    | st.lists(value_texts, max_size=3).map("\n".join)
    | st.text('{}[]:,"\n\r\t\0a1 ', max_size=30)
)


def files(*endings: str, spoilt: Sequence[str] = FIELDS) -> st.SearchStrategy[tuple[str, bytes]]:
    """An ending, and what a file of that format may hold: mostly records, most of them sound."""
    return st.sampled_from(endings).flatmap(
        lambda ending: st.tuples(
            st.just(ending),
            proper(ending, spoilt)
            | proper(ending, spoilt)
            | proper(ending, spoilt).flatmap(harmed)
            | strange
            | st.sampled_from(FORMATS).flatmap(proper),
        )
    )


FORMATS = (".json", ".jsonl", ".csv", ".tsv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the files that records name."""
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "files").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / "files" / name).write_bytes(b"")
    return folder


# --- records ------------------------------------------------------------------------------------


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
    assert "is no valid JSON" in problem.text


def test_a_table_without_a_header_is_shown_in_short(folder):
    path = folder / "headless.csv"
    path.write_text(f"a.mp4,{'a long caption ' * 200}\n")
    (problem,) = read_records(path, Named)
    assert "has no column 'video', but 'a.mp4', 'a long" in problem.text
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


@examples(300)
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


@examples(200)
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


class Published(Record):
    video: PlainName
    question_id: Identifier


@examples(200)
@given(files(".json", ".csv", spoilt=["video", "question_id"]))
@example((".json", b'[{"video": 5, "question_id": 5}]'))
@example((".json", b'[{"video": "a.mp4", "question_id": [5]}]'))
def test_published_lists_are_read_or_refused(folder, file):
    ending, content = file
    path = folder / f"list{ending}"
    path.write_bytes(content)
    try:
        records = read_published(path, Published)
    except DatasetError as error:
        assert path.name in str(error)
        return
    assert records
    for record in records:
        assert is_filled(record.video) and type(record.question_id) in (int, str)


@st.composite
def msrvtt_texts(draw) -> bytes:
    ids = st.sampled_from(["video0", "video1"])
    video = st.fixed_dictionaries(
        {"video_id": ids.map(json.dumps), "split": st.just('"train"')},
        optional={"more": value_texts},
    ).map(_object_text)
    sentence = st.fixed_dictionaries(
        {
            "video_id": ids.map(json.dumps) | value_texts,
            "caption": st.just('"a"') | value_texts,
            "sen_id": st.integers(0, 9).map(str) | value_texts,
        }
    ).map(_object_text)
    parts = {
        key: draw(st.lists(one | value_texts, max_size=3).map(_list_text) | value_texts)
        for key, one in (("videos", video), ("sentences", sentence))
    }
    return _object_text(parts).encode("utf-8", "surrogatepass")


@given(strange | proper(".json") | msrvtt_texts() | msrvtt_texts().flatmap(harmed))
def test_published_objects_are_read_or_refused(folder, content):
    path = folder / "object.json"
    path.write_bytes(content)
    for read in (msrvtt.read_data, didemo.read_descriptions):
        try:
            found = read(path)
        except DatasetError as error:
            assert path.name in str(error)
        else:
            if read is msrvtt.read_data:
                assert all(map(is_filled, found.splits))
                assert set(found.captions) <= set(found.splits)


# --- adapter folders ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(build_model, tmp_path_factory):
    """A model, the folder of its adapter, and where to put a damaged one."""
    model = build_model()
    perturb(model.adapters)
    root = tmp_path_factory.mktemp("adapters")
    model.save_adapter(root / "sound", {"t2v_r1": 51.25})
    return model, root / "sound", root / "damaged"


def load_or_refuse(saved, **changed: bytes) -> CheckpointError | None:
    """Load an adapter with other files: refused, or the tensors that were saved."""
    model, sound, damaged = saved
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(sound, damaged)
    for name, content in changed.items():
        (damaged / {"tensors": TENSORS, "config": CONFIG}[name]).write_bytes(content)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        model.load_adapter(damaged, "loaded")
    except CheckpointError as error:
        assert str(damaged) in str(error)
        assert list(model.adapters) == ["default"]
        raised = error
    else:
        raised = None
        loaded, expected = (model.adapters[n].state_dict() for n in ("loaded", "default"))
        assert list(loaded) == list(expected)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
        model.set_adapter("default")
        model.delete_adapter("loaded")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return raised


@examples(60)
@given(st.data())
def test_harmed_tensors_never_load(saved, data):
    content = (saved[1] / TENSORS).read_bytes()
    new = data.draw(harmed(content))
    assert (load_or_refuse(saved, tensors=new) is None) == (new == content)


@examples(60)
@given(st.data())
def test_tensors_harmed_under_a_right_hash_raise_nothing_else(saved, data):
    """As a download would be that was damaged before it was saved."""
    model, sound, damaged = saved
    content = (sound / TENSORS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    new = data.draw(harmed(content[:header])) + content[header:]
    config = json.loads((sound / CONFIG).read_text())
    config["blake2b"] = hashlib.blake2b(new, digest_size=16).hexdigest()
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(sound, damaged)
    (damaged / TENSORS).write_bytes(new)
    (damaged / CONFIG).write_text(json.dumps(config))
    try:
        model.load_adapter(damaged, "loaded")
    except CheckpointError:
        assert list(model.adapters) == ["default"]
    else:
        model.set_adapter("default")
        model.delete_adapter("loaded")


@examples(60)
@given(st.data())
def test_a_harmed_config_is_refused_or_means_the_same(saved, data):
    load_or_refuse(saved, config=data.draw(harmed((saved[1] / CONFIG).read_bytes())))


@examples(60)
@given(st.data(), value_texts)
def test_a_config_of_any_values_is_refused_or_means_the_same(saved, data, text):
    config = json.loads((saved[1] / CONFIG).read_text())
    mark = "put the value here"
    inside, key = config, data.draw(st.sampled_from(sorted(config)))
    if isinstance(config[key], dict) and config[key] and data.draw(st.booleans()):
        inside, key = config[key], data.draw(st.sampled_from(sorted(config[key])))
    if data.draw(st.booleans()):
        inside[key] = mark
    else:
        inside[data.draw(strings)] = mark
    content = json.dumps(config).replace(json.dumps(mark), text)
    load_or_refuse(saved, config=content.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("configuration", ["bottleneck"]),
        ("configuration", {"bottelneck": 8}),
        ("configuration", {"bottleneck": -8}),
        ("settings", 35),
        ("base", "random weights"),
        ("base", {"name": "random weights"}),
        ("blake2b", None),
    ],
)
def test_a_config_of_other_kinds_is_called_damaged(saved, key, value):
    config = json.loads((saved[1] / CONFIG).read_text())
    config[key] = value
    assert "is damaged" in str(load_or_refuse(saved, config=json.dumps(config).encode()))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n  "),
        lambda text: text.replace("51.25", "3"),
        lambda text: json.dumps(dict(reversed(json.loads(text).items()))),
    ],
)
def test_a_config_that_means_the_same_loads(saved, change):
    text = (saved[1] / CONFIG).read_text()
    assert change(text) != text
    assert load_or_refuse(saved, config=change(text).encode()) is None


# --- extracted frames ---------------------------------------------------------------------------

SIDE = 16


def read_frames_or_refuse(path: Path) -> None:
    """Decode three frames: three there are, or an error that names the archive."""
    video = str(path).removesuffix(EXTRACTED_SUFFIX)
    try:
        frames = decode_frames(video, lambda number: sample_frame_indices(number, 3), SIDE)
    except VideoDecodeError as error:
        assert path.name in str(error)
    else:
        assert frames.dtype == torch.uint8 and frames.shape == (3, SIDE, SIDE, 3)
    try:
        about = read_about(str(path))
    except (OSError, ValueError):
        return
    assert all(type(about[key]) is int for key in ("num_frames", "image_size", "source_frames"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("frames") / f"clip.mp4{EXTRACTED_SUFFIX}"
    frames = torch.arange(4 * SIDE * SIDE * 3).reshape(4, SIDE, SIDE, 3) % 256
    write_extracted_frames(str(path), frames.to(torch.uint8), 9)
    return path, path.read_bytes()


@given(st.data())
def test_a_harmed_archive_is_read_or_refused(archive, data):
    path, content = archive
    path.write_bytes(data.draw(harmed(content)))
    read_frames_or_refuse(path)


@given(st.data())
def test_an_archive_with_a_harmed_directory_is_read_or_refused(archive, data):
    """The directory at the end, which no checksum covers, names methods, sizes and places."""
    path, content = archive
    start = content.index(b"PK\1\2")
    path.write_bytes(content[:start] + data.draw(harmed(content[start:])))
    read_frames_or_refuse(path)


@pytest.mark.parametrize(
    "about, why",
    [
        ([4], "TypeError"),
        ({"image_size": 16, "source_frames": 9}, "num_frames"),
        ({"num_frames": "4", "image_size": 16, "source_frames": 9}, "num_frames.*'4'"),
        ({"num_frames": 10**30, "image_size": 16, "source_frames": 9}, "no item named"),
    ],
)
def test_an_archive_that_says_something_else_is_named(archive, about, why):
    path, content = archive
    path.write_bytes(content)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members[ABOUT] = json.dumps(about).encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, member in members.items():
            new.writestr(name, member)
    with pytest.raises(VideoDecodeError, match=why):
        decode_frames(str(path).removesuffix(EXTRACTED_SUFFIX), lambda number: [0], SIDE)
    with pytest.raises(ValueError, match=why):
        read_about(str(path))


@pytest.mark.parametrize("at, byte", [(8, 1), (10, 99)])
def test_an_archive_of_an_unknown_kind_is_named(archive, at, byte):
    """One that claims to be encrypted (flags, 8), or compressed in a way unheard of (10)."""
    path, content = archive
    directory = content.index(b"PK\1\2")
    harmed = bytearray(content)
    harmed[directory + at] = byte
    path.write_bytes(harmed)
    with pytest.raises(VideoDecodeError, match="clip.mp4"):
        decode_frames(str(path).removesuffix(EXTRACTED_SUFFIX), lambda number: [0], SIDE)


def pictures() -> st.SearchStrategy[bytes]:
    """Sound pictures of several kinds, and harmed ones."""
    sound = []
    for mode, kind in (("RGB", "JPEG"), ("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("1", "TIFF")):
        for size in ((SIDE, SIDE), (5, 7)):
            content = io.BytesIO()
            Image.new(mode, size).save(content, kind)
            sound.append(content.getvalue())
    return st.sampled_from(sound) | st.sampled_from(sound).flatmap(harmed) | st.binary(max_size=20)


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Tag data larger", "ignore:Truncated File Read"
)
@given(
    st.lists(pictures(), max_size=4),
    value_texts
    | st.fixed_dictionaries(
        {
            key: st.integers(0, 5).map(str) | value_texts
            for key in ("num_frames", "image_size", "source_frames")
        }
    ).map(_object_text),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)
def test_an_archive_of_anything_is_read_or_refused(archive, members, about, method):
    path, _ = archive
    with zipfile.ZipFile(path, "w", method) as file:
        for number, content in enumerate(members):
            file.writestr(f"{number:05d}.jpg", content)
        file.writestr(ABOUT, about.encode("utf-8", "surrogatepass"))
    read_frames_or_refuse(path)


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Tag data larger", "ignore:Truncated File Read"
)
@given(pictures())
def test_a_picture_is_opened_or_named(folder, content):
    path = folder / "picture"
    path.write_bytes(content)
    for whole in (False, True):
        assert image_problem(str(path), whole) != ""


def test_a_picture_with_a_harmed_chunk_is_named(folder):
    content = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(content, "PNG")
    path = folder / "harmed.png"
    path.write_bytes(content.getvalue().replace(b"IDAT", b"IDA\x9c"))
    assert "cannot be read as an image" in image_problem(str(path), whole=False)
