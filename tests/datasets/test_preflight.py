import json
from pathlib import Path

import pytest
from clips import frame_starts, spoil_from_frame, write_clip
from decord import VideoReader
from lavis.common.registry import registry
from lavis.datasets.datasets.aok_vqa_datasets import AOKVQADataset
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from lavis.processors.alpro_processors import AlproVideoEvalProcessor, AlproVideoTrainProcessor
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf
from PIL import Image, ImageFile

from lavis_uniadapter.datasets import preflight, reading
from lavis_uniadapter.datasets.building import check_built
from lavis_uniadapter.datasets.preflight import check_annotations, check_dataset, unreadable_files
from lavis_uniadapter.datasets.reading import EvaluationItems
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.processors.decoding import frames_problem
from lavis_uniadapter.processors.images import image_problem
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor, BlipVideoTrainProcessor
from lavis_uniadapter.tools.prepare.check import examine

DATASETS = {
    ("video", "train"): VideoRetrievalDataset,
    ("video", "val"): VideoRetrievalEvalDataset,
    ("image", "train"): RetrievalDataset,
    ("image", "val"): RetrievalEvalDataset,
}


def record(kind, split, name):
    """A sound record of an annotation file."""
    caption = f"caption of {name}" if split == "train" else ["one caption", "another"]
    return {kind: name, "caption": caption, "image_id": name}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "visual"
    folder.mkdir()
    return folder


def build(kind, split, records, root, vis_processor=None):
    annotations = write_json(root.parent / f"{split}.json", records)
    return DATASETS[kind, split](
        vis_processor or BaseProcessor(), BaseProcessor(), str(root), [annotations]
    )


def names_of(kind, count):
    return [f"{kind}{index:02d}.{'mp4' if kind == 'video' else 'png'}" for index in range(count)]


def write_visual(path):
    if path.suffix == ".mp4":
        write_clip(path)
    else:
        Image.new("RGB", (8, 8)).save(path)


@pytest.mark.parametrize(("kind", "split"), DATASETS)
def test_sound_datasets_pass(kind, split, root):
    names = names_of(kind, 2)
    for name in names:
        write_visual(root / name)
    dataset = build(kind, split, [record(kind, split, n) for n in names], root)
    check_dataset(dataset, split)
    assert unreadable_files(dataset, split) == {}


@pytest.mark.parametrize(("kind", "split"), DATASETS)
def test_missing_files_are_counted_and_the_first_twenty_named(kind, split, root):
    names = names_of(kind, 23)
    write_visual(root / names[0])
    dataset = build(kind, split, [record(kind, split, n) for n in names], root)
    with pytest.raises(DatasetError, match=f"mine, {split}: 22 files cannot be read") as caught:
        check_built({"mine": {split: dataset}}, {"mine": {}})
    message = str(caught.value)
    assert [name in message for name in names] == [False] + [True] * 20 + [False] * 2
    assert "and 2 more" in message and "skip_missing" in message and "allow_missing" in message
    check_built({"mine": {split: dataset}}, {"mine": {}}, files=False)


def test_empty_dataset_is_refused(root):
    with pytest.raises(DatasetError, match="the train annotations: has no records"):
        check_dataset(build("image", "train", [], root), "train")


