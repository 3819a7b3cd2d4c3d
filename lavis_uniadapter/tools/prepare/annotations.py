"""Write the published files of a benchmark as LAVIS's annotations."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.atomic import write_together
from lavis_uniadapter.common.errors import ConfigError, name_some
from lavis_uniadapter.datasets.records import listing, raise_if_any
from lavis_uniadapter.tools.prepare.benchmarks import BENCHMARKS, Split
from lavis_uniadapter.tools.prepare.videos import usable_videos


def prepare(args: argparse.Namespace) -> int:
    """Write the annotation files of a benchmark, all of them or none, and print a report.

    Raises:
        ConfigError, DatasetError: the options, published files or videos cannot be used.
        FileExistsError: the output folder holds other annotations.
    """
    published = list(BENCHMARKS[args.benchmark](args))
    raise_if_any(_faults(published, args.allow_other_counts), "The annotations cannot be written")
    published = [split for split in published if split.written]
    planned = [*hold_out(published[0], args.num_val, args.seed), *published[1:]]
    _check_output(args.output, {split.file for split in planned})  # before hours of decoding
    names = usable_videos(published, args.videos, args.skip_missing)
    usable = [_keep(split, names) for split in published]
    empty = [f"{split.file} would hold no video." for split in usable if not split.captions]
    raise_if_any(empty, "The annotations cannot be written")
    written = [*hold_out(usable[0], args.num_val, args.seed), *usable[1:]]
    contents = {split.file: encode(split, names) for split in written}
    _write(args.output, contents, args.overwrite)

    print(f"annotations in {args.output}:")
    for split in written:
        videos, captions = _size(split)
        print(f"  {split.file:<20}  {videos:>6} videos  {captions:>7} captions")
    for line in _left_out(published, usable):
        print(line)
    print("next:")
    for recipe in dict.fromkeys(split.recipe for split in written):
        print(_training_command([split for split in written if split.recipe == recipe], args))
    return 0


def hold_out(train: Split, number: int, seed: int) -> list[Split]:
    """Move videos to a validation split; returns both.

    A hash of seed and name picks them, whatever the order and whichever others are there.

    Raises:
        ConfigError: the number is negative, or leaves nothing to train on.
    """
    if number == 0:
        return [train]
    total = len(train.captions)
    if not 0 <= number < total:
        raise ConfigError(
            f"--num-val is {number}; of {total} training videos it must be from 0 to {total - 1}."
        )
    ranked = sorted(train.captions, key=lambda v: hashlib.sha256(f"{seed} {v}".encode()).digest())
    return [_keep(train, ranked[number:]), replace(_keep(train, ranked[:number]), name="val")]


def encode(split: Split, names: Mapping[str, str]) -> bytes:
    """An annotation file, in ASCII, as LAVIS reads it in the encoding of the locale.

    ``names`` has the file name of each video.
    """
    records = []
    for video, captions in split.captions.items():
        record: dict[str, Any] = {"video": names[video]}
        if split.captioning:  # LAVIS's task takes int() of it
            record["image_id"] = int(re.findall(r"\d+", video)[0])
        if split.name == "train":
            records += [{**record, "caption": caption} for caption in captions]
        else:
            records.append({**record, "caption": captions})
    lines = ",\n".join(map(json.dumps, records))
    return f"[\n{lines}\n]\n".encode("ascii")


def _keep(split: Split, videos: Collection[str]) -> Split:
    """A split with these videos alone, and without blank captions."""
    videos = set(videos)
    captions = {
        video: [caption for caption in captions if caption.strip()]
        for video, captions in split.captions.items()
        if video in videos
    }
    return replace(split, captions=captions)


def _size(split: Split) -> tuple[int, int]:
    """Numbers of videos and captions."""
    return len(split.captions), sum(map(len, split.captions.values()))


def _faults(published: Sequence[Split], allow_other_counts: bool) -> Iterator[str]:
    """What is wrong with the published files."""
    written = [split for split in published if split.written]
    for one, other in itertools.combinations(written, 2):
        both = sorted(one.captions.keys() & other.captions.keys())
        if both and one.recipe == other.recipe:
            yield (
                f"{len(both)} videos are both in {one.source} and in {other.source}: "
                f"{name_some(both)}; use the published files of one release."
            )
    for split in written:
        bare = [
            video for video, captions in split.captions.items() if not any(map(str.strip, captions))
        ]
        if bare:
            yield f"{len(bare)} videos of {split.file} have no caption: {name_some(bare)}."
    other_counts = []
    for split in published:
        videos, each = split.published
        if _size(split) != (videos, videos * each):
            found = "{} videos and {} captions".format(*_size(split))
            other_counts.append(f"{split.source}: {found}, published {videos} and {videos * each}")
    if other_counts and not allow_other_counts:
        yield (
            "The numbers are not the published ones; use the published files, or accept yours "
            f"with --allow-other-counts:{listing(other_counts)}"
        )


def _check_output(folder: Path, files: Collection[str]) -> None:
    """Check that the folder can be written to, and holds no validation split of another run."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"--output is {folder}, but {existing} is not a folder you can write to.")
    left_over = folder / "retrieval_val.json"
    if left_over.name not in files and left_over.exists():
        raise FileExistsError(
            f"{left_over} was written by another run, and its videos may now be in the training "
            "split. Delete it, hold out the same videos (--num-val, --val), or name another "
            "--output."
        )


def _write(folder: Path, contents: Mapping[str, bytes], overwrite: bool) -> None:
    files = {folder / name: content for name, content in contents.items()}
    other = [path for path, new in files.items() if path.is_file() and path.read_bytes() != new]
    if other and not overwrite:
        raise FileExistsError(
            f"{', '.join(map(str, other))} exist with other contents. Replace them with "
            "--overwrite, or name another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_together(files)


def _left_out(published: Sequence[Split], usable: Sequence[Split]) -> Iterator[str]:
    for before, after in zip(published, usable, strict=True):
        videos, captions = (b - a for b, a in zip(_size(before), _size(after), strict=True))
        if captions:
            unusable = sorted(before.captions.keys() - after.captions.keys())
            why = f"; missing or undecodable: {name_some(unusable)}" if unusable else ""
            yield f"left out of {before.file}: {videos} videos, {captions} captions{why}"


def _training_command(splits: Sequence[Split], args: argparse.Namespace) -> str:
    build_info = f"datasets.{splits[0].recipe}.build_info"
    options = [
        # Absolute, as LAVIS's relative paths start at its cache root.
        f"{build_info}.annotations.{s.name}.storage={os.path.abspath(args.output / s.file)}"
        for s in splits
    ]
    options.append(f"{build_info}.videos.storage={os.path.abspath(args.videos)}")
    has_val = any(split.name == "val" for split in splits)
    # without validation the last epoch is tested
    options.append(f"run.valid_splits=[{'val' if has_val else ''}]")
    command = f"  uniadapter train {splits[0].recipe}"
    return " \\\n      ".join([command, *map(shlex.quote, options)])
