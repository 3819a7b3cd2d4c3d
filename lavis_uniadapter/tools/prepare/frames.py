"""Extract the frames of a folder of videos, once, into a form that trains faster."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.records import DatasetError, listing
from lavis_uniadapter.processors.decoding import VIDEO_EXTENSIONS, VideoDecodeError, decode_file
from lavis_uniadapter.processors.extracted_frames import (
    EXTRACTED_SUFFIX,
    read_about,
    video_state,
    write_extracted_frames,
)
from lavis_uniadapter.processors.sampling import sample_frame_indices


def extract(args: argparse.Namespace) -> int:
    """Extract the frames of all videos that are new or have changed, and print a report.

    Raises:
        ConfigError: there are archives of another number or size of frames.
        DatasetError: there are no videos, or some cannot be decoded; the others are written.
    """
    output = args.output or args.videos
    targets = {
        path: output / path.relative_to(args.videos).with_name(path.name + EXTRACTED_SUFFIX)
        for path in sorted(args.videos.rglob("*"))
        if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file()
    }
    if not targets:
        raise DatasetError(f"{args.videos} holds no videos; correct --videos.")
    todo = {
        video: target
        for video, target in targets.items()
        if not _is_extracted(video, target, args.frames, args.image_size)
    }
    reasons = thread_map(
        lambda video, target: _extract(video, target, args.frames, args.image_size),
        todo.keys(),
        todo.values(),
        max_workers=args.threads,
        desc="extracting",
    )
    failures = [f"{video}: {why}" for video, why in zip(todo, reasons, strict=True) if why]
    size = sum(path.stat().st_size for path in targets.values() if path.is_file()) / 1e6
    report = (
        f"{len(todo) - len(failures)} videos extracted, {len(targets) - len(todo)} were there "
        f"already; {size:,.0f} MB in {output}"
    )
    if failures:
        raise DatasetError(f"{report}\n- {len(failures)} cannot be decoded:{listing(failures)}")
    print(report)
    if args.output is not None:
        print(f"next: set build_info.videos.storage to {os.path.abspath(output)}")
    return 0


def _extract(video: Path, target: Path, number: int, image_size: int) -> str | None:
    """Extract one video; says why if it cannot be."""
    total = 0

    def choose(num_frames: int) -> Sequence[int]:
        nonlocal total
        total = num_frames
        return sample_frame_indices(num_frames, min(number, num_frames))

    try:
        state = video_state(video)
        frames = decode_file(str(video), choose, image_size)
    except VideoDecodeError as error:
        return error.reason
    target.parent.mkdir(parents=True, exist_ok=True)
    write_extracted_frames(str(target), frames, total, state)
    return None


def _is_extracted(video: Path, target: Path, number: int, image_size: int) -> bool:
    if not target.exists():
        return False
    try:
        about = read_about(str(target))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{target} cannot be read as an archive of frames ({error}). Delete it, and it is "
            "extracted again."
        ) from error
    if not about.is_of(video):
        return False
    found = about.num_frames, about.image_size
    if found != (min(number, about.source_frames), image_size):
        raise ConfigError(
            f"{target} holds {found[0]} frames of {found[1]} px. Name another --output, or delete "
            "such archives."
        )
    return True