def test_every_unusable_video_is_named_with_the_reason(root):
    names = names_of("video", 5)
    for name in names[:4]:
        write_clip(root / name)
    (root / names[1]).write_bytes(b"")
    (root / names[2]).write_text("no video")
    dataset = build("video", "train", [record("video", "train", n) for n in names], root)
    unusable = unreadable_files(dataset, "train")
    assert list(unusable) == [str(root / names[index]) for index in (1, 2, 4)]
    for reason, found in zip(
        ("is empty", "in no known format", "no such file"), unusable.values(), strict=True
    ):
        assert reason in found
    with pytest.raises(DatasetError) as caught:
        check_built({"mine": {"train": dataset}}, {"mine": {}})
    for path, reason in unusable.items():
        assert f"{path}: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    ("split", "processor"),
    [
        ("val", BlipVideoEvalProcessor(image_size=32, n_frms=2)),
        ("val", BlipVideoEvalProcessor(image_size=32, n_frms=7)),
        ("val", AlproVideoEvalProcessor(image_size=32, n_frms=7)),
        ("train", BlipVideoTrainProcessor(image_size=32, n_frms=2)),
    ],
)
def test_the_frames_that_evaluation_reads_or_the_last_one_are_decoded(
    root, monkeypatch, split, processor
):
    write_clip(root / "clip.mp4", num_frames=20)
    dataset = build("video", split, [record("video", split, "clip.mp4")], root, processor)
    read = []
    get_batch = VideoReader.get_batch

    def remember(reader, indices):
        read.append(list(map(int, indices)))
        return get_batch(reader, indices)

    monkeypatch.setattr(VideoReader, "get_batch", remember)
    assert unreadable_files(dataset, split) == {}
    dataset[0]
    checked, evaluated = read
    assert checked == ([19] if split == "train" else evaluated)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_clip_too_short_for_alpro_is_named(root, split):
    """LAVIS takes fewer frames of it, and the model or the collation of its batch fails."""
    processor = AlproVideoTrainProcessor if split == "train" else AlproVideoEvalProcessor
    names = names_of("video", 2)
    for name, num_frames in zip(names, (5, 8), strict=True):
        write_clip(root / name, num_frames=num_frames)
    records = [record("video", split, name) for name in names]
    dataset = build("video", split, records, root, processor(image_size=32, n_frms=8))
    expected = {str(root / names[0]): "it has 5 frames, and n_frms is 8"}
    assert unreadable_files(dataset, split) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_clip_damaged_at_its_end_is_named(root, split):
    """Frames before the damage are not asked for: decord decodes ahead in a thread, which may or
    may not reach the damage."""
    write_clip(root / "tail.mp4", num_frames=20)
    spoil_from_frame(root / "tail.mp4", 18)
    processor = BlipVideoEvalProcessor(image_size=32, n_frms=10)
    dataset = build("video", split, [record("video", split, "tail.mp4")], root, processor)
    assert list(unreadable_files(dataset, split)) == [str(root / "tail.mp4")]


def test_an_evaluation_clip_damaged_between_its_ends_is_named(root):
    write_clip(root / "hole.mp4", num_frames=40)
    whole = (root / "hole.mp4").read_bytes()
    spoil_from_frame(root / "hole.mp4", 14)
    back = frame_starts(whole)[36]  # where a group of frames begins
    (root / "hole.mp4").write_bytes((root / "hole.mp4").read_bytes()[:back] + whole[back:])
    processor = BlipVideoEvalProcessor(image_size=32, n_frms=10)
    dataset = build("video", "val", [record("video", "val", "hole.mp4")], root, processor)
    assert frames_problem(str(root / "hole.mp4"), lambda num_frames: [38]) is None
    assert list(unreadable_files(dataset, "val")) == [str(root / "hole.mp4")]


def test_truncated_images_are_named_before_an_evaluation(root, monkeypatch):
    """Training replaces them, and reads their headers alone."""
    names = [f"{index:02d}.jpg" for index in range(24)]
    for name in names:
        Image.effect_noise((200, 200), 50).save(root / name)
    for name in names[::2]:
        (root / name).write_bytes((root / name).read_bytes()[:-3000])
    val = build("image", "val", [record("image", "val", name) for name in names], root)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as LAVIS sets it
    for _ in range(3):  # as threads take turns
        unreadable = unreadable_files(val, "val")
        assert list(unreadable) == [str(root / name) for name in names[::2]]
    assert "image file is truncated" in unreadable[str(root / names[0])]
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    train = build("image", "train", [record("image", "train", name) for name in names], root)
    assert unreadable_files(train, "train") == {}


