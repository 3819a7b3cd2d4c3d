"""Check that every video, image and archive of extracted frames below a folder can be read."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.layouts import is_text, outside_problem
from lavis_uniadapter.datasets.preflight import DatasetError, listing
from lavis_uniadapter.datasets.reading import images_read_whole
from lavis_uniadapter.datasets.record_files import Place, Problem, read_records
from lavis_uniadapter.processors.extracted_frames import EXTRACTED_SUFFIX, clip_file
from lavis_uniadapter.processors.video import VideoDecodeError, decode_frames, decode_video
from lavis_uniadapter.tools.prepare.isolated import examine_isolated
from lavis_uniadapter.tools.prepare.videos import VIDEO_EXTENSIONS

IMAGE_EXTENSIONS = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
# Frames are thrown away, so the smaller the better; below 30, decord has sizes that it cannot do.
_PROBE_SIZE = 32
# As many as are kept in memory at a time: 31 MB.
_FRAMES_AT_ONCE = 10_000

# Says what is wrong with a file or None, given its path and whether to be thorough.
Examine = Callable[[str, bool], str | None]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``check``."""
    parser = commands.add_parser(
        "check",
        help="look for videos, images and extracted frames that cannot be read",
        description="Decode the first, middle and last frame of every video and of every archive "
        "of extracted frames below a folder, and every image as a whole (a header alone does not "
        "tell that the rest is missing). Exit status: 0 if all can be read, 1 if not, 2 for a "
        "wrong call, 130 if interrupted, which still reports what was found so far.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="its subfolders are searched, too")
    parser.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="LAVIS's annotations or your own (.json, .jsonl, .csv, .tsv): name also the files "
        "below DIR that their records ask for and that are not there",
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
        help="write what cannot be read there: a line of JSON each, with file and reason",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="that a file may take (default 60); one that takes longer cannot be read",
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
        missing: which record asks for a file that is not there, by path; None without annotations.
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
        return 1 if self.unusable or self.missing else 0

    def __str__(self) -> str:
        counts = (
            f"{self.checked} files in {self.folder}: "
            f"{self.checked - len(self.unusable)} can be read, {len(self.unusable)} cannot"
        )
        if self.missing is not None:
            counts += f", {len(self.missing)} that the annotations name are not there"
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
    files = dict(find_files(args.folder))
    named = _read_annotations(args.annotations, args.folder)
    missing = {}
    for path, (place, examine) in named.items():
        found = path if examine is image_problem else clip_file(path)
        if os.path.lexists(found):
            files.setdefault(found, archive_problem if found != path else examine)
        else:
            missing[path] = f"named by {place}, and there is no such file"
    if not files and not missing:
        raise DatasetError(
            f"{args.folder} holds no videos, images or extracted frames; correct the folder."
        )

    unusable, checked = {}, 0
    outcomes = examine_isolated(
        lambda path: files[path](path, args.thorough), sorted(files), args.threads, args.timeout
    )
    # An interruption ends the search, not the report about what was found before it.
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(outcomes):
        for path, why in tqdm(outcomes, total=len(files), desc="checking"):
            checked += 1
            if why is not None:
                unusable[path] = why
    findings = Findings(
        args.folder,
        len(files),
        checked,
        unusable,
        missing if args.annotations else None,
        args.output,
    )
    if args.output is not None:
        _write_lines(args.output, findings.wrong())
    return findings


def _check_options(args: argparse.Namespace) -> None:
    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; at least 1.")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError(f"--timeout is {args.timeout:g}; it must be a number of seconds above 0.")
    if not args.folder.is_dir():
        raise DatasetError(f"There is no folder {args.folder}; correct the path.")
    # before hours of decoding, not after
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise ConfigError(
            f"--output is {args.output}; it must be a file, in a folder that is there."
        )


def find_files(folder: Path) -> Iterator[tuple[str, Examine]]:
    """What is named as a video, image or archive of frames below a folder, and how to examine it.

    Whatever it is: a folder of such a name, or a link that leads nowhere, is examined, too. Links
    to folders are followed, as a path through them is.
    """
    seen = set()
    refused = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refused.append):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # by a link, perhaps in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in (*folders, *names):
            extension = os.path.splitext(name)[1].lower()
            if name.endswith(EXTRACTED_SUFFIX):
                yield os.path.join(parent, name), archive_problem
            elif extension in VIDEO_EXTENSIONS:
                yield os.path.join(parent, name), video_problem
            elif extension in IMAGE_EXTENSIONS:
                yield os.path.join(parent, name), image_problem
    for error in refused:
        yield os.fspath(error.filename), _unlisted_problem


