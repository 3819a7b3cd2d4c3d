"""Checks of a dataset that fail in seconds instead of in the middle of training.

`check_annotations` reads the annotation files that a LAVIS dataset config names, before LAVIS
builds the datasets from them. `check_dataset` then checks a built dataset, including its files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlparse

from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.builders.video_qa_builder import VideoQABuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.processors.alpro_processors import AlproVideoBaseProcessor
from tqdm import tqdm

from lavis_uniadapter.datasets.layouts import (
    VisualRecord,
    answer_list_problem,
    class_labels_problem,
    layout_of,
)
from lavis_uniadapter.datasets.records import (
    DatasetError,
    Place,
    Problem,
    UnusableFile,
    check_records,
    escapes_root,
    is_text,
    listing,
    load_json,
    problems,
    raise_if_any,
)
from lavis_uniadapter.processors.decoding import frames_problem, image_problem
from lavis_uniadapter.processors.extracted_frames import clip_file
from lavis_uniadapter.processors.sampling import sample_frame_indices

SPLITS = ("train", "val", "test")
# Decoding waits for the disk as much as for the processor, hence more threads than cores.
_DECODE_THREADS = 8


@dataclass(frozen=True)
class UnusableFiles:
    """Visual files of a dataset that no item can be made from.

    Attributes:
        missing: paths that do not exist.
        undecodable: of those that exist, why each yields no frame or no image, by path.
    """

    missing: list[str]
    undecodable: dict[str, str]

    def paths(self) -> set[str]:
        return {*self.missing, *self.undecodable}


def check_annotations(builder: BaseDatasetBuilder) -> None:
    """Check the annotation files and the visual folder that a LAVIS builder's config names.

    Paths are resolved as in LAVIS's `BaseDatasetBuilder`: relative to the cache root. A missing
    annotation file is no problem if the config gives a `url` for it, from which LAVIS will fetch
    it (a local file there is checked).

    Args:
        builder: of datasets whose layout is known (`layouts.LAYOUTS`); others are not checked.

    Raises:
        DatasetError: Listing every problem found in all splits.
    """
    by_split = {
        split: builder.train_dataset_cls if split == "train" else builder.eval_dataset_cls
        for split in SPLITS
    }
    layouts = {split: cls and layout_of(cls) for split, cls in by_split.items()}
    if not any(layouts.values()):
        return
    config = builder.config
    data_type = config.get("data_type")
    if data_type not in ("images", "videos"):
        raise DatasetError(f"data_type is {data_type!r}; set it to 'videos' or 'images'.")
    annotations = (config.get("build_info") or {}).get("annotations") or {}
    faults = list(section_faults(config, data_type))
    for split in filter(annotations.__contains__, SPLITS):
        if by_split[split] is None:
            faults.append(f"This dataset has no {split} split; remove it from the annotations.")
        elif layouts[split] is not None:
            faults += _split_faults(split, annotations[split] or {}, layouts[split])
    if isinstance(builder, VideoQABuilder):
        check = partial(_side_file_problems, what="label file", problem_of=class_labels_problem)
        info = annotations.get("ans2label") or {}
        faults += _annotation_faults("ans2label", info, [check])
    raise_if_any(faults, "The dataset config cannot be used")


def check_dataset(
    dataset: BaseDataset, split: str, tolerant: bool = False, files: bool = True
) -> UnusableFiles:
    """Check a built dataset: its records, and that every file exists and can be decoded.

    Of each distinct video the last frame that the split can sample is decoded: the very last one
    in training, the middle of the last segment in evaluation. Of an image the header is read.

    Args:
        dataset: of a LAVIS class whose layout is known (`layouts.LAYOUTS`).
        split: "train", "val" or "test".
        tolerant: return what files are unusable instead of raising for them: ``skip_missing`` of
            training, ``allow_missing`` of evaluation.
        files: check the files; False: the records only.

    Raises:
        TypeError: If the dataset is of another class.
        DatasetError: Listing every problem found.
    """
    layout = layout_of(type(dataset))
    if layout is None:
        raise TypeError(
            f"{type(dataset).__name__} is none of LAVIS's datasets for retrieval, question "
            "answering and captioning, the only ones that can be checked; use one or a subclass."
        )
    faults = list(_absent_folder(dataset.vis_root))
    wrong = problems(check_records(dataset.annotation, layout, f"the {split} annotations"))
    if wrong:
        faults.append(
            f"{len(wrong)} problem(s) in the records; fix or remove them:{listing(wrong)}"
        )
    for attribute, problem_of in (
        ("class_labels", class_labels_problem),
        ("answer_list", answer_list_problem),
    ):
        content = getattr(dataset, attribute, None)
        if content is not None and (problem := problem_of(content)):
            faults.append(f"the {attribute} {problem}.")
    paths = _visual_paths(dataset, layout) if files and os.path.isdir(dataset.vis_root) else []
    unusable = _unusable_files(dataset, paths, layout, split)
    if not tolerant:
        faults += _file_faults(unusable, len(paths))
    raise_if_any(faults, f"The {split} dataset cannot be used")
    return unusable


def leave_out(dataset: BaseDataset, unusable: UnusableFiles) -> int:
    """Remove the records of unusable files from a dataset; returns how many they were.

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


def _visual_paths(dataset: BaseDataset, layout: type[VisualRecord]) -> list[str]:
    names = (r.get(layout.visual_key) for r in dataset.annotation if isinstance(r, Mapping))
    # those that escape the folder are a problem of their records, and not to be opened
    return [
        os.path.join(dataset.vis_root, name)
        for name in dict.fromkeys(filter(is_text, names))
        if not escapes_root(name)
    ]


