"""Checks of a dataset before training: annotations before LAVIS builds it, files afterwards."""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.builders.video_qa_builder import VideoQABuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.processors.alpro_processors import AlproVideoBaseProcessor
from tqdm.contrib.concurrent import thread_map

from lavis_uniadapter.datasets.layouts import (
    CheckContent,
    label_problems,
    layout_of,
    record_problems,
)
from lavis_uniadapter.datasets.own_images import OwnImages
from lavis_uniadapter.datasets.reading import file_of
from lavis_uniadapter.datasets.records import (
    SPLITS,
    DatasetError,
    Place,
    Problem,
    UnusableFile,
    is_split,
    listing,
    load_json,
    raise_if_any,
)
from lavis_uniadapter.processors.animations import is_animation
from lavis_uniadapter.processors.decoding import frames_problem, visual_problem
from lavis_uniadapter.processors.extracted_frames import clip_file
from lavis_uniadapter.processors.images import image_problem, images_read_whole
from lavis_uniadapter.processors.sampling import sample_frame_indices

logger = logging.getLogger(__name__)

# Decoding waits for the disk as much as for the processor, hence more threads than cores.
_DECODE_THREADS = 8


def check_annotations(builder: BaseDatasetBuilder) -> None:
    """Check the annotation files and the visual folder that a LAVIS builder's config names.

    A file that LAVIS will download is checked when it is there. Datasets of an unknown layout
    (`layouts.LAYOUTS`) are not checked.

    Raises:
        DatasetError: listing every problem of all splits.
    """
    classes = {split: builder.eval_dataset_cls for split in SPLITS}
    classes["train"] = builder.train_dataset_cls
    layouts = {split: layout_of(cls) for split, cls in classes.items() if cls}
    if not any(layouts.values()):
        return
    data_type = builder.config.data_type
    if data_type not in ("images", "videos"):
        raise DatasetError(f"data_type is {data_type!r}; set it to 'videos' or 'images'.")
    build_info = builder.config.get("build_info") or {}
    annotations = build_info.get("annotations") or {}
    checks: dict[str, list[CheckContent]] = {
        split: [partial(record_problems, schema=schema), *schema.side_files]
        for split, schema in layouts.items()
        if schema and split in annotations
    }
    if isinstance(builder, VideoQABuilder):
        checks["ans2label"] = [label_problems]
    folder = (build_info.get(data_type) or {}).get("storage")
    infos = {key: annotations.get(key) or {} for key in (*annotations, *checks)}
    files = {key: as_list(info.get("storage")) for key, info in infos.items()}
    faults = list(section_faults(data_type, folder, files))
    for key, of_files in checks.items():
        faults += _annotation_faults(key, files[key], as_list(infos[key].get("url")), of_files)
    raise_if_any(faults, "The dataset config cannot be used")


