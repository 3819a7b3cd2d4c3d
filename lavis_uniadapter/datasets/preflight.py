"""Checks of a retrieval dataset that fail in seconds instead of in the middle of training.

`check_annotations` reads the annotation files that a LAVIS dataset config names, before the
datasets are built: LAVIS's eval datasets iterate the captions while being built, and iterate a
caption that is a plain string letter by letter. `check_dataset` then checks a built dataset,
files included.
"""

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

from lavis.common.utils import get_cache_path
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from tqdm import tqdm

from lavis_uniadapter.processors import VideoDecodeError, decode_frames, sample_frame_indices

MAX_NAMED = 20

_SPLITS = ("train", "val", "test")
_VISUAL_KEYS = {"videos": "video", "images": "image"}

# Decoding waits for the disk as much as for the processor, hence more threads than cores.
_DECODE_THREADS = 8
# The decoded frame is thrown away, so the smaller the better.
_PROBE_SIZE = 32


class DatasetError(ValueError):
    """A dataset that cannot be trained or evaluated on. The message lists problems and mends."""


def record_problem(record: object, visual_key: str, split: str) -> str | None:
    """Say what is wrong with one annotation record, or None.

    The rules are those of LAVIS's `retrieval_datasets`, to which this holds the types as well.

    Args:
        record: Element of an annotation file.
        visual_key: "video" or "image".
        split: "train" (one caption per record) or another (a list of captions per record).
    """
    if not isinstance(record, Mapping):
        return f"is no mapping but {reprlib.repr(record)}"
    if not _is_text(record.get(visual_key)):
        return f"needs a file name under '{visual_key}', has {reprlib.repr(record.get(visual_key))}"
    if split == "train" and visual_key == "image" and "image_id" not in record:
        return "needs an 'image_id'"
    caption = record.get("caption")
    if split == "train":
        if not isinstance(caption, str):
            return f"needs a string under 'caption', has {reprlib.repr(caption)}"
    elif not (isinstance(caption, list) and caption and all(map(_is_text, caption))):
        return f"needs a list of non-empty strings under 'caption', has {reprlib.repr(caption)}"
    return None


def check_annotations(dataset_config: Mapping) -> None:
    """Check the annotation files and the visual folder that a LAVIS dataset config names.

    Paths are resolved as in LAVIS's `BaseDatasetBuilder`: relative to the cache root. A missing
    annotation file is passed over if the config gives a `url` for it, from which LAVIS will fetch
    it (a local file there is checked). Builders that generate their files must have done so.

    Args:
        dataset_config: Node such as `cfg.datasets.msrvtt_retrieval`, with `data_type` ("videos"
            or "images") and `build_info`.

    Raises:
        DatasetError: Listing every problem found in all splits.
    """
    data_type = dataset_config.get("data_type")
    if data_type not in _VISUAL_KEYS:
        raise DatasetError(
            f"data_type is {data_type!r}; for retrieval set it to 'videos' or 'images'."
        )
    build_info = dataset_config.get("build_info") or {}
    annotations = {
        split: info
        for split, info in (build_info.get("annotations") or {}).items()
        if split in _SPLITS
    }
    visual_storage = (build_info.get(data_type) or {}).get("storage")

    problems = []
    if not annotations:
        problems.append(
            "build_info.annotations names none of the splits train, val, test; add at least one."
        )
    if visual_storage is None:
        problems.append(f"build_info.{data_type}.storage is missing; set it to the visual folder.")
    else:
        problems.extend(_root_problems(get_cache_path(visual_storage)))
    for split, info in annotations.items():
        problems.extend(_split_problems(split, info, _VISUAL_KEYS[data_type]))
    _raise_if_any(problems, "The dataset config cannot be used")