def video_problem(path: str, thorough: bool) -> str | None:
    """Say why a video cannot be decoded, or None; extracted frames do not stand for it here."""
    if problem := _file_problem(path):
        return problem
    counted = []

    def ends(num_frames: int) -> list[int]:
        counted.append(num_frames)
        return _ends(num_frames)

    try:
        decode_video(path, ends, _PROBE_SIZE)
        for start in range(0, counted[0] if thorough else 0, _FRAMES_AT_ONCE):
            part = range(start, min(start + _FRAMES_AT_ONCE, counted[0]))
            decode_video(path, lambda _, part=part: list(part), _PROBE_SIZE)
    except VideoDecodeError as error:
        return error.reason
    return None


def archive_problem(path: str, thorough: bool) -> str | None:
    """Say why an archive of extracted frames cannot be read, or None."""
    if problem := _file_problem(path):
        return problem
    try:
        decode_frames(path, range if thorough else _ends, _PROBE_SIZE)
    except VideoDecodeError as error:
        return error.reason
    return None


def image_problem(path: str, thorough: bool) -> str | None:
    """Say why an image cannot be read, or None; it is always read as a whole."""
    if problem := _file_problem(path):
        return problem
    try:
        with images_read_whole(), Image.open(path) as image:
            image.convert("RGB")
    except Exception as error:  # of Pillow's many decoders, each has its own
        return f"cannot be read as an image ({error})"
    return None


def _ends(num_frames: int) -> list[int]:
    return sorted({0, num_frames // 2, num_frames - 1})


def _unlisted_problem(path: str, thorough: bool) -> str:
    try:
        os.listdir(path)
    except OSError as error:
        return f"the folder cannot be searched ({error.strerror})"
    return "the folder could not be searched; check again"


def _file_problem(path: str) -> str | None:
    """Say what is wrong with a file, or None, before anything is decoded."""
    if os.path.isdir(path):
        return "it is a folder"
    if os.path.islink(path) and not os.path.exists(path):
        return f"it is a link to {os.readlink(path)}, which is not there"
    if not os.path.isfile(path):
        return "it is no ordinary file"
    try:
        with open(path, "rb") as file:
            return None if file.read(1) else "the file is empty"
    except OSError as error:
        return f"the file cannot be read ({error.strerror})"


def _read_annotations(paths: Sequence[Path], folder: Path) -> dict[str, tuple[Place, Examine]]:
    """Where each file is named first, and how to examine it, by its path.

    Raises:
        DatasetError: listing what is wrong with the annotations.
    """
    named: dict[str, tuple[Place, Examine]] = {}
    problems = []
    for path in paths:
        for item in read_records(path, required=()):
            if isinstance(item, Problem):
                problems.append(str(item))
                continue
            keys = [key for key in ("video", "image") if is_text(item.fields.get(key))]
            names = [item.fields[key] for key in keys]
            wrong = [text for name in names if (text := outside_problem(name, folder))]
            if not keys:
                wrong.append("needs a file name under 'video' or 'image'")
            if wrong:
                problems += [str(Problem(item.place, text)) for text in wrong]
                continue
            for key, name in zip(keys, names, strict=True):
                examine = video_problem if key == "video" else image_problem
                joined = os.path.join(folder, os.path.normpath(name))
                named.setdefault(joined, (item.place, examine))
    if problems:
        raise DatasetError(
            f"The annotations cannot be used; correct or remove the records:{listing(problems)}"
        )
    return named


def _write_lines(path: Path, wrong: Iterable[tuple[str, str]]) -> None:
    """Write a line of JSON for each file: all of them, or on any error none."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            for name, why in wrong:
                file.write(json.dumps({"file": name, "reason": why}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise
