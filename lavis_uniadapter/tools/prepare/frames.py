"""Extract the frames of a folder of videos, once, into a form that trains faster."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.preflight import DatasetError, listing
from lavis_uniadapter.processors.extracted_frames import (
    EXTRACTED_SUFFIX,
    read_about,
    write_extracted_frames,
)
from lavis_uniadapter.processors.video import VideoDecodeError, decode_frames, sample_frame_indices
from lavis_uniadapter.tools.prepare.videos import VIDEO_EXTENSIONS


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``frames``."""
    parser = commands.add_parser(
        "frames",
        help="extract frames of any videos, to train faster",
        description="Write frames of every video in a folder as <video>.frames.zip, which is read "
        "wherever the video is asked for. What is there already is left; a run that was stopped "
        "goes on where it was.",
    )
    parser.add_argument("--videos", type=Path, metavar="DIR", required=True, help="the videos")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: beside the videos)"
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=64,
        metavar="N",
        help="evenly spaced frames of each video; all of them where it has fewer (default 64)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="their height and width, the model's image_size (default 224)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Extract the frames; returns the report.

    Raises:
        ConfigError: an impossible number, or frames of other numbers are there.
        DatasetError: there are no videos, or some cannot be decoded; the others are written.
    """
    for name in ("frames", "image_size", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1.")
    if not args.videos.is_dir():
        raise DatasetError(f"There is no folder {args.videos}; correct --videos.")
    videos = sorted(
        path
        for path in args.videos.rglob("*")
        if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file()
    )
    if not videos:
        raise DatasetError(f"{args.videos} holds no videos; correct --videos.")
    output = args.output or args.videos
    targets = [
        output / path.relative_to(args.videos).with_name(path.name + EXTRACTED_SUFFIX)
        for path in videos
    ]
    there = [path.is_file() for path in targets]
    _check_those_there(
        [path for path, is_there in zip(targets, there, strict=True) if is_there], args
    )

    todo = [
        pair
        for pair, done in zip(zip(videos, targets, strict=True), there, strict=True)
        if not done
    ]
    with ThreadPoolExecutor(args.threads) as pool:
        outcomes = pool.map(lambda pair: _extract(*pair, args.frames, args.image_size), todo)
        failures = [why for why in tqdm(outcomes, total=len(todo), desc="extracting") if why]
    written = len(todo) - len(failures)
    size = sum(path.stat().st_size for path in targets if path.is_file()) / 1e6
    report = (
        f"{written} videos extracted, {sum(there)} were there already; {size:,.0f} MB in {output}"
    )
    if failures:
        raise DatasetError(f"{report}\n- {len(failures)} cannot be decoded:{listing(failures)}")
    if args.output is None:
        return report
    return f"{report}\nnext: set build_info.videos.storage to {os.path.abspath(output)}"


def _extract(video: Path, target: Path, number: int, image_size: int) -> str | None:
    """Extract one video; says why if it cannot be."""
    counted = []

    def choose(num_frames: int) -> Sequence[int]:
        counted.append(num_frames)
        return sample_frame_indices(num_frames, min(number, num_frames))

    try:
        frames = decode_frames(video, choose, image_size)
    except VideoDecodeError as error:
        return str(error)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_extracted_frames(str(target), frames, counted[0])
    return None


def _check_those_there(paths: Sequence[Path], args: argparse.Namespace) -> None:
    for path in paths:
        try:
            about = read_about(str(path))
            wanted = min(args.frames, about["source_frames"])
            fits = about["num_frames"] == wanted and about["image_size"] == args.image_size
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it.") from error
        if not fits:
            raise ConfigError(
                f"{path} holds {about['num_frames']} frames of {about['image_size']} px, not what "
                f"--frames {args.frames} --image-size {args.image_size} give. Delete those of "
                "other sizes, or name another --output."
            )
