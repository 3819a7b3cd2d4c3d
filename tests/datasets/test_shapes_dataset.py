"""The embedded data set: its contents, its layout, and that it never passes off stale files."""

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import cv2
import decord
import lavis  # noqa: F401  (populates the registry)
import numpy as np
import pytest
from lavis.common.registry import registry
from lavis.datasets.datasets import (
    caption_datasets,
    retrieval_datasets,
    video_caption_datasets,
    video_vqa_datasets,
)
from lavis.processors import load_processor
from omegaconf import OmegaConf
from PIL import Image
from transformers import BertTokenizer

import lavis_uniadapter
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.image_qa import ImageQADataset
from lavis_uniadapter.datasets.shapes import drawing, generation
from lavis_uniadapter.datasets.shapes.contents import (
    ANSWERS,
    CLIP_TEMPLATES,
    COLOURS,
    POSITIONS,
    QUESTIONS,
    SHAPES,
    SIZES,
    STILL_TEMPLATES,
    deal_contents,
)
from lavis_uniadapter.datasets.shapes.contents import (
    CLIPS as CLIPS_KIND,
)
from lavis_uniadapter.datasets.shapes.contents import (
    STILLS as STILLS_KIND,
)
from lavis_uniadapter.datasets.shapes.generation import ensure_generated, kind_of

PACKAGE = Path(lavis_uniadapter.__file__).parent
TOKENIZER = PACKAGE / "configs" / "tokenizers" / "shapes"
SPLITS = ("train", "val", "test")
TRAIN_CONTENTS = 176 * len(SIZES)  # 576 combinations less the 100 of val and the 300 of test
STILLS = Stills(num_train=TRAIN_CONTENTS + 20, num_val=12, num_test=12)
CLIPS = Clips(num_train=12, num_val=5, num_test=16)
# Fractions of the width and height, from the upper left.
PLACES = {
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the centre": (0.5, 0.5),
    "at the top left": (0.25, 0.25),
    "at the top right": (0.75, 0.25),
    "at the bottom left": (0.25, 0.75),
    "at the bottom right": (0.75, 0.75),
}
CONFIGS = [Stills, Clips]


def replace(config, **changes):
    return config.model_copy(update=changes)


