"""What the stills and clips show, and that it never changes."""

import hashlib

import cv2
import decord
import numpy as np
import pytest
from PIL import Image
from shapes_data import CLIPS, FEW, content, decoded, records, replace

from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.records import SPLITS
from lavis_uniadapter.datasets.shapes import drawing
from lavis_uniadapter.datasets.shapes.contents import POSITIONS, SIZES
from lavis_uniadapter.datasets.shapes.generation import ensure_generated, random_source

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


def near(picture, colour):
    """Which pixels have about this colour."""
    return np.linalg.norm(picture - np.array(drawing.RGB[colour]), axis=-1) < 60


def files(folder):
    """Everything that must not change: bytes of annotations and stills, frames of clips."""
    return {
        path.name: decoded(path).tobytes() if path.suffix == ".mp4" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def changed(tmp_path, one, two):
    """The names of the files in which two configurations' data differ."""
    ensure_generated(one, tmp_path / "one")
    ensure_generated(two, tmp_path / "two")
    before, after = files(tmp_path / "one"), files(tmp_path / "two")
    return {name for name in before if before[name] != after[name]}, set(before)


# Determinism


@pytest.mark.parametrize("config", FEW, ids=["stills", "clips"])
def test_only_what_an_option_is_about_changes(config, tmp_path):
    assert changed(tmp_path / "same", config, config)[0] == set()
    differing, every = changed(tmp_path / "seed", config, replace(config, seed=1))
    assert every - differing == {"qa_ans2label.json"}
    more = replace(config, num_train=config.num_train + 1, num_val=3)
    grown = {f"{task}{split}.json" for task in ("", "cap_", "qa_") for split in ("train", "val")}
    assert changed(tmp_path / "count", config, more)[0] == {"generated.json", *grown}
    one, three = (replace(config, questions_per_train_item=number) for number in (1, 3))
    assert changed(tmp_path / "ask", one, three)[0] == {"generated.json", "qa_train.json"}


@pytest.mark.parametrize(
    ("config", "picture", "annotations", "quadrants"),
    [
        (
            FEW[0],
            "images/train_00001.png",
            "badd944d2f9c10fe",
            [(108.6, 96.3, 100.6), (102.6, 95.1, 96.4), (107.3, 96.2, 99.7), (102.4, 94.9, 96.6)],
        ),
        (
            FEW[1],
            "videos/train_00001.mp4",
            "e79f263942b4aec5",
            [(68.7, 62.9, 55.9), (69.6, 64.8, 57.5), (80.6, 73.5, 67.3), (70.3, 65.0, 57.9)],
        ),
    ],
    ids=["stills", "clips"],
)
def test_seed_0_gives_the_pictures_and_captions_that_it_always_gave(
    config, picture, annotations, quadrants, tmp_path
):
    ensure_generated(config, tmp_path / "set")
    # An item's caption is its last draw, so these files depend on every draw for a picture.
    texts = [(tmp_path / "set" / "annotations" / f"{split}.json").read_bytes() for split in SPLITS]
    assert hashlib.sha256(b"".join(texts)).hexdigest()[:16] == annotations

    # No hash of pixels, in which builds of OpenCV and FFmpeg may differ by one.
    path = tmp_path / "set" / picture
    pixels = decoded(path).mean(axis=0) if path.suffix == ".mp4" else np.asarray(Image.open(path))
    means = pixels.reshape(2, 32, 2, 32, 3).mean(axis=(1, 3)).reshape(4, 3)
    np.testing.assert_allclose(means, quadrants, atol=0.5)


def test_every_item_has_a_random_source_of_its_own():
    draws = {
        random_source(options_cls(seed=seed), split, index, *use).random()
        for options_cls in (Stills, Clips)
        for seed in (0, 1)
        for use in ((), (1,))
        for split in SPLITS
        for index in (0, 1)
    }
    assert len(draws) == 2 * 2 * 2 * 3 * 2


# Stills


def test_stills_show_the_colour_at_the_place_and_in_the_size_of_the_annotation(stills):
    areas = {size: [] for size in SIZES}
    for record in records(stills, "train"):
        colour, _, position, size = content(record)
        with Image.open(stills / "images" / record["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))
            visible = np.argwhere(near(np.asarray(image).astype(int), colour))
        centroid = visible.mean(axis=0)[::-1] / 64
        assert np.abs(centroid - PLACES[POSITIONS[position]]).max() < 0.1, record
        areas[size].append(np.ptp(visible, axis=0).max())
    assert max(areas["small"]) < min(areas["large"])


def test_backgrounds_of_stills_are_plain_and_range_from_dark_to_light(tmp_path):
    ensure_generated(Stills(num_train=100, num_val=1, num_test=1, noise=0.0), tmp_path / "stills")
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


# Clips


def test_clips_have_the_configured_frames(tmp_path):
    other = Clips(num_train=1, num_val=1, num_test=1, num_frames=9, image_size=96, fps=5)
    ensure_generated(other, tmp_path / "clips")
    path = tmp_path / "clips" / "videos" / "test_00000.mp4"
    assert decoded(path).shape == (9, 96, 96, 3)
    assert decord.VideoReader(str(path)).get_avg_fps() == pytest.approx(5)


def test_the_object_of_a_clip_is_shown_as_the_annotation_says(clips):
    """In exactly its frames, at its place and in its size."""
    extents = {size: [] for size in SIZES}
    for record in (record for split in SPLITS for record in records(clips, split)):
        frames = decoded(clips / "videos" / record["video"])
        assert frames.shape == (16, 64, 64, 3)
        colour, _, position, size = content(record)
        described = record["objects"][0]["frames"]
        pixels = near(frames, colour).sum(axis=(1, 2))
        assert pixels[described].min() > 20, record
        assert np.delete(pixels, described).max() < 3, record
        for index in described:
            visible = np.argwhere(near(frames[index], colour))
            offset = visible.mean(axis=0)[::-1] / 64 - PLACES[POSITIONS[position]]
            assert np.abs(offset).max() < 0.1, (record, index)
            extents[size].append(np.ptp(visible, axis=0).max())
    assert max(extents["small"]) < min(extents["large"])


@pytest.mark.parametrize(("visible", "starts"), [(3, {0, 1, 2}), (5, {0})])
def test_an_object_is_visible_in_one_run_anywhere_in_its_clip(tmp_path, visible, starts):
    config = Clips(image_size=32, num_train=30, num_val=1, num_test=1, num_frames=5)
    ensure_generated(replace(config, visible_frames=visible), tmp_path / "clips")
    found = set()
    for record in records(tmp_path / "clips", "train"):
        frames = record["objects"][0]["frames"]
        assert frames == list(range(frames[0], frames[0] + visible))
        found.add(frames[0])
    assert found == starts


def test_distractors_are_grey_and_never_beside_a_described_object(tmp_path):
    config = replace(CLIPS, num_train=1, num_val=1, noise=0.0, distractors=0)
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
        assert grey_pixels("bare", record).max() < 20, record


def test_an_encoder_that_does_not_open_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: -1)
    with pytest.raises(RuntimeError, match="test.mp4"):
        drawing.write_mp4(tmp_path / "missing" / "test.mp4", np.zeros((1, 8, 8, 3), np.uint8), 8)
