"""The embedded data set: its contents, its layout, and that it never passes off stale files."""

import json
from dataclasses import fields, replace
from pathlib import Path

import cv2
import decord
import lavis  # noqa: F401  (populates the registry)
import numpy as np
import pytest
from lavis.common.registry import registry
from lavis.datasets.datasets import retrieval_datasets
from omegaconf import OmegaConf
from PIL import Image
from transformers import BertTokenizer

import lavis_uniadapter
from lavis_uniadapter.datasets import shapes
from lavis_uniadapter.datasets.shapes import (
    CENTRES,
    COLOURS,
    SHAPES,
    SIZES,
    ClipsConfig,
    StillsConfig,
    ensure_clips,
    ensure_stills,
)

TOKENIZER = Path(lavis_uniadapter.__file__).parent / "configs" / "tokenizers" / "shapes"
STILLS = StillsConfig(num_train=60, num_val=12, num_test=12)
CLIPS = ClipsConfig(num_train=6, num_val=5, num_test=8)
# Fractions of the width and height, from the upper left.
PLACES = {
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the centre": (0.5, 0.5),
}
KINDS = [
    pytest.param(ensure_stills, replace(STILLS, num_train=5, num_val=2, num_test=2), id="stills"),
    pytest.param(ensure_clips, replace(CLIPS, num_train=2, num_val=1, num_test=2), id="clips"),
]


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "stills"
    ensure_stills(STILLS, folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "clips"
    ensure_clips(CLIPS, folder)
    return folder


def records(folder, split):
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def decoded(path):
    """RGB frames, int of shape (frames, height, width, 3)."""
    # LAVIS makes decord return torch tensors.
    return decord.VideoReader(str(path)).get_batch(range(decord_length(path))).numpy().astype(int)


def decord_length(path):
    return len(decord.VideoReader(str(path)))


def near(picture, colour):
    """Which pixels have about this colour."""
    return np.linalg.norm(picture - np.array(COLOURS[colour]), axis=-1) < 60


def contents(folder):
    """Everything that must not change: bytes of annotations and stills, frames of clips."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".mp4":
            found[path.name] = decoded(path).tobytes()
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


# Determinism


@pytest.mark.parametrize(("ensure", "config"), KINDS)
def test_same_seed_gives_the_same_files(ensure, config, tmp_path):
    ensure(config, tmp_path / "one")
    ensure(config, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(("ensure", "config"), KINDS)
def test_another_seed_gives_other_files(ensure, config, tmp_path):
    ensure(config, tmp_path / "one")
    ensure(replace(config, seed=1), tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] == two[name]] == []


@pytest.mark.parametrize(("ensure", "config"), KINDS)
def test_a_changed_count_leaves_the_other_items_alone(ensure, config, tmp_path):
    ensure(config, tmp_path / "one")
    ensure(replace(config, num_train=config.num_train + 1, num_val=3), tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    grown = {"generated.json", "train.json", "val.json"}
    assert {name for name in one if one[name] != two[name]} == grown


def test_every_item_has_a_random_source_of_its_own():
    draws = {
        config_cls(seed=seed).rng(split, index).random()
        for config_cls in (StillsConfig, ClipsConfig)
        for seed in (0, 1)
        for split in ("train", "val", "test")
        for index in (0, 1)
    } | {config_cls().shuffling_rng().random() for config_cls in (StillsConfig, ClipsConfig)}
    assert len(draws) == 2 * 2 * 3 * 2 + 2


# Splits


def test_stills_of_two_splits_never_show_the_same_combination():
    dealt = shapes.deal_stills(StillsConfig())
    combinations = {split: {still[:3] for still in dealt[split]} for split in dealt}
    assert [len(dealt[split]) for split in ("train", "val", "test")] == [3000, 100, 100]
    assert not combinations["train"] & combinations["val"]
    assert not combinations["train"] & combinations["test"]
    assert not combinations["val"] & combinations["test"]


@pytest.mark.parametrize("seed", range(5))
def test_every_attribute_value_occurs_in_training(seed):
    train = shapes.deal_stills(StillsConfig(seed=seed))["train"]
    colours, forms, positions, sizes = map(set, zip(*train, strict=True))
    assert (colours, forms) == (set(COLOURS), set(SHAPES))
    assert (positions, sizes) == (set(CENTRES), set(SIZES))


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_still_of_an_evaluation_split_is_unique(split):
    most = StillsConfig.max_evaluation[split]
    dealt = shapes.deal_stills(StillsConfig(**{f"num_{split}": most}))[split]
    assert len(set(dealt)) == len(dealt) == most


def test_clips_of_two_splits_never_show_the_same_pair_of_objects():
    dealt = shapes.deal_clips(ClipsConfig())
    pairs = {split: {frozenset(pair) for pair in dealt[split]} for split in dealt}
    assert [len(dealt[split]) for split in ("train", "val", "test")] == [800, 100, 200]
    assert all(len(pair) == 2 for split in pairs for pair in pairs[split])
    assert not pairs["train"] & pairs["val"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["val"] & pairs["test"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_pair_of_an_evaluation_split_is_unique(split):
    most = ClipsConfig.max_evaluation[split]
    dealt = shapes.deal_clips(ClipsConfig(**{f"num_{split}": most}))[split]
    assert len({frozenset(pair) for pair in dealt}) == len(dealt) == most


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_annotations_describe_what_was_dealt(stills, clips, split):
    shown = [
        tuple(record["objects"][0][key] for key in ("colour", "shape", "position", "size"))
        for record in records(stills, split)
    ]
    assert shown == shapes.deal_stills(STILLS)[split]

    by_file = {record["video"]: record["objects"] for record in records(clips, split)}
    pairs = [
        {(thing["colour"], thing["shape"]) for thing in objects} for objects in by_file.values()
    ]
    assert pairs == [set(pair) for pair in shapes.deal_clips(CLIPS)[split]]


# Pictures


def test_stills_show_the_colour_at_the_place_and_in_the_size_of_the_annotation(stills):
    areas = {size: [] for size in SIZES}
    for record in records(stills, "train"):
        (thing,) = record["objects"]
        with Image.open(stills / "images" / record["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))
            visible = near(np.asarray(image).astype(int), thing["colour"])
        centroid = np.argwhere(visible).mean(axis=0)[::-1] / 64
        assert np.abs(centroid - PLACES[shapes.POSITION_PHRASES[thing["position"]]]).max() < 0.1, (
            record
        )
        areas[thing["size"]].append(np.ptp(np.argwhere(visible), axis=0).max())
    assert max(areas["small"]) < min(areas["large"])


def test_clips_decode_to_the_configured_frames(clips, tmp_path):
    for split in ("train", "val", "test"):
        for record in records(clips, split):
            assert decoded(clips / "videos" / record["video"]).shape == (16, 64, 64, 3)

    other = ClipsConfig(num_train=1, num_val=1, num_test=1, num_frames=9, image_size=96, fps=5)
    ensure_clips(other, tmp_path / "clips")
    path = tmp_path / "clips" / "videos" / "test_00000.mp4"
    assert decoded(path).shape == (9, 96, 96, 3)
    assert decord.VideoReader(str(path)).get_avg_fps() == pytest.approx(5)


def test_described_objects_are_visible_in_exactly_the_frames_of_the_annotation(clips):
    for record in (record for split in ("train", "test") for record in records(clips, split)):
        frames = decoded(clips / "videos" / record["video"])
        for colour in {thing["colour"] for thing in record["objects"]}:
            runs = [thing["frames"] for thing in record["objects"] if thing["colour"] == colour]
            pixels = near(frames, colour).sum(axis=(1, 2))
            for index, count in enumerate(pixels):
                if index in sum(runs, []):
                    assert count > 40, (record, colour, index)
                else:
                    assert count < 3, (record, colour, index)


def test_described_objects_are_at_the_place_of_the_annotation(clips):
    for record in records(clips, "test"):
        frames = decoded(clips / "videos" / record["video"])
        for thing in record["objects"]:
            for index in thing["frames"]:
                visible = np.argwhere(near(frames[index], thing["colour"]))
                offset = (
                    visible.mean(axis=0)[::-1] / 64
                    - PLACES[shapes.POSITION_PHRASES[thing["position"]]]
                )
                assert np.abs(offset).max() < 0.1, (record, index)


def test_each_object_has_one_run_of_frames_of_its_own(clips):
    for record in records(clips, "train") + records(clips, "test"):
        earlier, later = (thing["frames"] for thing in record["objects"])
        assert earlier == list(range(earlier[0], earlier[0] + 3))
        assert later == list(range(later[0], later[0] + 3))
        assert earlier[-1] < later[0] and later[-1] < 16


def test_runs_cover_the_clip_up_to_its_tightest_packing():
    config = ClipsConfig(num_frames=7, visible_frames=3)
    drawn = {
        tuple(map(tuple, shapes._two_runs(config, np.random.default_rng(i)))) for i in range(60)
    }
    assert drawn == {
        ((0, 1, 2), (3, 4, 5)),
        ((0, 1, 2), (4, 5, 6)),
        ((1, 2, 3), (4, 5, 6)),
    }


def test_distractors_are_grey_and_never_beside_a_described_object(tmp_path):
    config = replace(CLIPS, noise=0.0, distractors=0)
    ensure_clips(config, tmp_path / "bare")
    ensure_clips(replace(config, distractors=6), tmp_path / "full")

    def grey_pixels(folder, record):
        frames = decoded(tmp_path / folder / "videos" / record["video"])
        grey = (frames.min(axis=-1) > 130) & (np.ptp(frames, axis=-1) < 25)
        return grey.sum(axis=(1, 2))

    for record in records(tmp_path / "full", "test"):
        pixels = grey_pixels("full", record)
        described = [index for thing in record["objects"] for index in thing["frames"]]
        assert pixels[described].max() < 5, record
        assert np.delete(pixels, described).max() > 40, record
    for record in records(tmp_path / "bare", "test"):
        assert grey_pixels("bare", record).max() < 5, record


# Captions


def test_captions_name_what_is_shown(stills, clips):
    for record in records(stills, "train"):
        (thing,) = record["objects"]
        words = f"{thing['size']} {thing['colour']} {thing['shape']}"
        assert words in record["caption"]
        assert shapes.POSITION_PHRASES[thing["position"]] in record["caption"]
    for record in records(clips, "test"):
        first, second = record["objects"]
        (caption,) = record["caption"]
        mentions = [f"{thing['colour']} {thing['shape']}" for thing in (first, second)]
        assert -1 < caption.find(mentions[0]) < caption.find(mentions[1])
        for thing, mention in zip((first, second), mentions, strict=True):
            article = "an" if mention.startswith("orange") else "a"
            place = shapes.POSITION_PHRASES[thing["position"]]
            assert f"{article} {mention} appears {place}" in caption


def test_training_wordings_vary_and_the_two_of_a_clip_differ(stills, clips):
    starts = {record["caption"].split()[0] for record in records(stills, "train")}
    assert {"there", "the", "a"} <= starts
    captions = {}
    for record in records(clips, "train"):
        captions.setdefault(record["video"], set()).add(record["caption"])
    assert [len(wordings) for wordings in captions.values()] == [2] * CLIPS.num_train


# Vocabulary


def test_vocabulary_file_is_what_the_word_lists_give():
    expected = "".join(f"{token}\n" for token in shapes.tokenizer_vocabulary())
    assert (TOKENIZER / "vocab.txt").read_text() == expected, (
        "write vocab.txt anew from shapes.tokenizer_vocabulary(), one token a line"
    )


def test_every_caption_word_is_one_token(stills, clips):
    tokenizer = BertTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]"]) == [0, 1]
    captions = [
        caption
        for folder in (stills, clips)
        for split in ("train", "val", "test")
        for record in records(folder, split)
        for caption in ([record["caption"]] if split == "train" else record["caption"])
    ]
    for caption in (*captions, *shapes.caption_words()):
        assert tokenizer.tokenize(caption) == caption.split()
        assert tokenizer.unk_token_id not in tokenizer(caption)["input_ids"]
    assert {word for caption in captions for word in caption.split()} <= set(shapes.caption_words())


def test_other_text_is_lower_cased_and_never_unknown():
    tokenizer = BertTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    assert tokenizer.tokenize("A RED Zoo, 7x!") == ["a", "red", "z", "##o", "##o"] + [
        *(",", "7", "##x", "!"),
    ]


# Configuration


@pytest.mark.parametrize("config_cls", [StillsConfig, ClipsConfig])
def test_an_unknown_key_is_named_with_the_known_ones(config_cls):
    with pytest.raises(ValueError, match=r"visible_framez.*num_train") as error:
        config_cls.from_mapping({"seed": 3, "visible_framez": 2})
    assert ("visible_frames" in str(error.value)) == (config_cls is ClipsConfig)


@pytest.mark.parametrize(
    ("config_cls", "name", "value"),
    [
        (StillsConfig, "num_test", 101),
        (StillsConfig, "num_train", 0),
        (StillsConfig, "seed", -1),
        (StillsConfig, "seed", "7"),
        (StillsConfig, "noise", -1.0),
        (ClipsConfig, "num_val", 151),
        (ClipsConfig, "image_size", 48),
        (ClipsConfig, "visible_frames", 9),
        (ClipsConfig, "visible_frames", 0),
        (ClipsConfig, "captions_per_train_clip", 6),
        (ClipsConfig, "distractors", True),
    ],
)
def test_a_value_out_of_range_is_named(config_cls, name, value):
    with pytest.raises(ValueError, match=name):
        config_cls.from_mapping({name: value})


# Finished or not


@pytest.mark.parametrize(("ensure", "config"), KINDS)
def test_a_finished_set_is_not_drawn_again(ensure, config, tmp_path, monkeypatch):
    ensure(config, tmp_path / "set")
    monkeypatch.setattr(shapes, "_object_mask", None)
    ensure(config, tmp_path / "set")


@pytest.mark.parametrize(("ensure", "config"), KINDS)
def test_a_set_of_another_configuration_is_refused(ensure, config, tmp_path):
    folder = tmp_path / "set"
    ensure(config, folder)
    with pytest.raises(FileExistsError, match="seed: 0 there, 1 wanted") as error:
        ensure(replace(config, seed=1), folder)
    assert str(folder) in str(error.value)


def test_an_interrupted_generation_is_not_taken_as_finished(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    config = replace(CLIPS, num_train=2, num_val=1, num_test=1)
    write, written = shapes._write_mp4, []

    def write_three(path, frames, fps):
        assert not folder.exists()  # so that a kill at any time leaves no such folder
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, frames, fps)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_write_mp4", write_three)
        with pytest.raises(KeyboardInterrupt):
            ensure_clips(config, folder)
    assert list(tmp_path.iterdir()) == []

    ensure_clips(config, folder)
    assert len(list((folder / "videos").iterdir())) == 4


def test_a_folder_of_something_else_is_neither_used_nor_touched(tmp_path):
    folder = tmp_path / "set"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "train.json").write_text("[]")
    with pytest.raises(FileExistsError, match="generated.json is missing"):
        ensure_stills(STILLS, folder)
    assert [path.name for path in folder.rglob("*")] == ["annotations", "train.json"]


def test_a_faster_process_wins(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    config = replace(STILLS, num_train=2, num_val=1, num_test=1)
    rename = shapes.os.rename

    def rename_second(source, target):
        monkeypatch.setattr(shapes.os, "rename", rename)
        ensure_stills(config, folder)
        rename(source, target)

    monkeypatch.setattr(shapes.os, "rename", rename_second)
    ensure_stills(config, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list((folder / "images").iterdir())) == 4


# LAVIS


@pytest.fixture
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    return tmp_path


def builder(name, **generate):
    builder_cls = registry.get_builder_class(name)
    config = OmegaConf.load(builder_cls.default_config_path()).datasets[name]
    return builder_cls(OmegaConf.merge(config, {"generate": generate}))


@pytest.mark.parametrize(
    ("name", "config_cls"),
    [("shapes_image_retrieval", StillsConfig), ("shapes_retrieval", ClipsConfig)],
)
def test_the_default_configuration_files_say_the_defaults(name, config_cls):
    generate = OmegaConf.to_container(builder(name).config.generate)
    assert set(generate) == {field.name for field in fields(config_cls)}
    assert config_cls.from_mapping(generate) == config_cls()


def test_lavis_loads_the_stills(cache_root):
    datasets = builder(
        "shapes_image_retrieval", num_train=4, num_val=2, num_test=3
    ).build_datasets()
    assert isinstance(datasets["train"], retrieval_datasets.RetrievalDataset)
    assert isinstance(datasets["test"], retrieval_datasets.RetrievalEvalDataset)
    assert {split: len(dataset) for split, dataset in datasets.items()} == {
        "train": 4,
        "val": 2,
        "test": 3,
    }
    sample = datasets["train"][3]
    assert sample["image"].size == (64, 64)
    assert sample["image_id"] == 3
    assert sample["text_input"] == datasets["train"].annotation[3]["caption"]

    test = datasets["test"]
    assert test[2]["image"].size == (64, 64)
    assert test.txt2img == {0: 0, 1: 1, 2: 2}
    assert test.img2txt == {0: [0], 1: [1], 2: [2]}
    assert len(set(test.text)) == 3
    assert (cache_root / "shapes" / "stills" / "generated.json").is_file()


def test_lavis_loads_the_clips(cache_root):
    datasets = builder("shapes_retrieval", num_train=3, num_val=2, num_test=2).build_datasets()
    assert isinstance(datasets["train"], retrieval_datasets.VideoRetrievalDataset)
    assert isinstance(datasets["val"], retrieval_datasets.VideoRetrievalEvalDataset)
    assert {split: len(dataset) for split, dataset in datasets.items()} == {
        "train": 6,
        "val": 2,
        "test": 2,
    }
    train = datasets["train"]
    assert [train[i]["image_id"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert decord_length(train[5]["video"]) == 16

    test = datasets["test"]
    assert decord_length(test[1]["video"]) == 16
    assert test.txt2img == {0: 0, 1: 1}
    assert isinstance(test.text[0], str)
    assert (cache_root / "shapes" / "clips" / "generated.json").is_file()


def test_builder_refuses_an_unknown_generate_key(cache_root):
    with pytest.raises(ValueError, match="num_clips"):
        builder("shapes_retrieval", num_clips=3).build_datasets()
    assert list(cache_root.iterdir()) == []


def test_builder_follows_moved_storage_and_refuses_scattered_storage(cache_root):
    moved = builder("shapes_image_retrieval", num_train=1, num_val=1, num_test=1)
    info = moved.config.build_info
    info.images.storage = str(cache_root / "elsewhere" / "images")
    with pytest.raises(ValueError, match=r"annotations\.train\.storage"):
        moved.build_datasets()
    for split in info.annotations:
        info.annotations[split].storage = f"elsewhere/annotations/{split}.json"
    assert len(moved.build_datasets()["train"]) == 1


def test_an_encoder_that_does_not_open_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: -1)
    with pytest.raises(RuntimeError, match="test.mp4"):
        shapes._write_mp4(tmp_path / "missing" / "test.mp4", np.zeros((1, 8, 8, 3), np.uint8), 8)
