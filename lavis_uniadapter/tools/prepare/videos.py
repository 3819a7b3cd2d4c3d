"""Find the files of annotated videos, whatever their extension, and see that they decode."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lavis_uniadapter.common.errors import name_some
from lavis_uniadapter.datasets.preflight import files_with_problems, last_frame
from lavis_uniadapter.datasets.records import MAX_NAMED, DatasetError, listing, raise_if_any
from lavis_uniadapter.processors.decoding import VIDEO_EXTENSIONS, frames_problem
from lavis_uniadapter.processors.extracted_frames import clip_file
from lavis_uniadapter.tools.prepare.annotations import AnnotationFile


@dataclass(frozen=True)
class UsableVideos:
    """What is left once videos without a usable file are out of training.

    Attributes:
        files: the annotations without them.
        names: file name in the folder by annotated name.
        notes: what was left out, for the report.
    """

    files: list[AnnotationFile]
    names: Mapping[str, str]
    notes: list[str]


def require_videos(
    files: Sequence[AnnotationFile], folder: Path, skip_missing: bool, benchmark: str
) -> UsableVideos:
    """Find every annotated video in `folder` and decode its last frame.

    Args:
        files: annotations, with videos under their annotated names.
        folder: where the videos lie; subfolders are not searched, as LAVIS joins folder and name.
        skip_missing: leave videos that are missing or undecodable out, if only training has them.
        benchmark: its name, for messages.

    Raises:
        DatasetError: listing the videos that are missing, undecodable or ambiguous.
    """
    annotated = list(dict.fromkeys(video for file in files for video in file.captions))
    names = find_videos(folder, annotated)
    paths = {video: str(folder / name) for video, name in names.items()}
    failures = files_with_problems(_last_frame_problem, sorted(paths.values()), benchmark)
    unusable = {video: "missing" for video in annotated if video not in names}
    unusable |= {v: f"{p}: {failures[p]}" for v, p in paths.items() if p in failures}
    evaluated = {
        file.name: set(file.captions).intersection(unusable) for file in files if not file.training
    }
    refused = set().union(*evaluated.values()) if skip_missing else set(unusable)
    if refused:
        faults = _unusable_faults(unusable, refused, len(annotated), folder)
        raise_if_any([*faults, *_fixes(refused, evaluated)], f"{benchmark} cannot be prepared")
    kept = [file.without(unusable) for file in files]
    empty = [f"{file.name} would hold no video." for file in kept if not file.captions]
    raise_if_any(empty, f"{benchmark} cannot be prepared")
    return UsableVideos(kept, names, list(_notes(files, unusable)))


def _last_frame_problem(path: str) -> str | None:
    return frames_problem(clip_file(path), last_frame)


def _unusable_faults(
    unusable: Mapping[str, str], refused: Collection[str], total: int, folder: Path
) -> Iterator[str]:
    refusals = {video: why for video, why in unusable.items() if video in refused}
    missing = [video for video, why in refusals.items() if why == "missing"]
    undecodable = [why for why in refusals.values() if why != "missing"]
    if missing:
        yield f"{len(missing)} of {total} videos are missing from {folder}:{listing(missing)}"
    if undecodable:
        yield f"{len(undecodable)} of {total} videos cannot be decoded:{listing(undecodable)}"


def _fixes(refused: set[str], evaluated: Mapping[str, set[str]]) -> Iterator[str]:
    if any(evaluated.values()):
        counts = ", ".join(f"{name} {len(lost)}" for name, lost in evaluated.items() if lost)
        yield (
            f"Some of them are for validation or test ({counts}). Without them this would be "
            "another benchmark: get them, or omit that annotation file (see --help)."
        )
    only_trained = refused.difference(*evaluated.values())
    if only_trained:
        yield f"{len(only_trained)} of them are for training only: --skip-missing leaves them out."


def _notes(files: Sequence[AnnotationFile], unusable: Collection[str]) -> Iterator[str]:
    if unusable:
        yield f"{len(unusable)} videos, missing or undecodable: {name_some(unusable, MAX_NAMED)}"
    for file in files:
        groups = [captions for video, captions in file.captions.items() if video in unusable]
        if groups:
            yield f"  of {file.name} {len(groups)} videos with {sum(map(len, groups))} captions"


def find_videos(folder: Path, annotated: Iterable[str]) -> dict[str, str]:
    """Match annotated names with the files in `folder`.

    The file of just that name, or else the only one that differs in its extensions alone.

    Returns:
        File name by annotated name, without those that have no file.

    Raises:
        DatasetError: there is no such folder, a name has several files, or a file several names.
    """
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}; correct --videos.")
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries if entry.is_file()}
    by_stem = defaultdict(list)
    for name in sorted(present):
        if stem(name) != name:
            by_stem[stem(name)].append(name)

    names, ambiguous, annotated_by_file = {}, [], defaultdict(list)
    for video in annotated:
        candidates = [video] if video in present else by_stem.get(stem(video), [])
        if len(candidates) > 1:
            ambiguous.append(f"{video}: {', '.join(candidates)}")
        elif candidates:
            names[video] = candidates[0]
            annotated_by_file[candidates[0]].append(video)
    shared = [f"{name}: {', '.join(of)}" for name, of in annotated_by_file.items() if len(of) > 1]
    problems = []
    if ambiguous:
        problems.append(
            f"{len(ambiguous)} videos have several files and none of the annotated name; keep one "
            f"of each:{listing(ambiguous)}"
        )
    if shared:
        problems.append(
            f"{len(shared)} files are all there is for several annotated videos; correct the "
            f"annotations or add the files:{listing(shared)}"
        )
    raise_if_any(problems, f"The videos in {folder} cannot be told apart")
    return names


def stem(name: str) -> str:
    """`name` without its video extensions.

    All of them: DiDeMo's download script adds ``.mp4`` to names that end in ``.avi``.
    """
    rest, extension = os.path.splitext(name)
    return stem(rest) if extension.lower() in VIDEO_EXTENSIONS else name
