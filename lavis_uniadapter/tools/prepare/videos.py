"""Find the files of annotated videos, whatever their extension, and check that they decode."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from lavis_uniadapter.datasets.records import DatasetError, listing
from lavis_uniadapter.processors.decoding import VIDEO_EXTENSIONS, frames_problem
from lavis_uniadapter.processors.extracted_frames import clip_file
from lavis_uniadapter.tools.prepare.benchmarks import Split

# Decoding waits for the disk as much as for the processor.
_THREADS = 8


def usable_videos(splits: Sequence[Split], folder: Path, skip_missing: bool) -> dict[str, str]:
    """Find every annotated video in a folder and decode its last frame.

    Subfolders are not searched, as LAVIS joins folder and name.

    Returns:
        File name by annotated name, without unusable training videos if ``skip_missing``.

    Raises:
        DatasetError: videos are missing, undecodable or ambiguous.
    """
    annotated = dict.fromkeys(video for split in splits for video in split.captions)
    names = find_videos(folder, annotated)
    paths = [clip_file(folder / name) for name in names.values()]
    reasons = thread_map(_last_frame_problem, paths, max_workers=_THREADS, desc="checking videos")
    unusable = {video: "missing" for video in annotated if video not in names}
    unusable |= {video: why for video, why in zip(names, reasons, strict=True) if why}
    evaluated = {v for s in splits if s.name != "train" for v in s.captions if v in unusable}
    refused = {v: why for v, why in unusable.items() if v in evaluated or not skip_missing}
    if refused:
        lines = [f"{names.get(video, video)}: {why}" for video, why in refused.items()]
        raise DatasetError(
            f"{len(refused)} of {len(annotated)} videos in {folder} cannot be used:{listing(lines)}"
            f"\n{len(evaluated)} of them are for validation or test, which must be complete; "
            f"{len(refused) - len(evaluated)} are for training only, and --skip-missing leaves "
            "them out."
        )
    return {video: name for video, name in names.items() if video not in unusable}


def find_videos(folder: Path, annotated: Iterable[str]) -> dict[str, str]:
    """File name by annotated name: the same, or else the only one with other extensions.

    Raises:
        DatasetError: a name has several files, or a file several names.
    """
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries if entry.is_file()}
    by_stem = defaultdict(list)
    for name in sorted(present):
        if stem(name) != name:
            by_stem[stem(name)].append(name)
    files = {v: [v] if v in present else by_stem.get(stem(v), []) for v in annotated}
    videos = defaultdict(list)
    for video, candidates in files.items():
        for name in candidates:
            videos[name].append(video)
    faults = [f"{v} has several files: {', '.join(c)}" for v, c in files.items() if len(c) > 1]
    faults += [f"{n} is the only file of {', '.join(v)}" for n, v in videos.items() if len(v) > 1]
    if faults:
        raise DatasetError(f"Videos in {folder} cannot be told apart:{listing(faults)}")
    return {video: candidates[0] for video, candidates in files.items() if candidates}


def stem(name: str) -> str:
    """A name without all of its video extensions.

    DiDeMo's download script adds ``.mp4`` to names that end in ``.avi``.
    """
    rest, extension = os.path.splitext(name)
    return stem(rest) if extension.lower() in VIDEO_EXTENSIONS else name


def _last_frame_problem(path: str) -> str | None:
    return frames_problem(path, lambda num_frames: [num_frames - 1])
