"""Generate the embedded data set "shapes": stills and clips with captions and questions.

Stills show one coloured shape on a plain background. Clips show one in a short run of frames, on a
blotched background; grey distractors, which no caption or question mentions, are in other frames.

A folder holds the files in ``images/`` or ``videos/``, the options in ``generated.json``, and in
``annotations/`` those of retrieval (``train.json``; their ``objects`` say what is visible, and in
which frames), captioning (``cap_train.json``; in evaluation with every wording) and question
answering (``qa_train.json``, ``qa_ans2label.json``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lavis_uniadapter.common.atomic import no_empty_folders
from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.records import SPLITS, DatasetError
from lavis_uniadapter.datasets.shapes.contents import (
    ANSWERS,
    CLIP_TEMPLATES,
    QUESTIONS,
    STILL_TEMPLATES,
    Content,
    deal_contents,
    pick,
    shuffled,
)
from lavis_uniadapter.datasets.shapes.drawing import draw_clip, draw_still, write_mp4

FORMAT_VERSION = 5
MARKER = "generated.json"


def ensure_generated(options: Stills, folder: Path) -> None:
    """Generate the stills or clips into `folder`, unless it holds them already.

    Raises:
        FileExistsError: `folder` holds something else, or data of other options.
        DatasetError: `folder` cannot be written.
    """
    if _holds(options, folder):
        return
    # Drawn next to its place and moved there in one step: a killed generation leaves no folder
    # that could be taken for a finished one.
    place = folder.parent
    try:
        with no_empty_folders(place):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=place) as workplace:
                unfinished = Path(workplace) / folder.name
                _generate(options, unfinished)
                os.rename(unfinished, folder)
    except OSError as error:
        # Another process may have been faster; its result is as good as ours.
        if not _holds(options, folder):
            raise DatasetError(
                f"The shapes data set cannot be written to '{folder}': {error.strerror or error}. "
                "Set run.cache_root to another folder."
            ) from error


def _generate(options: Stills, folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    (folder / _visual_folder(options)).mkdir()
    for split, contents in deal_contents(options).items():
        records: dict[str, list] = {"": [], "cap_": [], "qa_": []}
        progress = tqdm(contents, desc=f"shapes {_visual_folder(options)}, {split}")
        for index, content in enumerate(progress):
            for task, about in _draw(options, folder, split, index, content).items():
                records[task] += about
        for task, about in records.items():
            lines = ",\n".join(map(json.dumps, about))
            (folder / "annotations" / f"{task}{split}.json").write_text(f"[\n{lines}\n]\n")
    labels = {answer: label for label, answer in enumerate(ANSWERS)}
    (folder / "annotations/qa_ans2label.json").write_text(json.dumps(labels, indent=1) + "\n")
    (folder / MARKER).write_text(json.dumps(_description(options), indent=1) + "\n")


def random_source(options: Stills, split: str, index: int, *use: int) -> np.random.Generator:
    """The random source of one use of one item; independent of all counts."""
    kind = int(isinstance(options, Clips))
    return np.random.default_rng([options.seed, kind, SPLITS.index(split), index, *use])


def _draw(
    options: Stills, folder: Path, split: str, index: int, content: Content
) -> dict[str, list[dict[str, Any]]]:
    """Draw an item; returns the records about it, by the prefix of a task's files."""
    rng = random_source(options, split, index)
    name, thing, image_id = f"{split}_{index:05d}", content._asdict(), {}
    if isinstance(options, Clips):
        start = int(rng.integers(options.num_frames - options.visible_frames + 1))
        thing["frames"] = list(range(start, start + options.visible_frames))
        shown, templates = {"video": f"{name}.mp4"}, CLIP_TEMPLATES
        pictures = draw_clip(options, content, thing["frames"], rng)
        write_mp4(folder / "videos" / shown["video"], pictures, options.fps)
        wordings = shuffled(templates, rng)[: options.captions_per_train_clip]
    else:
        shown, templates = {"image": f"{name}.png"}, STILL_TEMPLATES
        Image.fromarray(draw_still(options, content, rng)).save(folder / "images" / shown["image"])
        wordings = [pick(rng, templates)]
        # Stills that show the same share an id: a text matches all of them, and none of them may be
        # drawn as a negative of another.
        words = (content.size, content.colour, content.shape, content.position)
        image_id = {"image_id": " ".join(words)}
    captions: list[Any] = [content.caption(wording) for wording in wordings]
    references = captions
    if split != "train":
        # a generated caption may use any wording
        references = [[content.caption(template) for template in templates]]
        captions, image_id = [references[0][:1]], {}
    return {
        "": [{**shown, **image_id, "caption": c, "objects": [thing]} for c in captions],
        "cap_": [{**shown, "caption": c, "image_id": index} for c in references],
        "qa_": [{**shown, **asked} for asked in _questions(options, split, index, content)],
    }


def _questions(
    options: Stills, split: str, index: int, content: Content
) -> Iterator[dict[str, Any]]:
    asked = list(QUESTIONS)
    if split == "train":
        # With numbers of their own: what is asked changes no picture.
        asked = shuffled(asked, random_source(options, split, index, 1))
        asked = asked[: options.questions_per_train_item]
    for attribute in asked:
        yield {
            "question": QUESTIONS[attribute].format(**content._asdict()),
            "answer": getattr(content, attribute),
            "question_id": index * len(QUESTIONS) + list(QUESTIONS).index(attribute),
        }


def _visual_folder(options: Stills) -> str:
    return "videos" if isinstance(options, Clips) else "images"


def _description(options: Stills) -> dict[str, Any]:
    return {"format": FORMAT_VERSION, "kind": _visual_folder(options), **vars(options)}


def _holds(options: Stills, folder: Path) -> bool:
    """Whether `folder` holds the finished data of `options`; False if there is no folder."""
    if not folder.exists():
        return False
    marker = folder / MARKER
    found = json.loads(marker.read_text()) if marker.is_file() else {}
    wanted = _description(options)
    differences = [
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} wanted"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        why = "; ".join(differences) if found else f"{MARKER} is missing"
        raise FileExistsError(
            f"{folder} holds no shapes data set of these options ({why}). Delete or move that "
            "folder, or name another storage in the dataset's build_info."
        )
    return True