def test_all_checks_and_evaluation_agree_on_which_images_are_readable(root, monkeypatch):
    monkeypatch.setattr(reading, "RETRY_AFTER", 0)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as LAVIS sets it
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    for form in ("bmp", "gif", "ico", "jpg", "png", "ppm", "tga", "tif", "webp"):
        picture.save(root / f"whole.{form}")
        content = (root / f"whole.{form}").read_bytes()
        for percent in (2, 30, 60, 95, 99):
            cut = content[: len(content) * percent // 100]
            (root / f"{percent:02d}.{form}").write_bytes(cut)
    names = sorted(path.name for path in root.iterdir())
    dataset = build("image", "val", [record("image", "val", name) for name in names], root)
    items = EvaluationItems(dataset, 0)
    unread = [name for index, name in enumerate(names) if items.try_to_read(index)[1]]
    assert [Path(path).name for path in unreadable_files(dataset, "val")] == unread
    examined = [name for name in names if examine((str(root / name), True), thorough=False)]
    assert examined == unread
    own = [n for n in names if image_problem(str(root / n), whole=True, own=True)]
    assert own == unread
    assert "60.ico" in unread and not any(name.startswith("whole") for name in unread)


def test_each_distinct_video_is_decoded_once(root, monkeypatch):
    write_clip(root / "shared.mp4")
    decoded = []
    monkeypatch.setattr(preflight, "frames_problem", lambda path, _: decoded.append(path))
    records = [record("video", "train", "shared.mp4") for _ in range(3)]
    unreadable_files(build("video", "train", records, root), "train")
    assert decoded == [str(root / "shared.mp4")]


def test_unreadable_image_is_named(root):
    (root / "a.png").write_bytes(b"anything")
    dataset = build("image", "val", [record("image", "val", "a.png")], root)
    unusable = unreadable_files(dataset, "val")
    assert "it cannot be read as an image" in unusable[str(root / "a.png")]


def test_datasets_of_other_tasks_are_not_checked(caplog):
    with caplog.at_level("WARNING"):
        check_dataset(AOKVQADataset.__new__(AOKVQADataset), "train")
    assert "AOKVQADataset, train: not checked" in caplog.text


WRONG_RECORDS = [
    (
        "video",
        "train",
        {"video": None},
        "file name below .* under 'video', has None",
    ),
    ("video", "train", {"video": 17}, "file name below .* under 'video', has 17"),
    ("image", "val", {"image": " "}, "file name below .* under 'image'"),
    ("image", "train", {"image_id": None}, "identifier under 'image_id'"),
    ("video", "train", {"caption": None}, "string under 'caption', has None"),
    ("video", "train", {"caption": ["a list"]}, r"string under 'caption', has \['a list'\]"),
    ("image", "train", {"caption": ["a list"]}, "string under 'caption'"),
    ("video", "val", {"caption": "letters"}, "list of non-empty strings .*'letters'"),
    ("image", "val", {"caption": "letters"}, "list of non-empty strings .*'letters'"),
    ("video", "val", {"caption": []}, "list of non-empty strings"),
    ("video", "val", {"caption": ["fine", ""]}, "list of non-empty strings"),
    ("video", "val", {"caption": ["fine", 3]}, "list of non-empty strings"),
    ("video", "val", {"caption": None}, "list of non-empty strings"),
]


def spoilt(kind, split, change):
    """A record with the change applied; None takes the key out."""
    changed = {**record(kind, split, names_of(kind, 2)[1]), **change}
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(("kind", "split", "change", "named"), WRONG_RECORDS[::5])
def test_wrong_records_of_a_built_dataset_are_named(kind, split, change, named, root):
    names = names_of(kind, 2)
    for name in names:
        write_visual(root / name)
    dataset = build(kind, split, [record(kind, split, name) for name in names], root)
    dataset.annotation[1] = spoilt(kind, split, change)
    with pytest.raises(DatasetError, match=f"record 1: needs a[n]? {named}"):
        check_dataset(dataset, split)


@pytest.fixture
def config(tmp_path, root):
    """Write sound annotations of all splits and return the dataset's config node."""

    def make(kind="video"):
        annotations = {}
        for split in ("train", "val", "test"):
            path = tmp_path / "annotations" / f"{split}.json"
            write_json(path, [record(kind, split, name) for name in names_of(kind, 2)])
            annotations[split] = {"storage": str(path)}
        return OmegaConf.create(
            {
                "data_type": f"{kind}s",
                "build_info": {"annotations": annotations, f"{kind}s": {"storage": str(root)}},
            }
        )

    return make


def check(node, name=None):
    """Check a config node through LAVIS's own builder."""
    kind = "coco_retrieval" if node.data_type == "images" else "msrvtt_retrieval"
    check_annotations(registry.get_builder_class(name or kind)(node))


def annotation_file(node, split):
    return Path(node.build_info.annotations[split].storage)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_sound_annotations_pass(config, kind):
    check(config(kind))


@pytest.mark.parametrize(("kind", "split", "change", "named"), WRONG_RECORDS)
def test_wrong_records_are_named_before_the_dataset_is_built(config, kind, split, change, named):
    node = config(kind)
    path = annotation_file(node, split)
    write_json(path, [record(kind, split, names_of(kind, 1)[0]), spoilt(kind, split, change)])
    with pytest.raises(DatasetError, match=f"record 1: needs a[n]? {named}") as caught:
        check(node)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[{", "not valid JSON"),
        ('{"video": "a.mp4"}', "must be a list"),
        ("[]", "has no records"),
        ('["a.mp4"]', "record 0: must be an object, .* not 'a.mp4'"),
    ],
)
def test_wrong_annotation_files_are_named(config, content, named):
    node = config()
    annotation_file(node, "val").write_text(content)
    with pytest.raises(DatasetError, match=named) as caught:
        check(node)
    assert str(annotation_file(node, "val")) in str(caught.value)


def test_annotation_files_that_are_not_utf8_are_named(config):
    node = config()
    annotation_file(node, "test").write_bytes(b'[{"video": "caf\xe9"}]')
    with pytest.raises(DatasetError, match="test.json:1: is not UTF-8"):
        check(node)


def test_missing_annotation_file_is_named(config):
    node = config()
    annotation_file(node, "test").unlink()
    with pytest.raises(DatasetError, match="test.json: cannot be read .No such file"):
        check(node)


def test_missing_annotation_file_that_lavis_will_fetch_is_passed_over(config):
    node = config()
    annotation_file(node, "test").unlink()
    node.build_info.annotations.test.url = "https://example.org/test.json"
    check(node)


def test_each_of_several_annotation_files_is_checked(config, tmp_path):
    node = config()
    second = tmp_path / "second.json"
    node.build_info.annotations.train.storage = [str(annotation_file(node, "train")), str(second)]
    with pytest.raises(DatasetError, match="second.json: cannot be read"):
        check(node)
    write_json(second, [record("video", "train", "a.mp4")])
    check(node)


def test_one_url_per_annotation_file_is_demanded(config):
    node = config()
    node.build_info.annotations.train.url = ["https://example.org/a", "https://example.org/b"]
    with pytest.raises(DatasetError, match=r"annotations.train has 2 url\(s\) for 1 storage"):
        check(node)


def test_relative_paths_start_at_lavis_cache_root(config, tmp_path, monkeypatch):
    node = config()
    for split in ("train", "val", "test"):
        node.build_info.annotations[split].storage = f"annotations/{split}.json"
    node.build_info.videos.storage = "visual"
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    check(node)
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path / "elsewhere"))
    with pytest.raises(DatasetError) as caught:
        check(node)
    assert str(tmp_path / "elsewhere" / "visual") in str(caught.value)
    assert str(tmp_path / "elsewhere" / "annotations" / "val.json") in str(caught.value)


def test_problems_of_all_splits_are_listed_at_once(config):
    node = config()
    node.build_info.videos.storage = "/nowhere/to/be/found"
    for split in ("train", "test"):
        annotation_file(node, split).unlink()
    with pytest.raises(DatasetError) as caught:
        check(node)
    for named in ("/nowhere/to/be/found", "train.json", "test.json"):
        assert named in str(caught.value)
    assert "val.json" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data_type": "features"}, "'features'"),
        ({"build_info": {"videos": None}}, r"build_info\.videos\.storage is missing"),
        ({"build_info": {"annotations": None}}, "names none of train, val, test"),
        ({"build_info": {"annotations": {"val": {"storage": None}}}}, r"val\.storage is missing"),
    ],
    ids=str,
)
def test_incomplete_configs_are_named(config, change, named):
    with pytest.raises(DatasetError, match=named):
        check(OmegaConf.merge(config(), change))
