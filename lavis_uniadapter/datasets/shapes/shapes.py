"""The embedded data set "shapes": stills and clips with captions and questions, from a seed.

Stills show one coloured shape on a plain background. Clips show one in a short run of frames, on a
blotched background; the other frames hold grey distractors, which no caption mentions and no
question asks about, or nothing.

A generated folder holds the visual files in ``images/`` or ``videos/``, ``generated.json``, which
records what it was drawn from, and in ``annotations/``, in LAVIS's layouts:

* ``{train,val,test}.json`` for retrieval. Their extra key ``objects`` tells what is visible, and in
  which frames.
* ``cap_{train,val,test}.json`` for captioning: in training the captions of retrieval, in evaluation
  a list of every wording.
* ``qa_{train,val,test}.json`` for question answering, and the answers' labels in
  ``qa_ans2label.json``.
"""

from __future__ import annotations

import itertools
import json
import os
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from lavis_uniadapter.common.schema.shapes import Clips, Stills

FORMAT_VERSION = 5
MARKER = "generated.json"
SPLITS = ("train", "val", "test")

# Each task's files in the folder ANNOTATIONS.
ANNOTATIONS = "annotations"
RETRIEVAL_FILES = {split: f"{split}.json" for split in SPLITS}
CAPTION_FILES = {split: f"cap_{split}.json" for split in SPLITS}
QUESTION_FILES = {split: f"qa_{split}.json" for split in SPLITS}
LABELS_FILE = "qa_ans2label.json"

COLOURS = {
    "red": (215, 30, 35),
    "green": (35, 165, 55),
    "blue": (35, 65, 220),
    "yellow": (245, 225, 35),
    "purple": (130, 35, 165),
    "orange": (245, 135, 15),
    "cyan": (35, 205, 220),
    "pink": (250, 130, 190),
}


def _regular_polygon(corners: int, radii: Sequence[float], first_angle: float) -> np.ndarray:
    """Corners at equal angles, their distances to the centre cycling through `radii`."""
    angles = first_angle + 2 * np.pi * np.arange(corners) / corners
    distances = np.resize(radii, corners)
    return np.stack([distances * np.cos(angles), distances * np.sin(angles)], axis=1)


_ARM = 0.34  # half the width of the cross's arms
_UP = -np.pi / 2

# Outlines in units of the object's radius, x to the right and y down. Several outlines of one
# shape are filled by the even-odd rule, which makes the hole of the ring.
SHAPES = {
    "circle": [_regular_polygon(48, [1.0], 0.0)],
    "square": [_regular_polygon(4, [1.2], np.pi / 4)],
    "triangle": [_regular_polygon(3, [1.2], _UP)],
    "star": [_regular_polygon(10, [1.2, 0.5], _UP)],
    "cross": [
        np.array(
            [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
            + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
        )
    ],
    "ring": [_regular_polygon(48, [1.05], 0.0), _regular_polygon(48, [0.6], 0.0)],
    "bar": [np.array([(-1.3, -0.4), (1.3, -0.4), (1.3, 0.4), (-1.3, 0.4)])],
    "diamond": [_regular_polygon(4, [1.35, 0.75], _UP)],
}

# Radii, centres and jitter are fractions of the image's side.
SIZES = {"small": 0.1, "large": 0.19}
JITTER = 0.04
CENTRES = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "centre": (0.5, 0.5),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
POSITION_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
    "top left": "at the top left",
    "top right": "at the top right",
    "bottom left": "at the bottom left",
    "bottom right": "at the bottom right",
}

# The first template of each list is the one of the evaluation splits.
STILL_TEMPLATES = (
    "{thing} {place}",
    "there is {thing} {place}",
    "{thing} can be seen {place}",
    "the picture shows {thing} {place}",
    "{place} there is {thing}",
)
CLIP_TEMPLATES = (
    "{thing} appears {place}",
    "for a moment {thing} comes up {place}",
    "{place} we watch {thing} come and go",
    "the clip briefly shows {thing} {place}",
    "someone holds up {thing} {place}",
)

# What is asked about each attribute of the coloured object; its value is the answer. None names
# both colour and shape: training shows each such pair in some places alone, which could be learnt
# instead of looking.
QUESTIONS = {
    "colour": "what colour is the {shape}?",
    "shape": "what {colour} shape can be seen?",
    "position": "where is the {colour} shape?",
    "size": "how big is the {colour} shape?",
}
ANSWERS = (*COLOURS, *SHAPES, *CENTRES, *SIZES)

# Combinations of colour, shape and position (of 576) kept for evaluation, whatever the counts.
RESERVED_COMBINATIONS = {"val": 100, "test": 300}

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class ShapesConfig(Stills):
    """What is drawn, and where; see ``common.schema.shapes``."""

    visual_folder: ClassVar[str]
    visual_key: ClassVar[str]  # of the annotation records, as LAVIS names it
    suffix: ClassVar[str]
    templates: ClassVar[Sequence[str]]
    _stream: ClassVar[int]

    def count(self, split: str) -> int:
        """Number of stills or clips in `split`."""
        return getattr(self, f"num_{split}")

    def file_name(self, split: str, index: int) -> str:
        """Name of one item's file in the visual folder."""
        return f"{split}_{index:05d}{self.suffix}"

    def rng(self, split: str, index: int) -> np.random.Generator:
        """The random source of one item; independent of all the counts."""
        return np.random.default_rng([self.seed, self._stream, SPLITS.index(split), index])

    def questions_rng(self, split: str, index: int) -> np.random.Generator:
        """The random source of one item's questions: what is asked changes no picture."""
        return np.random.default_rng([self.seed, self._stream, SPLITS.index(split), index, 1])

    def shuffling_rng(self) -> np.random.Generator:
        """The random source that deals contents out to the splits.

        The same for stills and clips: what clips are tested on, no training still shows.
        """
        return np.random.default_rng([self.seed, len(SPLITS)])


class StillsConfig(ShapesConfig):
    """Configuration of the stills."""

    visual_folder: ClassVar[str] = "images"
    visual_key: ClassVar[str] = "image"
    suffix: ClassVar[str] = ".png"
    templates: ClassVar[Sequence[str]] = STILL_TEMPLATES
    _stream: ClassVar[int] = 0


class ClipsConfig(Clips, ShapesConfig):
    """Configuration of the clips."""

    visual_folder: ClassVar[str] = "videos"
    visual_key: ClassVar[str] = "video"
    suffix: ClassVar[str] = ".mp4"
    templates: ClassVar[Sequence[str]] = CLIP_TEMPLATES
    _stream: ClassVar[int] = 1


class Content(NamedTuple):
    """What an item shows."""

    colour: str
    shape: str
    position: str
    size: str

    def caption(self, template: str) -> str:
        """What one of the caption templates says of it."""
        thing = _with_article(f"{self.size} {self.colour} {self.shape}")
        return template.format(thing=thing, place=POSITION_PHRASES[self.position])


# Draws an item into a folder and returns its records for retrieval.
ItemWriter = Callable[[Any, str, int, Content, Path], list]


def ensure_stills(config: StillsConfig, folder: Path) -> None:
    """Generate the stills into `folder`, unless they are there already.

    Raises:
        FileExistsError: `folder` holds something else, or stills of another configuration.
    """
    _ensure(config, folder, _write_still)


def ensure_clips(config: ClipsConfig, folder: Path) -> None:
    """Generate the clips into `folder`, unless they are there already.

    Raises:
        FileExistsError: `folder` holds something else, or clips of another configuration.
    """
    _ensure(config, folder, _write_clip)