def _unusable_files(
    dataset: BaseDataset, paths: Sequence[str], layout: type[VisualRecord], split: str
) -> UnusableFiles:
    is_video = layout.visual_key == "video"
    # LAVIS's own processors read no extracted frames, and make a shorter clip of a short video
    is_alpro = isinstance(dataset.vis_processor, AlproVideoBaseProcessor)
    found = clip_file if is_video and not is_alpro else str
    missing = [path for path in paths if not os.path.isfile(found(path))]
    present = sorted(set(paths).difference(missing))
    if not is_video:
        check = partial(image_problem, whole=False)
        return UnusableFiles(missing, files_with_problems(check, present, f"{split} images"))
    n_frms = getattr(dataset.vis_processor, "n_frms", None)

    def problem_of(path: str) -> str | None:
        lengths = []

        def last_sampled(num_frames: int) -> list[int]:
            lengths.append(num_frames)
            if split == "train" or n_frms is None:
                return last_frame(num_frames)
            return sample_frame_indices(num_frames, n_frms)[-1:]

        problem = frames_problem(found(path), last_sampled)
        if problem is None and is_alpro and lengths[0] < n_frms:
            return (
                f"it has {lengths[0]} of the {n_frms} frames (n_frms) that LAVIS's processors "
                "need; blip_video_train and blip_video_eval repeat frames"
            )
        return problem

    return UnusableFiles(missing, files_with_problems(problem_of, present, f"{split} videos"))


def _file_faults(unusable: UnusableFiles, total: int) -> Iterator[str]:
    if unusable.missing:
        yield (
            f"{len(unusable.missing)} of {total} files are missing; download them or remove their "
            "records from the annotations (skip_missing: True leaves them out of training, "
            "allow_missing: True scores them as wrong in evaluation):"
            f"{listing(unusable.missing)}"
        )
    if unusable.undecodable:
        reasons = [f"{path}: {why}" for path, why in unusable.undecodable.items()]
        yield f"{len(reasons)} of {total} files cannot be decoded:{listing(reasons)}"


def section_faults(config: Mapping, data_type: str) -> Iterator[str]:
    """What is wrong with the visual folder and the splits that a dataset's config names."""
    build_info = config.get("build_info") or {}
    storage, where = (build_info.get(data_type) or {}).get("storage"), f"build_info.{data_type}"
    if storage is None:
        yield f"{where}.storage is missing; set it to the folder of the {data_type}."
    elif not is_text(storage):
        yield f"{where}.storage is {storage!r}; it must be a path."
    else:
        yield from _absent_folder(get_cache_path(storage))
    if not any(split in (build_info.get("annotations") or {}) for split in SPLITS):
        yield f"build_info.annotations names none of {', '.join(SPLITS)}; add at least one."


def _absent_folder(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield (
            f"The visual folder {path} does not exist; create it or correct build_info's storage "
            "path."
        )


# What is wrong with the content of an annotation file, given its path too.
_CheckContent = Callable[[object, str], list[Problem]]


def _split_faults(split: str, info: Mapping, layout: type[VisualRecord]) -> Iterator[str]:
    sides = [
        partial(_side_file_problems, what=what, problem_of=problem_of)
        for what, problem_of in layout.side_files
    ]
    checks: list[_CheckContent] = [partial(_record_problems, layout=layout), *sides]
    if sides and len(_as_list(info.get("storage"))) == 1:
        what = layout.side_files[0][0]
        yield f"build_info.annotations.{split}.storage names one file; add the {what} after it."
    yield from _annotation_faults(split, info, checks)


def _annotation_faults(key: str, info: Mapping, checks: Sequence[_CheckContent]) -> Iterator[str]:
    """Check the files under a key; the last of the checks is for all files that are left."""
    where = f"build_info.annotations.{key}"
    storages, urls = _as_list(info.get("storage")), _as_list(info.get("url"))
    if not all(map(is_text, (*storages, *urls))):
        yield f"{where} has the storage {storages!r} and the url {urls!r}; both must be paths."
    elif not storages:
        yield f"{where}.storage is missing; set it to the annotation file."
    elif urls and len(urls) != len(storages):
        yield (
            f"{where} has {len(urls)} url(s) for {len(storages)} storage path(s); "
            "give one url for each path or none."
        )
    else:
        wrong = []
        for number, storage in enumerate(storages):
            path = get_cache_path(storage)
            if urls and not os.path.exists(path):
                if urlparse(urls[number]).scheme:  # LAVIS will fetch it
                    continue
                path = urls[number]
            try:
                # without a byte-order mark, at which LAVIS fails
                content = load_json(path, encoding="utf-8")
            except UnusableFile as error:
                wrong.append(error.problem)
            else:
                wrong += checks[min(number, len(checks) - 1)](content, path)
        if wrong:
            yield annotation_fault(key, wrong)


def annotation_fault(key: str, wrong: Sequence[Problem]) -> str:
    """Say that the files under a key of ``build_info.annotations`` have problems."""
    return (
        f"build_info.annotations.{key} has {len(wrong)} problem(s); correct the path, or fix or "
        f"remove the records:{listing(wrong)}"
    )


def _record_problems(content: object, path: str, layout: type[VisualRecord]) -> list[Problem]:
    return problems(check_records(content, layout, path))


def _side_file_problems(
    content: object, path: str, what: str, problem_of: Callable[[object], str | None]
) -> list[Problem]:
    problem = problem_of(content)
    return [Problem(Place(path), f"this {what} {problem}")] if problem else []


def _as_list(value: object) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
