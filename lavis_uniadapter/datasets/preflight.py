"""Checks of a dataset before training: annotations before LAVIS builds it, files afterwards."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.builders.video_qa_builder import VideoQABuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.processors.alpro_processors import AlproVideoBaseProcessor
from tqdm import tqdm

from lavis_uniadapter.datasets.layouts import (
    CheckContent,
    label_problems,
    layout_of,
    record_problems,
)
from lavis_uniadapter.datasets.reading import file_of
from lavis_uniadapter.datasets.records import (
    SPLITS,
    DatasetError,
    Problem,
    UnusableFile,
    listing,
    load_json,
    raise_if_any,
)
from lavis_uniadapter.processors.decoding import (
    frames_problem,
    image_problem,
    visual_problem,
)
from lavis_uniadapter.processors.extracted_frames import clip_file
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
    storage = (build_info.get(data_type) or {}).get("storage")
    faults = list(section_faults(data_type, storage, annotations))
    for key, of_files in checks.items():
        faults += _annotation_faults(key, annotations.get(key) or {}, of_files)
    raise_if_any(faults, "The dataset config cannot be used")


def section_faults(data_type: str, storage: object, annotations: Mapping) -> Iterator[str]:
    """What is wrong with the visual folder and the splits that a dataset's config names."""
    where = f"build_info.{data_type}.storage"
    if storage is None:
        yield f"{where} is missing; set it to the folder of the {data_type}."
    elif not isinstance(storage, str):
        yield f"{where} is {storage!r}; it must be a path."
    elif not os.path.isdir(path := get_cache_path(storage)):
        yield f"The visual folder {path} does not exist; create it or correct {where}."
    if not any(split in annotations for split in SPLITS):
        yield f"build_info.annotations names none of {', '.join(SPLITS)}; add at least one."


def annotation_fault(key: str, wrong: Sequence[Problem]) -> str:
    """Say that the files under a key of ``build_info.annotations`` have problems."""
    return (
        f"build_info.annotations.{key} has {len(wrong)} problem(s); correct the path, or fix or "
        f"remove the records:{listing(wrong)}"
    )


def _annotation_faults(key: str, info: Mapping, checks: Sequence[CheckContent]) -> Iterator[str]:
    """Check the files under a key; the last of the checks is for all files that are left."""
    where = f"build_info.annotations.{key}"
    storages, urls = as_list(info.get("storage")), as_list(info.get("url"))
    if not storages:
        yield f"{where}.storage is missing; set it to the annotation file."
    elif len(checks) > 1 and len(storages) == 1:
        yield f"{where}.storage names one file; add the answer list after it."
    elif urls and len(urls) != len(storages):
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


def check_dataset(dataset: BaseDataset, split: str, files: bool = True) -> dict[str, str]:
    """Check a built dataset's records, and if ``files``, that each file can be decoded.

    Of a video the last frame that the split can sample is decoded: the very last one in training,
    the middle of the last segment in evaluation. Of an image the header is read.

    Returns:
        Why files cannot be used, by path.

    Raises:
        DatasetError: listing what is wrong with the records.
    """
    layout = layout_of(type(dataset))
    if layout is None:
        logger.warning("%s, %s: not checked.", type(dataset).__name__, split)
        return {}
    # those that LAVIS has just downloaded have not been checked yet
    wrong = record_problems(dataset.annotation, f"the {split} annotations", layout)
    if wrong:
        raise DatasetError(annotation_fault(split, wrong))
    if not files:
        return {}
    paths = list(dict.fromkeys(file_of(dataset, i) for i in range(len(dataset))))
    check = partial(image_problem, whole=False)
    if layout.visual_key == "video":
        check = partial(_clip_problem, processor=dataset.vis_processor, train=split == "train")
    may_open = partial(
        visual_problem, folder=dataset.vis_root, is_video=layout.visual_key == "video"
    )
    what = f"{split} {layout.visual_key}s"
    return files_with_problems(lambda path: may_open(path) or check(path), paths, what)


def leave_out(dataset: BaseDataset, unusable: Mapping[str, str]) -> int:
    """Remove the records of unusable files from a dataset; returns how many they were.

    Raises:
        DatasetError: none would be left.
    """
    before = len(dataset)
    kept = [dataset.annotation[i] for i in range(before) if file_of(dataset, i) not in unusable]
    if not kept:
        raise DatasetError(
            f"None of the {len(unusable)} files of the dataset can be used, the first being "
            f"{min(unusable)}. Check the visual folder {dataset.vis_root}."
        )
    dataset.annotation = kept
    dataset._add_instance_ids()
    return before - len(kept)


def files_with_problems(
    problem_of: Callable[[str], str | None], paths: Sequence[str], what: str
) -> dict[str, str]:
    """Check files in several threads, with a progress bar; returns what is wrong, by path."""
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        found = tqdm(pool.map(problem_of, paths), total=len(paths), desc=f"checking {what}")
        return {path: why for path, why in zip(paths, found, strict=True) if why}


def last_frame(num_frames: int) -> list[int]:
    """The index of a clip's last frame."""
    return [num_frames - 1]


def _clip_problem(path: str, processor: Any, train: bool) -> str | None:
    n_frms = getattr(processor, "n_frms", None)

    def last_sampled(num_frames: int) -> list[int]:
        if train or n_frms is None:
            return last_frame(num_frames)
        return sample_frame_indices(num_frames, n_frms)[-1:]

    # LAVIS's own processors read no extracted frames
    reads_frames = not isinstance(processor, AlproVideoBaseProcessor)
    if n_frms and reads_frames and clip_file(path) != path and hasattr(processor, "options"):
        size = processor.options.image_size
        return frames_problem(clip_file(path), partial(sample_frame_indices, n_frms=n_frms), size)
    return frames_problem(path, last_sampled)