def _ensure(config: ShapesConfig, folder: Path, write_item: ItemWriter) -> None:
    if _holds(config, folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Drawn next to its place and moved there in one step: a killed generation leaves no folder
    # that could be taken for a finished one.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workplace:
        unfinished = Path(workplace) / folder.name
        annotations = unfinished / ANNOTATIONS
        annotations.mkdir(parents=True)
        (unfinished / config.visual_folder).mkdir()
        contents = deal_contents(config)
        for split in SPLITS:
            retrieval, captions, questions = [], [], []
            progress = tqdm(contents[split], desc=f"shapes {config.visual_folder}, {split}")
            for index, content in enumerate(progress):
                written = write_item(config, split, index, content, unfinished)
                retrieval += written
                captions += _caption_records(config, split, index, content, written)
                questions += _question_records(config, split, index, content)
            _write_records(annotations / RETRIEVAL_FILES[split], retrieval)
            _write_records(annotations / CAPTION_FILES[split], captions)
            _write_records(annotations / QUESTION_FILES[split], questions)
        labels = {answer: label for label, answer in enumerate(ANSWERS)}
        (annotations / LABELS_FILE).write_text(json.dumps(labels, indent=1) + "\n")
        (unfinished / MARKER).write_text(json.dumps(_description(config), indent=1) + "\n")
        try:
            os.rename(unfinished, folder)
        except OSError:
            # Another process may have been faster; its result is as good as ours.
            if not _holds(config, folder):
                raise


def _write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f"[\n{lines}\n]\n")


def _description(config: ShapesConfig) -> dict[str, Any]:
    return {"format": FORMAT_VERSION, "kind": config.visual_folder, **config.model_dump()}


def _holds(config: ShapesConfig, folder: Path) -> bool:
    """Whether `folder` holds the finished set of `config`; False where there is no folder."""
    if not folder.exists():
        return False
    marker = folder / MARKER
    if not marker.is_file():
        raise FileExistsError(
            f"{folder} exists but holds no finished shapes data set ({MARKER} is missing). "
            "Delete or move that folder, or name another storage in the dataset's build_info."
        )
    found, wanted = json.loads(marker.read_text()), _description(config)
    differences = [
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} wanted"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise FileExistsError(
            f"{folder} holds a shapes data set of another configuration "
            f"({'; '.join(differences)}). Delete that folder to have it generated anew, or name "
            "another storage in the dataset's build_info."
        )
    return True


def deal_contents(config: ShapesConfig) -> dict[str, list[Content]]:
    """The (colour, shape, position, size) of every still or clip, by split.

    No (colour, shape, position) is in two splits, not even in one of the stills and another of
    the clips of the same seed; the evaluation splits repeat nothing.
    """
    rng = config.shuffling_rng()
    combinations = list(itertools.product(COLOURS, SHAPES, CENTRES))  # in the order of Content
    pools = _partition(combinations, RESERVED_COMBINATIONS, rng)
    contents = {}
    for split, pool in pools.items():
        # Shuffled after the product, so that the first items differ in every attribute.
        sized = _shuffled([Content(*kind, size) for kind in pool for size in SIZES], rng)
        contents[split] = _cycle(sized, config.count(split))
    return contents


T = TypeVar("T")


def _shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))]


def _partition(
    items: Sequence[T], reserved: Mapping[str, int], rng: np.random.Generator
) -> dict[str, list[T]]:
    """Deal `items` out: `reserved` of them to the named splits, the rest to training."""
    rest = iter(_shuffled(items, rng))
    pools = {split: list(itertools.islice(rest, size)) for split, size in reserved.items()}
    return {"train": list(rest), **pools}


def _cycle(pool: Sequence[T], count: int) -> list[T]:
    return list(itertools.islice(itertools.cycle(pool), count))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[rng.integers(len(options))]