def section_faults(
    data_type: str, folder: object, files: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """What is wrong with the visual folder and the annotations that a dataset's config names."""
    where = f"build_info.{data_type}.storage"
    if folder is None:
        yield f"{where} is missing; set it to the folder of the {data_type}."
    elif not isinstance(folder, str):
        yield f"{where} is {folder!r}; it must be a path."
    elif not os.path.isdir(path := get_cache_path(folder)):
        yield f"The visual folder {path} does not exist; create it or correct {where}."
    for key in (key for key, paths in files.items() if not paths):
        yield f"build_info.annotations.{key}.storage is missing; set it to the annotation file."
    if not any(map(is_split, files)):
        yield f"build_info.annotations names none of {', '.join(SPLITS)}; add at least one."


def annotation_fault(key: str, wrong: Sequence[Problem]) -> str:
    """The message about problems in the files under a key of ``build_info.annotations``."""
    return (
        f"build_info.annotations.{key} has {len(wrong)} problem(s); correct the path, or fix or "
        f"remove the records:{listing(wrong)}"
    )


def _annotation_faults(
    key: str, storages: Sequence[str], urls: Sequence[str], checks: Sequence[CheckContent]
) -> Iterator[str]:
    """Check the files under a key; the last of the checks is for all remaining files."""
    where = f"build_info.annotations.{key}"
    if len(checks) > 1 and len(storages) == 1:
        yield f"{where}.storage names one file; add the answer list after it."
    elif urls and storages and len(urls) != len(storages):
        yield f"{where} has {len(urls)} url(s) for {len(storages)} storage path(s); give each one."
    wrong = []
    for number, path in enumerate(map(get_cache_path, storages)):
        if urls and not os.path.exists(path):
            continue  # LAVIS will download it
        try:
            # without a byte-order mark, at which LAVIS fails
            content = load_json(path, encoding="utf-8")
        except UnusableFile as error:
            wrong.append(error.problem)
        else:
            wrong += checks[min(number, len(checks) - 1)](content, path)
    if wrong:
        yield annotation_fault(key, wrong)


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """The paths of a storage or url."""
    return [value] if isinstance(value, str) else list(value or [])


def check_dataset(dataset: BaseDataset, split: str) -> None:
    """Check the records of a built dataset, some of which LAVIS may just have downloaded.

    Raises:
        DatasetError: listing what is wrong. Texts without words are only logged for training and as
            references of captioning, as published data may have some.
    """
    layout = layout_of(type(dataset))
    if layout is None:
        logger.warning("%s, %s: not checked.", type(dataset).__name__, split)
        return
    source = f"the {split} annotations"
    wrong = record_problems(dataset.annotation, source, layout)
    if not wrong:
        placed = ((Place(source, "record", i), each) for i, each in enumerate(dataset.annotation))
        wrong = list(blank_texts(placed, dataset.text_processor))
        caption = layout.model_fields.get("caption")
        if wrong and (split == "train" or (caption and not caption.is_required())):
            logger.warning("%s (one of %d such texts)", wrong[0], len(wrong))
            return
    if wrong:
        raise DatasetError(annotation_fault(split, wrong))


def blank_texts(
    records: Iterable[tuple[Place, Mapping[str, Any]]], processor: Callable[[str], str] | None
) -> Iterator[Problem]:
    """The captions and questions of which a text processor leaves nothing."""
    process = processor or str
    nothing = process("")  # a prompt, perhaps
    for place, record in records:
        for key in ("caption", "question"):
            for text in as_list(record.get(key)):
                if process(text) == nothing:
                    what = f"the {key} {reprlib.repr(text)} is empty after preprocessing"
                    yield Problem(place, what)


def unreadable_files(dataset: BaseDataset, split: str) -> dict[str, str]:
    """Find the files of a dataset that cannot be read; returns why, by path.

    What is evaluated is decoded as in evaluation: a whole image, the frames that are sampled of a
    video. In training, where another item replaces an unreadable one, it is the header of an image
    and the last frame of a video.
    """
    layout = layout_of(type(dataset))
    if layout is None:
        return {}
    training = split == "train"
    own = isinstance(dataset, OwnImages)
    problem_of = partial(image_problem, whole=not training, own=own)
    if layout.visual_key == "video":
        problem_of = partial(_clip_problem, processor=dataset.vis_processor, training=training)
    paths = list(dict.fromkeys(file_of(dataset, i) for i in range(len(dataset))))
    what = f"checking {split} {layout.visual_key}s"
    # here, as Pillow has one setting for all threads
    with images_read_whole():
        reasons = thread_map(problem_of, paths, max_workers=_DECODE_THREADS, desc=what)
    return {path: why for path, why in zip(paths, reasons, strict=True) if why}


def leave_out(dataset: BaseDataset, unusable: Mapping[str, str]) -> int:
    """Remove the records of unusable files from a dataset; returns their number.

    Raises:
        DatasetError: none would be left.
    """
    before = len(dataset)
    kept = [dataset.annotation[i] for i in range(before) if file_of(dataset, i) not in unusable]
    if not kept:
        raise DatasetError(
            f"None of the {len(unusable)} files of the dataset can be used, such as "
            f"{min(unusable)}. Check the visual folder {dataset.vis_root}."
        )
    dataset.annotation = kept
    dataset._add_instance_ids()
    return before - len(kept)


def _clip_problem(path: str, processor: Any, training: bool) -> str | None:
    n_frms = getattr(processor, "n_frms", 0)
    # LAVIS's own, which reads no extracted frames, and fewer frames than n_frms of a short clip
    is_alpro = isinstance(processor, AlproVideoBaseProcessor)
    clip = path if is_alpro else clip_file(path)
    if is_alpro and is_animation(path):
        return (
            "LAVIS's alpro processors cannot read GIF or WebP; set vis_processor to "
            "blip_video_train and blip_video_eval"
        )
    if clip != path and (problem := visual_problem(path, is_video=True)):
        return problem

    def choose(num_frames: int) -> list[int]:
        if is_alpro and num_frames < n_frms:
            raise ValueError(f"it has {num_frames} frames, and n_frms is {n_frms}")
        if (training and clip == path) or not n_frms:
            return [num_frames - 1]
        return sample_frame_indices(num_frames, n_frms, 0 if is_alpro else 0.5)

    if clip != path and n_frms:
        return frames_problem(clip, choose, processor.options.image_size)
    return frames_problem(clip, choose)
