"""Generate the embedded data set "shapes": stills and clips with captions and questions.

Stills show one coloured shape on a plain background. Clips show one in a short run of frames, on a
blotched background; the other frames hold grey distractors, which no caption or question mentions,
or nothing.

A generated folder holds the visual files in ``images/`` or ``videos/``, ``generated.json``, which
records the options, and in ``annotations/``, in LAVIS's layouts:

* ``{train,val,test}.json`` for retrieval. Their extra key ``objects`` tells what is visible, and in
  which frames.
* ``cap_{train,val,test}.json`` for captioning: in training the captions of retrieval, in evaluation
  a list of every wording.
* ``qa_{train,val,test}.json`` for question answering, and the answers' labels in
  ``qa_ans2label.json``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.shapes.contents import (
    ANSWERS,
    CLIPS,
    SPLITS,
    STILLS,
    Content,
    Kind,
    caption_records,
    deal_contents,
    pick,
    question_records,
    shuffled,
)
from lavis_uniadapter.datasets.shapes.drawing import draw_clip, draw_still, write_mp4

FORMAT_VERSION = 5
MARKER = "generated.json"

# Each task's files in the folder ANNOTATIONS.
ANNOTATIONS = "annotations"
RETRIEVAL_FILES = {split: f"{split}.json" for split in SPLITS}
CAPTION_FILES = {split: f"cap_{split}.json" for split in SPLITS}
QUESTION_FILES = {split: f"qa_{split}.json" for split in SPLITS}
LABELS_FILE = "qa_ans2label.json"


def kind_of(options: Stills) -> Kind:
    """Whether options are those of stills or of clips."""
    return CLIPS if isinstance(options, Clips) else STILLS


def ensure_generated(options: Stills, folder: Path) -> None:
    """Generate the stills or clips into `folder`, unless it holds them already.

    Raises:
        FileExistsError: `folder` holds something else, or data of other options.
    """
    if _holds(options, folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Drawn next to its place and moved there in one step: a killed generation leaves no folder
    # that could be taken for a finished one.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workplace:
        unfinished = Path(workplace) / folder.name
        _generate(options, unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:
            # Another process may have been faster; its result is as good as ours.
            if not _holds(options, folder):
                raise


def _generate(options: Stills, folder: Path) -> None:
    kind, annotations = kind_of(options), folder / ANNOTATIONS
    write_item = _write_clip if kind is CLIPS else _write_still
    annotations.mkdir(parents=True)
    (folder / kind.visual_folder).mkdir()
    contents = deal_contents(options)
    for split in SPLITS:
        retrieval, captions, questions = [], [], []
        progress = tqdm(contents[split], desc=f"shapes {kind.visual_folder}, {split}")
        for index, content in enumerate(progress):
            path = folder / kind.visual_folder / kind.file_name(split, index)
            written = write_item(options, split, index, content, path)
            retrieval += written
            captions += caption_records(kind, split, index, content, written)
            questions += question_records(kind, split, index, content, options)
        _write_records(annotations / RETRIEVAL_FILES[split], retrieval)
        _write_records(annotations / CAPTION_FILES[split], captions)
        _write_records(annotations / QUESTION_FILES[split], questions)
    labels = {answer: label for label, answer in enumerate(ANSWERS)}
    (annotations / LABELS_FILE).write_text(json.dumps(labels, indent=1) + "\n")
    (folder / MARKER).write_text(json.dumps(_description(options), indent=1) + "\n")


def _write_still(
    options: Stills, split: str, index: int, content: Content, path: Path
) -> list[dict[str, Any]]:
    """Draw one still; returns its records for retrieval."""
    rng = STILLS.rng(options.seed, split, index)
    Image.fromarray(draw_still(options, content, rng)).save(path)
    shown = [content._asdict()]
    if split != "train":
        caption = content.caption(STILLS.templates[0])
        return [{"image": path.name, "caption": [caption], "objects": shown}]
    caption = content.caption(pick(rng, STILLS.templates))
    # Stills that show the same share an id: a text matches all of them, and none of them may be
    # drawn as a negative of another.
    image_id = f"{content.size} {content.colour} {content.shape} {content.position}"
    return [{"image": path.name, "image_id": image_id, "caption": caption, "objects": shown}]


def _write_clip(
    options: Clips, split: str, index: int, content: Content, path: Path
) -> list[dict[str, Any]]:
    """Draw and encode one clip; returns its records for retrieval."""
    rng = CLIPS.rng(options.seed, split, index)
    start = int(rng.integers(options.num_frames - options.visible_frames + 1))
    frames = list(range(start, start + options.visible_frames))
    write_mp4(path, draw_clip(options, content, frames, rng), options.fps)
    shown = [{**content._asdict(), "frames": frames}]
    if split != "train":
        caption = content.caption(CLIPS.templates[0])
        return [{"video": path.name, "caption": [caption], "objects": shown}]
    wordings = shuffled(CLIPS.templates, rng)[: options.captions_per_train_clip]
    captions = [content.caption(wording) for wording in wordings]
    return [{"video": path.name, "caption": caption, "objects": shown} for caption in captions]


def _write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f"[\n{lines}\n]\n")


def _description(options: Stills) -> dict[str, Any]:
    return {"format": FORMAT_VERSION, "kind": kind_of(options).visual_folder, **vars(options)}


def _holds(options: Stills, folder: Path) -> bool:
    """Whether `folder` holds the finished data of `options`; False if there is no folder."""
    if not folder.exists():
        return False
    marker = folder / MARKER
    if not marker.is_file():
        raise FileExistsError(
            f"{folder} exists but holds no finished shapes data set ({MARKER} is missing). "
            "Delete or move that folder, or name another storage in the dataset's build_info."
        )
    found, wanted = json.loads(marker.read_text()), _description(options)
    differences = [
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} wanted"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise FileExistsError(
            f"{folder} holds a shapes data set of other options ({'; '.join(differences)}). Delete "
            "that folder to generate it again, or name another storage in the dataset's build_info."
        )
    return True