def _write_still(
    config: StillsConfig, split: str, index: int, content: Content, folder: Path
) -> list[dict[str, Any]]:
    """Draw one still into `folder`; returns its records for retrieval."""
    rng = config.rng(split, index)
    colour, shape, position, size = content
    picture = _still_background(config, rng)
    mask = _object_mask(rng, config.image_size, shape, position, SIZES[size])
    picture = _paint(picture, mask, _jittered_colour(rng, colour))
    picture += rng.normal(0.0, config.noise, picture.shape)

    path = folder / config.visual_folder / config.file_name(split, index)
    Image.fromarray(_to_bytes(picture)).save(path)

    shown = [content._asdict()]
    if split == "train":
        caption = content.caption(_pick(rng, config.templates))
        # Stills that show the same share an id: a text matches all of them, and none of them may
        # be drawn as a negative of another.
        content_id = f"{size} {colour} {shape} {position}"
        return [{"image": path.name, "image_id": content_id, "caption": caption, "objects": shown}]
    caption = content.caption(config.templates[0])
    return [{"image": path.name, "caption": [caption], "objects": shown}]


def _write_clip(
    config: ClipsConfig, split: str, index: int, content: Content, folder: Path
) -> list[dict[str, Any]]:
    """Draw and encode one clip into `folder`; returns its records for retrieval."""
    rng = config.rng(split, index)
    start = int(rng.integers(config.num_frames - config.visible_frames + 1))
    frames = list(range(start, start + config.visible_frames))
    thing = {**content._asdict(), "frames": frames}
    path = folder / config.visual_folder / config.file_name(split, index)
    _write_mp4(path, _clip_frames(config, rng, thing), config.fps)

    if split == "train":
        wordings = _shuffled(config.templates, rng)[: config.captions_per_train_clip]
        return [
            {"video": path.name, "caption": content.caption(wording), "objects": [thing]}
            for wording in wordings
        ]
    caption = content.caption(config.templates[0])
    return [{"video": path.name, "caption": [caption], "objects": [thing]}]


