"""Check that every video, image and archive of extracted frames below a folder can be read."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field
from tqdm import tqdm

from lavis_uniadapter.common.atomic import write_text
from lavis_uniadapter.common.schema.processors import VideoEval
from lavis_uniadapter.datasets.records import (
    DatasetError,
    Place,
    Problem,
    Record,
    escapes_root,
    listing,
    read_records,
)
from lavis_uniadapter.processors.decoding import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    frames_problem,
)
from lavis_uniadapter.processors.extracted_frames import EXTRACTED_SUFFIX, clip_file
from lavis_uniadapter.processors.images import ignored_by_lavis, image_problem
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.tools.prepare.workers import examine_isolated


def check(args: argparse.Namespace) -> int:
    """Check a folder, print a report and return the exit status.

    Raises:
        DatasetError: there is nothing to check, or annotations cannot be read.
    """
    files, wrong = find_files(args.folder)
    for path, (place, is_image) in _named_files(args.annotations, args.folder).items():
        found = path if is_image else clip_file(path)
        if os.path.lexists(found):
            files[found] = is_image  # as training reads it, whatever its name
        else:
            wrong[path] = f"named in {place}, but there is no such file"
    if not files and not wrong:
        raise DatasetError(
            f"{args.folder} holds no videos, images or extracted frames; correct the folder."
        )
    notes: dict[str, str] = {}
    total, checked = len(files) + len(wrong), len(wrong)
    work = partial(examine, thorough=args.thorough)
    outcomes = examine_isolated(work, sorted(files.items()), args.threads, args.timeout)
    # After an interruption, what was found before is still reported.
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(outcomes):
        for (path, _), why in tqdm(outcomes, total=len(files), desc="checking"):
            checked += 1
            if why is not None:
                (notes if isinstance(why, Note) else wrong)[path] = why
    wrong = dict(sorted(wrong.items()))
    if args.output is not None:
        lines = [json.dumps({"file": path, "reason": why}) for path, why in wrong.items()]
        write_text(args.output, "".join(f"{line}\n" for line in lines))
    if checked < total:
        print(f"interrupted after {checked} of {total} files")
    print(
        f"{checked} files in {args.folder}: {checked - len(wrong)} can be read, {len(wrong)} cannot"
    )
    _print(wrong)
    if notes:
        print(f"{len(notes)} images look different in LAVIS's own data sets, which ignore this:")
        _print(dict(sorted(notes.items())))
    if args.output is not None:
        print(f"written to {args.output}")
    if checked < total:
        return 130
    return 1 if wrong else 0


def _print(reasons: Mapping[str, str]) -> None:
    for path, why in reasons.items():
        # A name in another encoding than the system's cannot be printed as it is.
        print(f"    {path}: {why}".encode("utf-8", "backslashreplace").decode())


class Note(str):
    """What to know about a file that can be read."""


def examine(file: tuple[str, bool], thorough: bool) -> str | None:
    """Say why a file, an image or not, cannot be read; a `Note` about one that can; or None.

    Extracted frames do not replace a video here.
    """
    path, is_image = file
    if is_image:
        if problem := image_problem(path, whole=True, own=True):
            return problem
        ignored = ignored_by_lavis(path)
        return Note(ignored) if ignored else None
    return frames_problem(path, range if thorough else _frames_read)


def _frames_read(num_frames: int) -> list[int]:
    """What a run reads by default: the last frame before training, and those of evaluation."""
    return sorted({0, *sample_frame_indices(num_frames, VideoEval().n_frms), num_frames - 1})


def find_files(folder: Path) -> tuple[dict[str, bool], dict[str, str]]:
    """Find videos, images and extracted frames below a folder by their names; links are followed.

    Returns:
        By path, whether each is an image, and why folders cannot be searched.
    """
    files: dict[str, bool] = {}
    seen = set()
    refused: list[OSError] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refused.append):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # by a link, perhaps in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in (*folders, *names):
            extension = os.path.splitext(name)[1].lower()
            if name.endswith(EXTRACTED_SUFFIX) or extension in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
                files[os.path.join(parent, name)] = extension in IMAGE_EXTENSIONS
    return files, {
        str(error.filename): f"the folder cannot be searched ({error.strerror})"
        for error in refused
    }


Name = Annotated[str | None, Field(description="a file name")]


class NamingRecord(Record):
    """A record of any layout; only the files that it names matter."""

    video: Name = None
    image: Name = None


def _named_files(annotations: Sequence[Path], folder: Path) -> dict[str, tuple[Place, bool]]:
    """Where annotations name each file first, and whether it is an image, by its path."""
    named: dict[str, tuple[Place, bool]] = {}
    problems = []
    for item in (item for path in annotations for item in read_records(path, NamingRecord)):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        by_kind = ((item.record.video, False), (item.record.image, True))
        names = {name: is_image for name, is_image in by_kind if name}
        if not names or any(map(escapes_root, names)):
            text = "needs a file name below the folder under 'video' or 'image'"
            problems.append(Problem(item.place, text))
        for name, is_image in names.items():
            path = os.path.join(folder, os.path.normpath(name))
            named.setdefault(path, (item.place, is_image))
    if problems:
        raise DatasetError(
            f"The annotations cannot be used; fix or remove the records:{listing(problems)}"
        )
    return named