def check_dataset(dataset: BaseDataset, split: str) -> None:
    """Check a built dataset: its records, and that every file is there and, if video, decodes.

    Of each distinct video the last frame that the split can sample is decoded: the very last one
    in training, the middle of the last segment in evaluation.

    Args:
        dataset: A LAVIS `VideoRetrievalDataset`, `VideoRetrievalEvalDataset`, `RetrievalDataset`
            or `RetrievalEvalDataset`.
        split: "train", "val" or "test".

    Raises:
        TypeError: If the dataset is of another class.
        DatasetError: Listing every problem found.
    """
    visual_key = _visual_key(dataset)
    title = f"The {split} dataset cannot be used"
    _raise_if_any(_root_problems(dataset.vis_root), title)

    problems = list(
        _record_problems(dataset.annotation, visual_key, split, f"the {split} annotations")
    )
    names = (record.get(visual_key) for record in dataset.annotation if isinstance(record, Mapping))
    paths = [
        os.path.join(dataset.vis_root, name) for name in dict.fromkeys(filter(_is_text, names))
    ]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        problems.append(
            f"{len(missing)} of {len(paths)} files are missing; download them or take their "
            f"records out of the annotations:{_listing(missing)}"
        )
    if visual_key == "video":
        n_frms = getattr(dataset.vis_processor, "n_frms", None)
        present = sorted(set(paths).difference(missing))
        failures = _decode_failures(present, split, n_frms)
        if failures:
            problems.append(f"{len(failures)} videos cannot be decoded:{_listing(failures)}")
    _raise_if_any(problems, title)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _visual_key(dataset: BaseDataset) -> str:
    if isinstance(dataset, (VideoRetrievalDataset, VideoRetrievalEvalDataset)):
        return "video"
    if isinstance(dataset, (RetrievalDataset, RetrievalEvalDataset)):
        return "image"
    raise TypeError(
        f"{type(dataset).__name__} is none of LAVIS's retrieval datasets, which alone can be "
        "checked; use one of them or a subclass."
    )


def _root_problems(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        yield (
            f"The visual folder {root} does not exist; "
            "create it or correct build_info's storage path."
        )


def _record_problems(records: object, visual_key: str, split: str, source: str) -> Iterator[str]:
    if not isinstance(records, list):
        yield f"{source} hold no list of records; write a JSON list of mappings."
        return
    if not records:
        yield f"{source} are empty; add records."
        return
    found = (
        (index, record_problem(record, visual_key, split)) for index, record in enumerate(records)
    )
    wrong = [f"\n    record {index} {problem}" for index, problem in found if problem]
    if wrong:
        left = len(wrong) - MAX_NAMED
        more = f"\n    and {left} more" if left > 0 else ""
        yield (
            f"{len(wrong)} of {len(records)} records of {source} are wrong; "
            f"correct or remove them:{''.join(wrong[:MAX_NAMED])}{more}"
        )


def _split_problems(split: str, info: Mapping, visual_key: str) -> Iterator[str]:
    where = f"build_info.annotations.{split}"
    storages = _as_list(info.get("storage"))
    urls = _as_list(info.get("url"))
    if not storages:
        yield f"{where}.storage is missing; set it to the annotation file."
    if urls and len(urls) != len(storages):
        yield (
            f"{where} has {len(urls)} url(s) for {len(storages)} storage path(s); "
            "give one url per path or none."
        )
        return
    for storage, url in zip(storages, urls or [None] * len(storages), strict=True):
        path = get_cache_path(storage)
        if not os.path.exists(path) and url is not None:
            if urlparse(url).scheme:
                continue
            path = url
        yield from _annotation_file_problems(path, visual_key, split)


def _annotation_file_problems(path: str, visual_key: str, split: str) -> Iterator[str]:
    if not os.path.isfile(path):
        yield (
            f"The {split} annotation file {path} does not exist; "
            "create it, correct its storage path, or give a url to fetch it from."
        )
        return
    try:
        with open(path, encoding="utf-8") as file:
            records = json.load(file)
    except ValueError as error:
        yield f"The {split} annotation file {path} is no valid JSON ({error}); write it anew."
        return
    yield from _record_problems(records, visual_key, split, f"the {split} annotations {path}")


def _as_list(value: object) -> list:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _decode_failures(paths: list[str], split: str, n_frms: int | None) -> list[str]:
    def last_sampled(num_frames: int) -> list[int]:
        if split == "train" or n_frms is None:
            return [num_frames - 1]
        return sample_frame_indices(num_frames, n_frms)[-1:]

    def failure(path: str) -> str | None:
        try:
            decode_frames(path, last_sampled, image_size=_PROBE_SIZE)
        except VideoDecodeError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        outcomes = tqdm(pool.map(failure, paths), total=len(paths), desc=f"checking {split} videos")
        return [outcome for outcome in outcomes if outcome]


def _listing(items: list[str]) -> str:
    lines = items[:MAX_NAMED]
    if len(items) > MAX_NAMED:
        lines = [*lines, f"and {len(items) - MAX_NAMED} more"]
    return "".join(f"\n    {line}" for line in lines)


def _raise_if_any(problems: Iterable[str], title: str) -> None:
    lines = [f"\n- {problem}" for problem in problems]
    if lines:
        raise DatasetError(f"{title}:{''.join(lines)}")