def _caption_records(
    config: ShapesConfig,
    split: str,
    index: int,
    content: Content,
    retrieval: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One item's records in the layout of LAVIS's `CaptionDataset` and `VideoCaptionDataset`.

    In training the captions of its `retrieval` records, one each; in evaluation one record with
    every wording, as a generated caption may use any.
    """
    if split == "train":
        captions = [record["caption"] for record in retrieval]
    else:
        captions = [[content.caption(template) for template in config.templates]]
    name = config.file_name(split, index)
    return [
        {config.visual_key: name, "caption": caption, "image_id": index} for caption in captions
    ]


def _question_records(
    config: ShapesConfig, split: str, index: int, content: Content
) -> list[dict[str, Any]]:
    """One item's records in the layout of LAVIS's `VideoQADataset`."""
    asked = list(QUESTIONS)
    if split == "train":
        asked = _shuffled(asked, config.questions_rng(split, index))
        asked = asked[: config.questions_per_train_item]
    attributes = content._asdict()
    return [
        {
            config.visual_key: config.file_name(split, index),
            "question": QUESTIONS[attribute].format(**attributes),
            "answer": attributes[attribute],
            "question_id": index * len(QUESTIONS) + list(QUESTIONS).index(attribute),
        }
        for attribute in asked
    ]


def _clip_frames(
    config: ClipsConfig, rng: np.random.Generator, thing: Mapping[str, Any]
) -> np.ndarray:
    """RGB frames of a clip, uint8 of shape (num_frames, image_size, image_size, 3)."""
    side = config.image_size
    frames = np.repeat(_clip_background(config, rng)[None], config.num_frames, axis=0)
    for _ in range(config.distractors):
        shape, position, size = (_pick(rng, tuple(kind)) for kind in (SHAPES, CENTRES, SIZES))
        mask = _object_mask(rng, side, shape, position, SIZES[size])
        grey = np.full(3, rng.uniform(140.0, 245.0))
        start = int(rng.integers(config.num_frames - config.visible_frames + 1))
        for frame in range(start, start + config.visible_frames):
            if frame not in thing["frames"]:
                frames[frame] = _paint(frames[frame], mask, grey)
    mask = _object_mask(rng, side, thing["shape"], thing["position"], SIZES[thing["size"]])
    colour = _jittered_colour(rng, thing["colour"])
    for frame in thing["frames"]:
        frames[frame] = _paint(frames[frame], mask, colour)
    # The same noise on all channels: the codec would smear noisy chroma into false colours.
    return _to_bytes(frames + rng.normal(0.0, config.noise, (*frames.shape[:3], 1)))


def _write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError(
            f"OpenCV cannot write {path}: it needs FFmpeg's mpeg4 encoder, which the wheels of "
            "opencv-python and opencv-python-headless bring along"
        )
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def _still_background(config: StillsConfig, rng: np.random.Generator) -> np.ndarray:
    """A plain ground, dark to light, float of shape (image_size, image_size, 3)."""
    tone = rng.uniform(40.0, 240.0) + rng.uniform(-8.0, 8.0, 3)
    return np.tile(tone, (config.image_size, config.image_size, 1))


def _clip_background(config: ClipsConfig, rng: np.random.Generator) -> np.ndarray:
    """A dark blotched ground, float of shape (image_size, image_size, 3)."""
    tone = rng.uniform(40.0, 80.0) + rng.uniform(-8.0, 8.0, 3)
    blotches = cv2.resize(
        rng.normal(0.0, 22.0, (8, 8)),
        (config.image_size, config.image_size),
        interpolation=cv2.INTER_CUBIC,
    )
    return tone + blotches[:, :, None]


def _jittered_colour(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.array(COLOURS[colour]) + rng.uniform(-8.0, 8.0, 3)


def _object_mask(
    rng: np.random.Generator, side: int, shape: str, position: str, radius: float
) -> np.ndarray:
    """How far an object covers each pixel: floats in 0..1 of shape (side, side).

    `radius` is a fraction of the side; the centre is jittered about the position's.
    """
    supersampling = 4  # drawn larger and averaged down for smooth edges
    centre = np.array(CENTRES[position]) + rng.uniform(-JITTER, JITTER, 2)
    canvas = np.zeros((side * supersampling, side * supersampling), np.uint8)
    scale = side * supersampling
    outlines = [
        np.rint((centre + radius * outline) * scale).astype(np.int32) for outline in SHAPES[shape]
    ]
    cv2.fillPoly(canvas, outlines, 255)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA) / 255.0


def _paint(picture: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return picture + mask[:, :, None] * (colour - picture)


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption_words() -> list[str]:
    """Every word that a caption may use, sorted."""
    fixed = _fixed_words(*STILL_TEMPLATES, *CLIP_TEMPLATES)
    phrases = (*POSITION_PHRASES.values(), *COLOURS, *SHAPES, *SIZES, "a", "an")
    return sorted(fixed.union(*map(str.split, phrases)))


def question_words() -> list[str]:
    """Every word that a question or an answer may use, sorted."""
    return sorted(_fixed_words(*QUESTIONS.values()).union(*map(str.split, ANSWERS)))


def _fixed_words(*templates: str) -> set[str]:
    texts = (text for template in templates for text, *_ in string.Formatter().parse(template))
    return {word for text in texts for word in text.replace("?", "").split()}


def tokenizer_vocabulary() -> list[str]:
    """The WordPiece vocabulary of the bundled tokenizer: token i stands at place i.

    Besides the words of captions and questions it has all ASCII characters, so that other English
    text falls apart into letters instead of becoming unknown.
    """
    characters = string.ascii_lowercase + string.digits
    tokens = (
        *SPECIAL_TOKENS,
        *characters,
        *(f"##{character}" for character in characters),
        *string.punctuation,
        *caption_words(),
        # Last, so that the tokens before keep their places.
        *question_words(),
    )
    return list(dict.fromkeys(tokens))
