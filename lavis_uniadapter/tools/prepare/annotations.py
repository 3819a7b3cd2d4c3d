"""Annotation files in LAVIS's layout, made from the files that a benchmark is published in."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lavis_uniadapter.common.atomic import write_together
from lavis_uniadapter.common.errors import name_some
from lavis_uniadapter.datasets.records import (
    MAX_NAMED,
    DatasetError,
    Found,
    Problem,
    R,
    escapes_root,
    listing,
    problems,
    read_records,
)

# As LAVIS's dataset builders expect them.
RETRIEVAL = {split: f"retrieval_{split}.json" for split in ("train", "val", "test")}


def _in_no_folder(name: str) -> str:
    if not name.strip() or escapes_root(name) or {"/", "\\"} & set(name):
        raise ValueError("is no plain name")
    return name


# Fields of published records.
PlainName = Annotated[
    str, AfterValidator(_in_no_folder), Field(description="the name of a file, without folders,")
]
AnyText = Annotated[str, Field(description="a string")]
Identifier = Annotated[int | str, Field(description="a whole number or a string")]


def published(source: object, items: Iterator[Found[R] | Problem]) -> list[R]:
    """The records of a published file.

    Args:
        source: the file, for messages.
        items: as read by `records.read_records` or `records.check_records`.

    Raises:
        DatasetError: listing what is wrong, by place.
    """
    items = list(items)
    if wrong := problems(items):
        raise DatasetError(f"{source} is not as it is published:{listing(wrong)}")
    return [item.record for item in items]


def read_published(path: Path, schema: type[R]) -> list[R]:
    """The records of a published CSV file with a header, or JSON list; see `published`."""
    return published(path, read_records(path, schema, formats=(".csv", ".json")))


@dataclass(frozen=True)
class AnnotationFile:
    """The contents of one annotation file.

    Attributes:
        name: of the file.
        training: one record per caption, as LAVIS's training datasets read it; otherwise one
            record per video, with the list of its captions.
        captions: by annotated name of the video.
        image_id: gives the number by which captioning refers to a video; None for retrieval.
    """

    name: str
    training: bool
    captions: Mapping[str, Sequence[str]]
    image_id: Callable[[str], int] | None = None

    def without(self, videos: Collection[str]) -> AnnotationFile:
        kept = {video: self.captions[video] for video in self.captions if video not in videos}
        return replace(self, captions=kept)

    def records(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """The file's contents; `names` gives the file name of each annotated video."""
        records = []
        for video, captions in self.captions.items():
            record = {"video": names[video]}
            if self.image_id is not None:
                record["image_id"] = self.image_id(video)
            if self.training:
                records += [{**record, "caption": caption} for caption in captions]
            else:
                records.append({**record, "caption": list(captions)})
        return records


def without_empty(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """`captions` without blank ones."""
    return {
        video: [caption for caption in group if caption.strip()]
        for video, group in captions.items()
    }


def empty_note(captions: Mapping[str, Sequence[str]], source: Path) -> Iterator[str]:
    """A line for the report, if `without_empty` omits any of `captions`."""
    count = sum(not caption.strip() for group in captions.values() for caption in group)
    if count:
        yield f"{source.name}: {count} empty captions"


def caption_problems(files: Sequence[AnnotationFile]) -> Iterator[str]:
    """A problem for each file with videos that have no caption."""
    for file in files:
        bare = [video for video, captions in file.captions.items() if not captions]
        if bare:
            yield (
                f"{len(bare)} videos of {file.name} have no caption, or empty ones only: "
                f"{name_some(bare, MAX_NAMED)}."
            )


def count_problems(counts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """One problem, if any of `counts`, {what: (found, published)}, has two different numbers."""
    other = [
        f"{what}: found {found}, published {published}"
        for what, (found, published) in counts.items()
        if found != published
    ]
    if other:
        yield (
            "The numbers are not the published ones; use the published files, or accept yours "
            f"with --allow-other-counts:{listing(other)}"
        )


def write_annotations(
    args: argparse.Namespace,
    title: str,
    contents: Mapping[str, Sequence[Mapping[str, Any]]],
    left_out: Sequence[str],
    why_no_val: str,
    tasks: Mapping[str, Mapping[str, str]],
) -> str:
    """Write annotation files, all of them or on an error none; returns the report.

    Args:
        args: of the command line.
        title: of the benchmark.
        contents: records by file name.
        left_out: what of the sources is not in `contents`, and why.
        why_no_val: why there is no validation file, if there is none.
        tasks: names of annotation files by split, for each configuration that trains on them.

    Raises:
        FileExistsError: a file exists with other contents, and --overwrite is not set.
        OSError: a file cannot be written.
    """
    changed = _write(args.output, contents, args.overwrite)
    width = max(map(len, contents))
    lines = [f"{title}, annotations in {args.output}:"]
    for name, records in contents.items():
        videos = len({record["video"] for record in records})
        captions = sum(
            len(record["caption"]) if isinstance(record["caption"], list) else 1
            for record in records
        )
        unchanged = "" if name in changed else "  (was there already)"
        lines.append(f"  {name:<{width}}  {videos:>6} videos  {captions:>7} captions{unchanged}")
    if left_out:
        lines += ["left out:", *(f"  {note}" for note in left_out)]
    if RETRIEVAL["val"] not in contents:
        lines.append(
            f"no {RETRIEVAL['val']}: {why_no_val}. With run.valid_splits=[] the last epoch is "
            "tested."
        )
    commands = [_training_command(name, args, files) for name, files in tasks.items()]
    return "\n".join([*lines, "next:", *commands])


def encode(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Records as JSON, one per line; in ASCII, as LAVIS reads the encoding of the locale."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f"[\n{lines}\n]\n".encode("ascii")


def _write(
    folder: Path, contents: Mapping[str, Sequence[Mapping[str, Any]]], overwrite: bool
) -> list[str]:
    """Write what differs; returns the names of these files."""
    encoded = {folder / name: encode(records) for name, records in contents.items()}
    present = {path: path.read_bytes() for path in encoded if path.is_file()}
    changed = {path: new for path, new in encoded.items() if present.get(path) != new}
    different = [path.name for path in changed if path in present]
    if different and not overwrite:
        raise FileExistsError(
            f"{folder} holds other contents in {', '.join(different)}. Replace them with "
            "--overwrite, or name another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_together(changed)
    return [path.name for path in changed]


def retrieval_files(names: Collection[str]) -> dict[str, str]:
    """Those of the retrieval files that are among `names`, by split."""
    return {split: name for split, name in RETRIEVAL.items() if name in names}


def _training_command(dataset: str, args: argparse.Namespace, files: Mapping[str, str]) -> str:
    """The command that trains by the recipe of a dataset builder's name."""
    build_info = f"datasets.{dataset}.build_info"
    options = [
        # Absolute, as LAVIS's relative paths start at its cache root.
        f"{build_info}.annotations.{split}.storage={os.path.abspath(args.output / name)}"
        for split, name in files.items()
    ]
    options.append(f"{build_info}.videos.storage={os.path.abspath(args.videos)}")
    options.append(f"run.valid_splits=[{'val' if 'val' in files else ''}]")
    return " \\\n      ".join([f"  uniadapter train {dataset}", *map(shlex.quote, options)])