KINDS = [
    pytest.param(replace(STILLS, num_train=5, num_val=2, num_test=2), id="stills"),
    pytest.param(replace(CLIPS, num_train=2, num_val=1, num_test=2), id="clips"),
]


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "stills"
    ensure_generated(STILLS, folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "clips"
    ensure_generated(CLIPS, folder)
    return folder


def records(folder, split, task=""):
    """Records of retrieval, or of the task "cap_" or "qa_"."""
    return json.loads((folder / "annotations" / f"{task}{split}.json").read_text())


def file_name(record):
    return record["image"] if "image" in record else record["video"]


def decoded(path):
    """RGB frames, int of shape (frames, height, width, 3)."""
    # LAVIS makes decord return torch tensors.
    return decord.VideoReader(str(path)).get_batch(range(decord_length(path))).numpy().astype(int)


def decord_length(path):
    return len(decord.VideoReader(str(path)))


def content(record):
    """(colour, shape, position, size) of the one object that a record describes."""
    (thing,) = record["objects"]
    return tuple(thing[key] for key in ("colour", "shape", "position", "size"))


def combinations(config, split):
    return {dealt[:3] for dealt in deal_contents(config)[split]}


def near(picture, colour):
    """Which pixels have about this colour."""
    return np.linalg.norm(picture - np.array(drawing.RGB[colour]), axis=-1) < 60


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


@pytest.mark.parametrize("config", KINDS)
def test_same_seed_gives_the_same_files(config, tmp_path):
    ensure_generated(config, tmp_path / "one")
    ensure_generated(config, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("config", KINDS)
def test_another_seed_gives_other_files(config, tmp_path):
    ensure_generated(config, tmp_path / "one")
    ensure_generated(replace(config, seed=1), tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] == two[name]] == ["qa_ans2label.json"]


@pytest.mark.parametrize("config", KINDS)
def test_a_changed_count_leaves_the_other_items_alone(config, tmp_path):
    ensure_generated(config, tmp_path / "one")
    ensure_generated(replace(config, num_train=config.num_train + 1, num_val=3), tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    grown = {f"{task}{split}.json" for task in ("", "cap_", "qa_") for split in ("train", "val")}
    assert {name for name in one if one[name] != two[name]} == {"generated.json", *grown}


@pytest.mark.parametrize("config", KINDS)
def test_what_is_asked_changes_nothing_else(config, tmp_path):
    ensure_generated(replace(config, questions_per_train_item=1), tmp_path / "one")
    ensure_generated(replace(config, questions_per_train_item=3), tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} == {"generated.json", "qa_train.json"}


DRAWN_EVER_SINCE = [
    pytest.param(
        *KINDS[0].values,
        "badd944d2f9c10fe",
        [(108.6, 96.3, 100.6), (102.6, 95.1, 96.4), (107.3, 96.2, 99.7), (102.4, 94.9, 96.6)],
        id="stills",
    ),
    pytest.param(
        *KINDS[1].values,
        "e79f263942b4aec5",
        [(68.7, 62.9, 55.9), (69.6, 64.8, 57.5), (80.6, 73.5, 67.3), (70.3, 65.0, 57.9)],
        id="clips",
    ),
]


@pytest.mark.parametrize(("config", "annotations", "quadrants"), DRAWN_EVER_SINCE)
def test_seed_0_gives_the_pictures_and_captions_that_it_always_gave(
    config, annotations, quadrants, tmp_path
):
    ensure_generated(config, tmp_path / "set")
    # An item's caption is its last draw, so these files tell of every draw for a picture.
    texts = [(tmp_path / "set" / "annotations" / f"{split}.json").read_bytes() for split in SPLITS]
    assert hashlib.sha256(b"".join(texts)).hexdigest()[:16] == annotations

    # No hash of pixels, in which builds of OpenCV and FFmpeg may differ by one.
    path = tmp_path / "set" / kind_of(config).visual_folder / kind_of(config).file_name("train", 1)
    picture = decoded(path).mean(axis=0) if path.suffix == ".mp4" else np.asarray(Image.open(path))
    means = picture.reshape(2, 32, 2, 32, 3).mean(axis=(1, 3)).reshape(4, 3)
    np.testing.assert_allclose(means, quadrants, atol=0.5)


def test_every_item_has_a_random_source_of_its_own():
    draws = {
        kind.rng(seed, split, index, *use).random()
        for kind in (STILLS_KIND, CLIPS_KIND)
        for seed in (0, 1)
        for use in ((), (1,))
        for split in SPLITS
        for index in (0, 1)
    }
    assert len(draws) == 2 * 2 * 2 * 3 * 2


# Splits


@pytest.mark.parametrize("seed", range(3))
def test_no_combination_is_in_two_splits_of_stills_or_clips(seed):
    configs = [config_cls(seed=seed) for config_cls in CONFIGS]
    shown = {
        split: set.union(*(combinations(config, split) for config in configs))
        for split in ("train", "val", "test")
    }
    assert {split: len(found) for split, found in shown.items()} == {
        "train": 176,
        "val": 100,
        "test": 300,
    }
    assert not shown["train"] & shown["val"]
    assert not shown["train"] & shown["test"]
    assert not shown["val"] & shown["test"]


def test_the_split_of_a_combination_depends_on_the_seed_but_not_on_the_counts():
    few = Clips(num_train=9, num_val=7, num_test=5)
    for split in ("train", "val", "test"):
        dealt = deal_contents(few)[split]
        assert dealt == deal_contents(Stills())[split][: getattr(few, f"num_{split}")]
        assert combinations(Clips(seed=1), split) != combinations(Clips(), split)


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_as_many_items_are_dealt_as_configured(config_cls):
    dealt = deal_contents(config_cls(num_train=800, num_val=3, num_test=4))
    assert {split: len(items) for split, items in dealt.items()} == {
        "train": 800,
        "val": 3,
        "test": 4,
    }
    assert len(set(dealt["train"][:TRAIN_CONTENTS])) == TRAIN_CONTENTS
    assert dealt["train"][TRAIN_CONTENTS:] == dealt["train"][: 800 - TRAIN_CONTENTS]


@pytest.mark.parametrize("seed", range(5))
def test_every_attribute_value_occurs_early_in_training(seed):
    train = deal_contents(Stills(seed=seed))["train"][:100]
    colours, forms, positions, sizes = map(set, zip(*train, strict=True))
    assert (colours, forms) == (set(COLOURS), set(SHAPES))
    assert (positions, sizes) == (set(POSITIONS), set(SIZES))


def limit(config_cls, name: str) -> int:
    """The largest value that the schema allows."""
    return next(m.le for m in config_cls.model_fields[name].metadata if hasattr(m, "le"))


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_the_limits_are_what_there_is_to_choose_from(config_cls):
    assert limit(config_cls, "questions_per_train_item") == len(QUESTIONS)
    assert limit(Clips, "captions_per_train_clip") == len(CLIP_TEMPLATES)


@pytest.mark.parametrize("config_cls", CONFIGS)
@pytest.mark.parametrize("split", ["val", "test"])
def test_every_item_of_an_evaluation_split_is_unique(config_cls, split):
    most = limit(config_cls, f"num_{split}")
    dealt = deal_contents(config_cls(**{f"num_{split}": most}))[split]
    assert len(set(dealt)) == len(dealt) == most == {"val": 200, "test": 600}[split]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_annotations_describe_what_was_dealt(stills, clips, split):
    shown = [content(record) for record in records(stills, split)]
    assert shown == deal_contents(STILLS)[split]

    by_file = {}
    for record in records(clips, split):
        by_file.setdefault(record["video"], set()).add(content(record))
    assert list(by_file.values()) == [{dealt} for dealt in deal_contents(CLIPS)[split]]


def test_training_stills_share_an_image_id_exactly_if_they_show_the_same(stills):
    train = records(stills, "train")
    ids = [record["image_id"] for record in train]
    assert len({*ids}) == TRAIN_CONTENTS < len(train)
    assert len({content(record) for record in train}) == TRAIN_CONTENTS
    assert len({(record["image_id"], content(record)) for record in train}) == TRAIN_CONTENTS
    pictures = {(stills / "images" / record["image"]).read_bytes() for record in train}
    assert len(pictures) == len(train)


# Pictures


def test_stills_show_the_colour_at_the_place_and_in_the_size_of_the_annotation(stills):
    areas = {size: [] for size in SIZES}
    for record in records(stills, "train"):
        (thing,) = record["objects"]
        with Image.open(stills / "images" / record["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))
            visible = near(np.asarray(image).astype(int), thing["colour"])
        centroid = np.argwhere(visible).mean(axis=0)[::-1] / 64
        assert np.abs(centroid - PLACES[POSITIONS[thing["position"]]]).max() < 0.1, record
        areas[thing["size"]].append(np.ptp(np.argwhere(visible), axis=0).max())
    assert max(areas["small"]) < min(areas["large"])


def test_clips_decode_to_the_configured_frames(clips, tmp_path):
    for split in ("train", "val", "test"):
        for record in records(clips, split):
            assert decoded(clips / "videos" / record["video"]).shape == (16, 64, 64, 3)

    other = Clips(num_train=1, num_val=1, num_test=1, num_frames=9, image_size=96, fps=5)
    ensure_generated(other, tmp_path / "clips")
    path = tmp_path / "clips" / "videos" / "test_00000.mp4"
    assert decoded(path).shape == (9, 96, 96, 3)
    assert decord.VideoReader(str(path)).get_avg_fps() == pytest.approx(5)


def test_the_object_of_a_clip_is_visible_in_exactly_the_frames_of_the_annotation(clips):
    for record in (record for split in ("train", "test") for record in records(clips, split)):
        frames = decoded(clips / "videos" / record["video"])
        (thing,) = record["objects"]
        pixels = near(frames, thing["colour"]).sum(axis=(1, 2))
        assert pixels[thing["frames"]].min() > 20, record
        assert np.delete(pixels, thing["frames"]).max() < 3, record


def test_the_object_of_a_clip_has_the_place_and_the_size_of_the_annotation(clips):
    extents = {size: [] for size in SIZES}
    for record in records(clips, "train") + records(clips, "test"):
        frames = decoded(clips / "videos" / record["video"])
        (thing,) = record["objects"]
        place = PLACES[POSITIONS[thing["position"]]]
        for index in thing["frames"]:
            visible = np.argwhere(near(frames[index], thing["colour"]))
            offset = visible.mean(axis=0)[::-1] / 64 - place
            assert np.abs(offset).max() < 0.1, (record, index)
            extents[thing["size"]].append(np.ptp(visible, axis=0).max())
    assert max(extents["small"]) < min(extents["large"])


@pytest.mark.parametrize(("visible", "starts"), [(3, {0, 1, 2}), (5, {0})])
def test_an_object_is_visible_in_one_run_anywhere_in_its_clip(tmp_path, visible, starts):
    config = Clips(image_size=32, num_train=30, num_frames=5, visible_frames=visible)
    ensure_generated(config, tmp_path / "clips")
    found = set()
    for record in records(tmp_path / "clips", "train"):
        (thing,) = record["objects"]
        first = thing["frames"][0]
        assert thing["frames"] == list(range(first, first + visible))
        found.add(first)
    assert found == starts


def test_distractors_are_grey_and_never_beside_a_described_object(tmp_path):
    config = replace(CLIPS, noise=0.0, distractors=0)
    ensure_generated(config, tmp_path / "bare")
    ensure_generated(replace(config, distractors=6), tmp_path / "full")

    def grey_pixels(folder, record):
        frames = decoded(tmp_path / folder / "videos" / record["video"])
        grey = (frames.min(axis=-1) > 130) & (np.ptp(frames, axis=-1) < 25)
        return grey.sum(axis=(1, 2))

    for record in records(tmp_path / "full", "test"):
        pixels = grey_pixels("full", record)
        described = record["objects"][0]["frames"]
        assert pixels[described].max() < 20, record  # some at the object's edge, by the codec
        assert np.delete(pixels, described).max() > 40, record
    for record in records(tmp_path / "bare", "test"):
        assert grey_pixels("bare", record).max() < 20, record


def test_backgrounds_of_stills_are_plain_and_range_from_dark_to_light(tmp_path):
    ensure_generated(Stills(num_train=100, noise=0.0), tmp_path / "stills")
    corners = []
    for record in records(tmp_path / "stills", "train"):
        path = tmp_path / "stills" / "images" / record["image"]
        with Image.open(path) as image:
            picture = np.asarray(image).astype(int)
        if " " in record["objects"][0]["position"]:
            continue  # only objects at a corner, such as the top left, reach the corners
        ground = np.stack([picture[:8, :8], picture[-8:, :8], picture[:8, -8:], picture[-8:, -8:]])
        assert np.ptp(ground.reshape(-1, 3), axis=0).max() == 0, path
        assert np.ptp(ground[0, 0, 0]) <= 17, path  # hardly coloured
        corners.append(ground.mean())
    assert min(corners) < 70 and max(corners) > 210
    assert np.histogram(corners, bins=4, range=(30, 250))[0].min() > 0


# Captions


def test_captions_name_what_is_shown(stills, clips):
    for folder in (stills, clips):
        for record in records(folder, "train"):
            colour, shape, position, size = content(record)
            assert f"a {size} {colour} {shape}" in record["caption"], record
            assert POSITIONS[position] in record["caption"], record


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_captions_all_have_the_same_wording(stills, clips, split):
    for folder, verb in ((stills, ""), (clips, "appears ")):
        for record in records(folder, split):
            colour, shape, position, size = content(record)
            place = POSITIONS[position]
            assert record["caption"] == [f"a {size} {colour} {shape} {verb}{place}"]


def test_training_wordings_vary_and_the_two_of_a_clip_differ(stills, clips):
    starts = {record["caption"].split()[0] for record in records(stills, "train")}
    assert {"there", "the", "a"} <= starts
    captions = {}
    for record in records(clips, "train"):
        captions.setdefault(record["video"], set()).add(record["caption"])
    assert [len(wordings) for wordings in captions.values()] == [2] * CLIPS.num_train
    starts = {caption.split()[0] for wordings in captions.values() for caption in wordings}
    assert {"for", "the", "someone"} <= starts


def wording(caption, content):
    """A caption with the thing and the place of a content cut out."""
    colour, shape, position, size = content
    thing, place = f"a {size} {colour} {shape}", POSITIONS[position]
    assert thing in caption and place in caption
    return caption.replace(thing, "THING").replace(place, "PLACE")


@pytest.mark.parametrize("split", SPLITS)
def test_captioning_numbers_the_items_and_trains_on_the_captions_of_retrieval(stills, clips, split):
    for folder, config in ((stills, STILLS), (clips, CLIPS)):
        retrieval, captioning = records(folder, split), records(folder, split, "cap_")
        names = [file_name(record) for record in captioning]
        assert names == [file_name(record) for record in retrieval]
        if split == "train":
            captions = [record["caption"] for record in captioning]
            assert captions == [record["caption"] for record in retrieval]
        numbers = dict(
            zip(dict.fromkeys(names), range(getattr(config, f"num_{split}")), strict=True)
        )
        assert [record["image_id"] for record in captioning] == [numbers[name] for name in names]


@pytest.mark.parametrize("split", ["val", "test"])
def test_captioning_is_evaluated_on_every_wording_of_training(stills, clips, split):
    for folder in (stills, clips):
        trained = {
            wording(record["caption"], content(record)) for record in records(folder, "train")
        }
        assert len(trained) == 5
        captioning, retrieval = records(folder, split, "cap_"), records(folder, split)
        for record, described in zip(captioning, retrieval, strict=True):
            right = [wording(caption, content(described)) for caption in record["caption"]]
            assert len(right) == 5
            assert set(right) == trained
            assert record["caption"][:1] == described["caption"]


# Questions


def questions_about(content):
    """Every question about a content, with its right answer."""
    colour, shape, position, size = content
    return {
        f"what colour is the {shape}?": colour,
        f"what {colour} shape can be seen?": shape,
        f"where is the {colour} shape?": position,
        f"how big is the {colour} shape?": size,
    }


def asked(folder, split):
    """Questions with their answers, by file name."""
    found = {}
    for record in records(folder, split, "qa_"):
        found.setdefault(file_name(record), []).append((record["question"], record["answer"]))
    return found


def shown(folder, split):
    """Contents by file name, from the `objects` of the retrieval records."""
    return {file_name(record): content(record) for record in records(folder, split)}


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_evaluation_item_is_asked_about_every_attribute_it_shows(stills, clips, split):
    for folder in (stills, clips):
        assert asked(folder, split) == {
            name: list(questions_about(content).items())
            for name, content in shown(folder, split).items()
        }


def test_training_items_are_asked_as_much_as_configured_and_answered_truly(stills, clips):
    for folder, number in ((stills, 2), (clips, 4)):
        questions, contents_by_name = asked(folder, "train"), shown(folder, "train")
        assert questions.keys() == contents_by_name.keys()
        for name, pairs in questions.items():
            assert len(dict(pairs)) == len(pairs) == number
            assert dict(pairs).items() <= questions_about(contents_by_name[name]).items()


def test_training_asks_about_all_attributes_alike(stills):
    starts = Counter(
        " ".join(record["question"].split()[:2]) for record in records(stills, "train", "qa_")
    )
    about_shapes = sum(starts.pop(f"what {colour}") for colour in COLOURS)
    assert starts.keys() == {"what colour", "where is", "how big"}
    assert sum(starts.values()) + about_shapes == 2 * STILLS.num_train
    assert min(*starts.values(), about_shapes) > 0.4 * STILLS.num_train


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_numbered_and_do_not_give_their_answers_away(stills, clips, split):
    for folder in (stills, clips):
        questions = records(folder, split, "qa_")
        assert len({record["question_id"] for record in questions}) == len(questions)
        for record in questions:
            assert isinstance(record["question_id"], int)
            assert record["answer"] not in record["question"].rstrip("?").split()


def test_answers_are_labelled_from_zero_and_each_is_trained(stills, clips):
    labels = json.loads((stills / "annotations" / "qa_ans2label.json").read_text())
    assert sorted(labels.values()) == list(range(8 + 8 + 9 + 2))
    assert labels == json.loads((clips / "annotations" / "qa_ans2label.json").read_text())
    answers = {
        split: {
            record["answer"]
            for folder in (stills, clips)
            for record in records(folder, split, "qa_")
        }
        for split in SPLITS
    }
    assert answers["train"] == set(labels)
    assert answers["val"] | answers["test"] <= set(labels)


# Vocabulary


def words(*texts):
    """The words of texts and templates."""
    plain = " ".join(texts)
    for field in ("{thing}", "{place}", "{colour}", "{shape}", "?"):
        plain = plain.replace(field, " ")
    return set(plain.split())


CAPTION_WORDS = words(
    *(*STILL_TEMPLATES, *CLIP_TEMPLATES, *POSITIONS.values(), *COLOURS, *SHAPES, *SIZES, "a", "an")
)
QUESTION_WORDS = words(*QUESTIONS.values(), *ANSWERS)


def test_the_words_of_questions_are_behind_those_of_captions():
    tokens = (TOKENIZER / "vocab.txt").read_text().splitlines()
    assert len(tokens) == len(set(tokens))
    assert (tokens[5], tokens[108]) == ("a", "~")
    assert tokens[109:158] == sorted(CAPTION_WORDS - {"a"})
    assert tokens[158:] == sorted(QUESTION_WORDS - CAPTION_WORDS)


def test_the_text_encoder_has_room_for_the_vocabulary_and_the_two_tokens_of_blip():
    med = json.loads((PACKAGE / "configs" / "models" / "shapes_med_config.json").read_text())
    tokens = (TOKENIZER / "vocab.txt").read_text().splitlines()
    assert med["vocab_size"] >= len(tokens) + 2


def test_every_word_of_captions_questions_and_answers_is_one_token(stills, clips):
    tokenizer = BertTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]"]) == [0, 1]
    captions, questions, answers = set(), set(), set()
    for folder, split in itertools.product((stills, clips), SPLITS):
        for record in records(folder, split) + records(folder, split, "cap_"):
            captions.update([record["caption"]] if split == "train" else record["caption"])
        for record in records(folder, split, "qa_"):
            questions.add(record["question"])
            answers.add(record["answer"])

    as_caption, as_question = load_processor("blip_caption"), load_processor("blip_question")
    for caption in (*captions, *answers):
        assert tokenizer.tokenize(as_caption(caption)) == caption.split()
        assert tokenizer.unk_token_id not in tokenizer(caption)["input_ids"]
    for question in questions:
        expected = [*question.removesuffix("?").split(), "?"]
        assert tokenizer.tokenize(as_question(question)) == expected
    assert words(*captions) <= CAPTION_WORDS and words(*questions, *answers) <= QUESTION_WORDS


def test_other_text_is_lower_cased_and_never_unknown():
    tokenizer = BertTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    assert tokenizer.tokenize("A RED Zoo, 7x!") == ["a", "red", "z", "##o", "##o"] + [
        *(",", "7", "##x", "!"),
    ]


# Configuration


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_an_unknown_key_is_named_with_the_known_ones(config_cls):
    with pytest.raises(ConfigError, match=r"'generate\.visible_framez'") as error:
        config_cls.read({"seed": 3, "visible_framez": 2}, "generate")
    assert ("visible_frames" in str(error.value)) == (config_cls is Clips)


@pytest.mark.parametrize(
    ("config_cls", "name", "value"),
    [
        (Stills, "num_test", 601),
        (Stills, "num_train", 0),
        (Stills, "seed", -1),
        (Stills, "seed", "7"),
        (Stills, "noise", -1.0),
        (Clips, "num_val", 201),
        (Clips, "image_size", 48),
        (Clips, "visible_frames", 17),
        (Clips, "visible_frames", 0),
        (Clips, "captions_per_train_clip", 6),
        (Clips, "questions_per_train_item", 5),
        (Stills, "questions_per_train_item", 0),
        (Clips, "distractors", True),
    ],
)
def test_a_value_out_of_range_is_named(config_cls, name, value):
    with pytest.raises(ConfigError, match=rf"generate\.{name} "):
        config_cls.read({name: value}, "generate")


# Finished or not


@pytest.mark.parametrize("config", KINDS)
def test_a_finished_set_is_not_drawn_again(config, tmp_path, monkeypatch):
    ensure_generated(config, tmp_path / "set")
    monkeypatch.setattr(drawing, "_object_mask", None)
    ensure_generated(config, tmp_path / "set")


@pytest.mark.parametrize("config", KINDS)
def test_a_set_of_another_configuration_is_refused(config, tmp_path):
    folder = tmp_path / "set"
    ensure_generated(config, folder)
    with pytest.raises(FileExistsError, match="seed: 0 there, 1 wanted") as error:
        ensure_generated(replace(config, seed=1), folder)
    assert str(folder) in str(error.value)


def test_an_interrupted_generation_is_not_taken_as_finished(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    config = replace(CLIPS, num_train=2, num_val=1, num_test=1)
    write, written = generation.write_mp4, []

    def write_three(path, frames, fps):
        assert not folder.exists()  # so that a kill at any time leaves no such folder
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, frames, fps)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "write_mp4", write_three)
        with pytest.raises(KeyboardInterrupt):
            ensure_generated(config, folder)
    assert list(tmp_path.iterdir()) == []

    ensure_generated(config, folder)
    assert len(list((folder / "videos").iterdir())) == 4


def test_a_folder_of_something_else_is_neither_used_nor_touched(tmp_path):
    folder = tmp_path / "set"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "train.json").write_text("[]")
    with pytest.raises(FileExistsError, match="generated.json is missing"):
        ensure_generated(STILLS, folder)
    assert [path.name for path in folder.rglob("*")] == ["annotations", "train.json"]


def test_a_faster_process_wins(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    config = replace(STILLS, num_train=2, num_val=1, num_test=1)
    rename = generation.os.rename

    def rename_second(source, target):
        monkeypatch.setattr(generation.os, "rename", rename)
        ensure_generated(config, folder)
        rename(source, target)

    monkeypatch.setattr(generation.os, "rename", rename_second)
    ensure_generated(config, folder)
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


@pytest.mark.parametrize("task", ["retrieval", "qa", "caption"])
@pytest.mark.parametrize(
    ("prefix", "config_cls", "visual_storage"),
    [
        ("shapes_image", Stills, {"images": {"storage": "shapes/stills/images"}}),
        ("shapes", Clips, {"videos": {"storage": "shapes/clips/videos"}}),
    ],
)
def test_the_default_configuration_files_of_all_tasks_say_the_same(
    prefix, task, config_cls, visual_storage
):
    made = builder(f"{prefix}_{task}")
    config = OmegaConf.to_container(made.config)
    # the schema alone has the options, so all tasks draw the same data
    assert made.options_cls is config_cls and not config.get("generate")
    del config["build_info"]["annotations"]
    assert config["build_info"] == visual_storage


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


def test_lavis_numbers_the_training_stills_by_content(cache_root):
    repeated = builder("shapes_image_retrieval", num_train=TRAIN_CONTENTS + 2, num_val=1)
    train = repeated.build_datasets()["train"]
    ids = [train[index]["image_id"] for index in range(len(train))]
    assert ids == [*range(TRAIN_CONTENTS), 0, 1]


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


VISUAL_SHAPES = {"image": (3, 64, 64), "video": (3, 2, 64, 64)}


def build_with_processors(name, text_processor):
    """LAVIS's datasets of two, one and three items, their clips cut down to two frames."""
    unprocessed = builder(name, num_train=2, num_val=1, num_test=3)
    visual = {"name": "blip_image_eval", "image_size": 64}
    if unprocessed.data_type == "videos":
        visual = {"name": "blip_video_eval", "image_size": 64, "n_frms": 2}
    text = {"name": text_processor}
    unprocessed.config.vis_processor = {"train": visual, "eval": visual}
    unprocessed.config.text_processor = {"train": text, "eval": text}
    return unprocessed.build_datasets()


def whole(dataset):
    """All items as one batch."""
    return dataset.collater([dataset[index] for index in range(len(dataset))])


@pytest.mark.parametrize(
    ("name", "visual_key", "dataset_cls", "train_questions"),
    [
        ("shapes_image_qa", "image", ImageQADataset, 2 * 2),
        ("shapes_qa", "video", video_vqa_datasets.VideoQADataset, 2 * 4),
    ],
)
def test_lavis_loads_the_questions(cache_root, name, visual_key, dataset_cls, train_questions):
    datasets = build_with_processors(name, "blip_question")
    assert {split: (type(dataset), len(dataset)) for split, dataset in datasets.items()} == {
        "train": (dataset_cls, train_questions),
        "val": (dataset_cls, 4),
        "test": (dataset_cls, 12),
    }
    for dataset in datasets.values():
        batch, annotation = whole(dataset), dataset.annotation
        assert batch[visual_key].shape == (len(dataset), *VISUAL_SHAPES[visual_key])
        assert batch["text_input"] == [record["question"] for record in annotation]
        assert batch["question_id"].tolist() == [record["question_id"] for record in annotation]
        answers = {label: answer for answer, label in dataset.class_labels.items()}
        assert len(answers) == len(dataset.class_labels) == 27
        given = [answers[label] for label in batch["answers"].tolist()]
        assert given == [record["answer"] for record in annotation]


@pytest.mark.parametrize(
    ("name", "visual_key", "train_cls", "eval_cls", "train_ids"),
    [
        (
            *("shapes_image_caption", "image"),
            *(caption_datasets.CaptionDataset, caption_datasets.CaptionEvalDataset),
            [0, 1],
        ),
        (
            *("shapes_caption", "video"),
            *(
                video_caption_datasets.VideoCaptionDataset,
                video_caption_datasets.VideoCaptionEvalDataset,
            ),
            [0, 0, 1, 1],
        ),
    ],
)
def test_lavis_loads_the_captions(cache_root, name, visual_key, train_cls, eval_cls, train_ids):
    datasets = build_with_processors(name, "blip_caption")
    assert {split: (type(dataset), len(dataset)) for split, dataset in datasets.items()} == {
        "train": (train_cls, len(train_ids)),
        "val": (eval_cls, 1),
        "test": (eval_cls, 3),
    }
    train, test = whole(datasets["train"]), whole(datasets["test"])
    assert train[visual_key].shape == (len(train_ids), *VISUAL_SHAPES[visual_key])
    assert train["text_input"] == [record["caption"] for record in datasets["train"].annotation]
    assert train["image_id"].tolist() == train_ids
    assert test[visual_key].shape == (3, *VISUAL_SHAPES[visual_key])
    assert test["image_id"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("prefix", ["shapes_image", "shapes"])
def test_all_tasks_use_what_was_drawn_once(cache_root, monkeypatch, prefix):
    def build(task):
        return builder(f"{prefix}_{task}", num_train=2, num_val=1, num_test=1).build_datasets()

    build("qa")
    monkeypatch.setattr(drawing, "_object_mask", None)
    assert {task: len(build(task)["val"]) for task in ("retrieval", "qa", "caption")} == {
        "retrieval": 1,
        "qa": 4,
        "caption": 1,
    }


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


def test_builder_refuses_annotations_that_it_does_not_generate(cache_root):
    questions = builder("shapes_qa")
    questions.config.build_info.annotations.ans2label.storage = "shapes/clips/annotations/x.json"
    with pytest.raises(ConfigError, match=r"annotations\.ans2label\..*qa_ans2label\.json"):
        questions.build_datasets()

    captions = builder("shapes_caption")
    captions.config.build_info.annotations.tset = {"storage": "shapes/clips/annotations/x.json"}
    with pytest.raises(ConfigError, match=r"build_info\.annotations\.tset'. Did you mean 'test'"):
        captions.build_datasets()
    assert list(cache_root.iterdir()) == []


def test_an_encoder_that_does_not_open_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: -1)
    with pytest.raises(RuntimeError, match="test.mp4"):
        drawing.write_mp4(tmp_path / "missing" / "test.mp4", np.zeros((1, 8, 8, 3), np.uint8), 8)
