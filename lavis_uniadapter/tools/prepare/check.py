"""Check that every video, image and archive of extracted frames below a folder can be read."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator
from tqdm import tqdm

from lavis_uniadapter.common.atomic import write_text
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.records import (
    DatasetError,
    FileName,
    Place,
    Problem,
    Record,
    listing,
    read_records,
)
from lavis_uniadapter.processors.decoding import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    frames_problem,
    image_problem,
)
from lavis_uniadapter.processors.extracted_frames import EXTRACTED_SUFFIX, clip_file
from lavis_uniadapter.tools.prepare.workers import examine_isolated


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``check``."""
    parser = commands.add_parser(
        "check",
        help="find videos, images and extracted frames that cannot be read",
        description="Decode the first, middle and last frame of every video and of every archive "
        "of extracted frames below a folder, and every image as a whole (a header alone does not "
        "show that the rest is missing). Exit status: 0 if all can be read, 1 if not, 2 for a "
        "wrong call, 130 if interrupted, which still reports what was found so far.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="searched with its subfolders")
    parser.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="LAVIS's annotations or your own (.json, .jsonl, .csv, .tsv): also report files below "
        "DIR that their records name and that do not exist",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="decode every frame; a long video may then take more than --timeout",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write what cannot be read there: one line of JSON each, with file and reason",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="that a file may take (default 60); one that takes longer counts as unreadable",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Findings:
    """What a check found; as a string, the report.

    Attributes:
        folder: that was checked.
        total: how many files there are to check.
        checked: how many of them were, before an interruption.
        unusable: why files cannot be read, by path.
        missing: which record names a file that does not exist, by path; None without annotations.
        output: where these were written, if anywhere.
    """

    folder: Path
    total: int
    checked: int
    unusable: Mapping[str, str]
    missing: Mapping[str, str] | None
    output: Path | None

    @property
    def status(self) -> int:
        """The exit status."""
        if self.checked < self.total:
            return 130
        return 1 if self.wrong() else 0

    def __str__(self) -> str:
        counts = (
            f"{self.checked} files in {self.folder}: "
            f"{self.checked - len(self.unusable)} can be read, {len(self.unusable)} cannot"
        )
        if self.missing is not None:
            counts += f", {len(self.missing)} that the annotations name do not exist"
        if self.checked < self.total:
            counts = f"interrupted after {self.checked} of {self.total} files\n{counts}"
        lines = [counts, *(f"    {path}: {why}" for path, why in self.wrong())]
        if self.output is not None:
            lines.append(f"written to {self.output}")
        # A name in another encoding than the system's cannot be printed as it is.
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")

    def wrong(self) -> list[tuple[str, str]]:
        """All paths that are unusable or missing, and why."""
        return [*sorted(self.unusable.items()), *sorted((self.missing or {}).items())]


def run(args: argparse.Namespace) -> Findings:
    """Check the folder.

    Raises:
        ConfigError: an impossible number or output.
        DatasetError: there is nothing to check, or annotations cannot be read.
    """
    _check_options(args)
    files, unusable = find_files(args.folder)
    missing = {}
    for path, (place, is_image) in _read_annotations(args.annotations, args.folder).items():
        found = path if is_image else clip_file(path)
        if os.path.lexists(found):
            files.setdefault(found, is_image)
        else:
            missing[path] = f"named by {place}, and there is no such file"
    if not files and not missing and not unusable:
        raise DatasetError(
            f"{args.folder} holds no videos, images or extracted frames; correct the folder."
        )
    total, checked = len(files) + len(unusable), len(unusable)
    outcomes = examine_isolated(
        partial(examine, thorough=args.thorough),
        *(sorted(files.items()), args.threads, args.timeout),
    )
    # An interruption ends the search, but what was found before is reported.
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(outcomes):
        for (path, _), why in tqdm(outcomes, total=len(files), desc="checking"):
            checked += 1
            if why is not None:
                unusable[path] = why
    named = missing if args.annotations else None
    findings = Findings(args.folder, total, checked, unusable, named, args.output)
    if args.output is not None:
        lines = [json.dumps({"file": path, "reason": why}) for path, why in findings.wrong()]
        write_text(args.output, "".join(f"{line}\n" for line in lines))
    return findings


def examine(file: tuple[str, bool], thorough: bool) -> str | None:
    """Say why a file, an image or not, cannot be read, or None.

    Extracted frames do not replace a video here.
    """
    path, is_image = file
    if is_image:
        return image_problem(path, whole=True)
    return frames_problem(path, range if thorough else _ends)


def _ends(num_frames: int) -> list[int]:
    return sorted({0, num_frames // 2, num_frames - 1})


def _check_options(args: argparse.Namespace) -> None:
    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; at least 1.")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError(f"--timeout is {args.timeout:g}; it must be a number of seconds above 0.")
    if not args.folder.is_dir():
        raise DatasetError(f"There is no folder {args.folder}; correct the path.")
    # before hours of decoding, not after
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise ConfigError(f"--output is {args.output}; it must be a file in an existing folder.")


def find_files(folder: Path) -> tuple[dict[str, bool], dict[str, str]]:
    """What is named as a video, image or archive of frames below a folder, and is it an image.

    This includes folders of such names and dangling links. Links to folders are followed, as a
    path through them would be.

    Returns:
        Whether each file is an image, by path, and why folders cannot be searched, by path.
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
        os.fspath(error.filename): f"the folder cannot be searched ({error.strerror})"
        for error in refused
    }


OptionalName = Annotated[
    FileName | None,
    BeforeValidator(lambda value: None if value == "" else value),
    Field(description="a file name below the folder"),
]


class NamingRecord(Record):
    """A record of any layout: all that matters is which files it names."""

    video: OptionalName = None
    image: OptionalName = None

    @model_validator(mode="after")
    def _names_a_file(self) -> NamingRecord:
        if self.video is None and self.image is None:
            raise ValueError("needs a file name under 'video' or 'image'")
        return self


def _read_annotations(paths: Sequence[Path], folder: Path) -> dict[str, tuple[Place, bool]]:
    """Where each file is named first, and whether it is an image, by its path.

    Raises:
        DatasetError: listing what is wrong with the annotations.
    """
    named: dict[str, tuple[Place, bool]] = {}
    problems = []
    for item in (item for path in paths for item in read_records(path, NamingRecord)):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        for name, is_image in ((item.record.video, False), (item.record.image, True)):
            if name is not None:
                named.setdefault(os.path.join(folder, name), (item.place, is_image))
    if problems:
        raise DatasetError(
            f"The annotations cannot be used; fix or remove the records:{listing(problems)}"
        )
    return named
