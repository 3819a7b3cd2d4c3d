"""Checks of a dataset that fail in seconds instead of in the middle of training.

`check_annotations` reads the annotation files that a LAVIS dataset config names, before LAVIS
builds the datasets from them. `check_dataset` then checks a built dataset, files included.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlparse

from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.builders.video_qa_builder import VideoQABuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.processors.alpro_processors import AlproVideoBaseProcessor
from PIL import Image
from tqdm import tqdm

from lavis_uniadapter.datasets.layouts import (
    Layout,
    answer_list_problem,
    class_labels_problem,
    is_text,
    layout_of,
    leads_out,
    outside_problem,
)
from lavis_uniadapter.processors.extracted_frames import clip_file
from lavis_uniadapter.processors.video import VideoDecodeError, decode_frames, sample_frame_indices

MAX_NAMED = 20
SPLITS = ("train", "val", "test")

# Decoding waits for the disk as much as for the processor, hence more threads than cores.
_DECODE_THREADS = 8
# The decoded frame is thrown away, so the smaller the better.
_PROBE_SIZE = 32
# Stands for the content of a file that LAVIS will download; None is what a file with null holds.
_TO_BE_FETCHED = object()


class DatasetError(ValueError):
    """A dataset that cannot be trained or evaluated on. The message lists problems and mends."""


@dataclass(frozen=True)
class UnusableFiles:
    """Visual files of a dataset that no item can be made from.

    Attributes:
        missing: paths that are not there.
        undecodable: of those that are there, why each yields no frame or no image, by path.
    """

    missing: list[str]
    undecodable: dict[str, str]

    def paths(self) -> set[str]:
        return {*self.missing, *self.undecodable}


def check_annotations(builder: BaseDatasetBuilder) -> None:
    """Check the annotation files and the visual folder that a LAVIS builder's config names.

    Paths are resolved as in LAVIS's `BaseDatasetBuilder`: relative to the cache root. A missing
    annotation file is passed over if the config gives a `url` for it, from which LAVIS will fetch
    it (a local file there is checked). Builders that generate their files must have done so.

    Args:
        builder: of datasets whose layout is known (`layouts.LAYOUTS`); others are not checked.

    Raises:
        DatasetError: Listing every problem found in all splits.
    """
    classes = (builder.train_dataset_cls, builder.eval_dataset_cls)
    if not any(cls is not None and layout_of(cls) is not None for cls in classes):
        return
    config = builder.config
    data_type = config.get("data_type")
    if data_type not in ("images", "videos"):
        raise DatasetError(f"data_type is {data_type!r}; set it to 'videos' or 'images'.")
    build_info = config.get("build_info") or {}
    annotations = build_info.get("annotations") or {}
    visual_storage = (build_info.get(data_type) or {}).get("storage")

    problems, root = [], None
    if not any(split in annotations for split in SPLITS):
        problems.append(
            "build_info.annotations names none of the splits train, val, test; add at least one."
        )
    if visual_storage is None:
        problems.append(f"build_info.{data_type}.storage is missing; set it to the visual folder.")
    elif not is_text(visual_storage):
        problems.append(f"build_info.{data_type}.storage is {visual_storage!r}; set it to a path.")
    else:
        root = get_cache_path(visual_storage)
        problems.extend(_root_problems(root))
    for split in SPLITS:
        dataset_cls = builder.train_dataset_cls if split == "train" else builder.eval_dataset_cls
        if split in annotations and dataset_cls is None:
            problems.append(f"This dataset has no {split} split; take it out of the annotations.")
        elif split in annotations and (layout := layout_of(dataset_cls)) is not None:
            problems.extend(_split_problems(split, annotations[split], layout, root))
    if isinstance(builder, VideoQABuilder):
        problems.extend(_class_label_problems(annotations.get("ans2label") or {}))
    raise_if_any(problems, "The dataset config cannot be used")


def check_dataset(
    dataset: BaseDataset, split: str, tolerant: bool = False, files: bool = True
) -> UnusableFiles:
    """Check a built dataset: its records, and that every file is there and can be decoded.

    Of each distinct video the last frame that the split can sample is decoded: the very last one
    in training, the middle of the last segment in evaluation. Of an image the header is read.

    Args:
        dataset: of a LAVIS class whose layout is known (`layouts.LAYOUTS`).
        split: "train", "val" or "test".
        tolerant: return what files are unusable instead of raising for them: ``skip_missing`` of
            training, ``allow_missing`` of evaluation.
        files: look at the files; False: at the records alone.

    Raises:
        TypeError: If the dataset is of another class.
        DatasetError: Listing every problem found.
    """
    layout = layout_of(type(dataset))
    if layout is None:
        raise TypeError(
            f"{type(dataset).__name__} is none of LAVIS's datasets for retrieval, question "
            "answering and captioning, which alone can be checked; use one of them or a subclass."
        )
    title = f"The {split} dataset cannot be used"
    raise_if_any(_root_problems(dataset.vis_root), title)

    source = f"the {split} annotations"
    problems = list(_record_problems(dataset.annotation, layout, source, dataset.vis_root))
    for attribute, problem_of in (
        ("class_labels", class_labels_problem),
        ("answer_list", answer_list_problem),
    ):
        content = getattr(dataset, attribute, None)
        if content is not None and (problem := problem_of(content)):
            problems.append(f"the {attribute} {problem}.")
    unusable = _unusable_files(dataset, layout, split) if files else UnusableFiles([], {})
    if not tolerant:
        problems.extend(_file_problems(unusable, len(_visual_paths(dataset, layout))))
    raise_if_any(problems, title)
    return unusable


def leave_out(dataset: BaseDataset, unusable: UnusableFiles) -> int:
    """Take the records of unusable files out of a dataset; returns how many they were.

    Raises:
        DatasetError: If none would be left.
    """
    key = layout_of(type(dataset)).visual_key
    paths = unusable.paths()
    before = len(dataset.annotation)
    kept = [r for r in dataset.annotation if os.path.join(dataset.vis_root, r[key]) not in paths]
    if not kept:
        raise DatasetError(
            f"None of the {len(paths)} files of the dataset can be used, the first being "
            f"{min(paths)}. Check the visual folder {dataset.vis_root}."
        )
    dataset.annotation = kept
    dataset._add_instance_ids()
    return before - len(kept)


def decode_failures(
    paths: Sequence[str], split: str, n_frms: int | None, least_frames: int = 1
) -> dict[str, str]:
    """Decode the last frame that a split samples of each video, with a progress bar.

    Args:
        paths: of videos.
        split: "train", or another, which samples `n_frms` frames evenly (None: the very last).
        least_frames: that a video must have.

    Returns:
        Why a video cannot be decoded, by its path.
    """

    def failure(path: str) -> str | None:
        number = least_frames

        def last_sampled(num_frames: int) -> list[int]:
            nonlocal number
            number = num_frames
            if split == "train" or n_frms is None:
                return [num_frames - 1]
            return sample_frame_indices(num_frames, n_frms)[-1:]

        try:
            decode_frames(path, last_sampled, image_size=_PROBE_SIZE)
        except VideoDecodeError as error:
            return str(error)
        if number < least_frames:
            return (
                f"'{path}' has {number} of the {least_frames} frames (n_frms) that LAVIS's "
                "processors need; blip_video_train and blip_video_eval repeat frames."
            )
        return None

    return _failures(failure, paths, f"{split} videos")


def _failures(
    failure: Callable[[str], str | None], paths: Sequence[str], what: str
) -> dict[str, str]:
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        outcomes = tqdm(pool.map(failure, paths), total=len(paths), desc=f"checking {what}")
        return {path: why for path, why in zip(paths, outcomes, strict=True) if why}


def _image_failure(path: str) -> str | None:
    """Why an image cannot be opened; its header alone is read, as pixels take long."""
    try:
        with Image.open(path):
            return None
    except Exception as error:  # for damaged ones PIL raises a dozen kinds, even SyntaxError
        return f"Cannot open image '{path}': {error}"


def listing(items: Sequence[str]) -> str:
    """The first of many items, a line each, and how many more there are."""
    lines = list(items[:MAX_NAMED])
    if len(items) > MAX_NAMED:
        lines.append(f"and {len(items) - MAX_NAMED} more")
    return "".join(f"\n    {line}" for line in lines)


def _visual_paths(dataset: BaseDataset, layout: Layout) -> list[str]:
    names = (r.get(layout.visual_key) for r in dataset.annotation if isinstance(r, Mapping))
    # those that lead out of the folder are a problem of their records, and not to be opened
    return [
        os.path.join(dataset.vis_root, name)
        for name in dict.fromkeys(filter(is_text, names))
        if not leads_out(name)
    ]


def _unusable_files(dataset: BaseDataset, layout: Layout, split: str) -> UnusableFiles:
    paths = _visual_paths(dataset, layout)
    # LAVIS's own processors read no extracted frames, and make a shorter clip of a short video
    is_alpro = isinstance(dataset.vis_processor, AlproVideoBaseProcessor)
    found = clip_file if layout.visual_key == "video" and not is_alpro else str
    missing = [path for path in paths if not os.path.isfile(found(path))]
    present = sorted(set(paths).difference(missing))
    if layout.visual_key == "image":
        return UnusableFiles(missing, _failures(_image_failure, present, f"{split} images"))
    n_frms = getattr(dataset.vis_processor, "n_frms", None)
    least_frames = n_frms if is_alpro else 1
    return UnusableFiles(missing, decode_failures(present, split, n_frms, least_frames))


def _file_problems(unusable: UnusableFiles, total: int) -> Iterator[str]:
    if unusable.missing:
        yield (
            f"{len(unusable.missing)} of {total} files are missing; download them or take their "
            "records out of the annotations (skip_missing: True leaves them out of training, "
            "allow_missing: True scores them as wrong in evaluation):"
            f"{listing(unusable.missing)}"
        )
    if unusable.undecodable:
        reasons = list(unusable.undecodable.values())
        yield f"{len(reasons)} of {total} files cannot be decoded:{listing(reasons)}"


def _root_problems(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        yield (
            f"The visual folder {root} does not exist; "
            "create it or correct build_info's storage path."
        )


def _record_problems(
    records: object, layout: Layout, source: str, root: str | None
) -> Iterator[str]:
    if not isinstance(records, list):
        yield f"{source} hold no list of records; write a JSON list of mappings."
        return
    if not records:
        yield f"{source} are empty; add records."
        return
    found = (
        (index, layout.record_problem(record) or outside_problem(record[layout.visual_key], root))
        for index, record in enumerate(records)
    )
    wrong = [f"record {index} {problem}" for index, problem in found if problem]
    if wrong:
        yield (
            f"{len(wrong)} of {len(records)} records of {source} are wrong; "
            f"correct or remove them:{listing(wrong)}"
        )
    elif layout.unique is not None:
        counts = Counter(record[layout.unique] for record in records)
        repeated = [f"{value!r}, {n} times" for value, n in counts.items() if n > 1]
        if repeated:
            yield (
                f"{len(repeated)} values of '{layout.unique}' occur more than once in {source}; "
                f"give each record its own:{listing(repeated)}"
            )


def _split_problems(split: str, info: Mapping, layout: Layout, root: str | None) -> Iterator[str]:
    where = f"build_info.annotations.{split}"
    storages = _as_list((info or {}).get("storage"))
    urls = _as_list((info or {}).get("url"))
    if not all(map(is_text, (*storages, *urls))):
        yield (
            f"{where} has the storage {storages!r} and the url {urls!r}; each must be a path or a "
            "list of paths."
        )
        return
    if not storages:
        yield f"{where}.storage is missing; set it to the annotation file."
    if urls and len(urls) != len(storages):
        yield (
            f"{where} has {len(urls)} url(s) for {len(storages)} storage path(s); "
            "give one url per path or none."
        )
        return
    if layout.side_files and 0 < len(storages) < 2:
        yield f"{where}.storage names one file; name the {layout.side_files[0].what} after it."
    for number, (storage, url) in enumerate(
        zip(storages, urls or [None] * len(storages), strict=True)
    ):
        what, problem_of = f"{split} annotation file", None
        if number > 0 and layout.side_files:
            side_file = layout.side_files[min(number, len(layout.side_files)) - 1]
            what, problem_of = f"{split} {side_file.what}", side_file.problem
        content, problem = _read_json(storage, url, what)
        if problem is not None:
            yield problem
        elif content is _TO_BE_FETCHED:
            continue
        elif problem_of is not None:
            if problem := problem_of(content):
                yield f"The {what} {get_cache_path(storage)} {problem}."
        else:
            source = f"the {split} annotations {get_cache_path(storage)}"
            yield from _record_problems(content, layout, source, root)


def _class_label_problems(info: Mapping) -> Iterator[str]:
    if info.get("storage") is None:
        yield "build_info.annotations.ans2label.storage is missing; set it to the label file."
        return
    if not all(info.get(key) is None or is_text(info[key]) for key in ("storage", "url")):
        yield f"build_info.annotations.ans2label is {info!r}; its storage and url must be paths."
        return
    content, problem = _read_json(info["storage"], info.get("url"), "label file")
    if content is _TO_BE_FETCHED:
        return
    if problem is None and (problem := class_labels_problem(content)):
        problem = f"The label file {get_cache_path(info['storage'])} {problem}."
    if problem is not None:
        yield problem


def _read_json(storage: str, url: str | None, what: str) -> tuple[object, str | None]:
    """What a file holds, or _TO_BE_FETCHED, and what is wrong with it."""
    path = get_cache_path(storage)
    if not os.path.exists(path) and url is not None:
        if urlparse(url).scheme:
            return _TO_BE_FETCHED, None
        path = url
    if not os.path.isfile(path):
        return None, (
            f"The {what} {path} does not exist; "
            "create it, correct its storage path, or give a url to fetch it from."
        )
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file), None
    except (ValueError, RecursionError) as error:  # the latter for a thousand lists in each other
        return None, f"The {what} {path} is no valid JSON ({error}); write it anew."


def _as_list(value: object) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def raise_if_any(problems: Iterable[str], title: str) -> None:
    """Raise DatasetError that lists the problems under a title, if there are any."""
    lines = [f"\n- {problem}" for problem in problems]
    if lines:
        raise DatasetError(f"{title}:{''.join(lines)}")
