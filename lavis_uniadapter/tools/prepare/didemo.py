"""DiDeMo: paragraph retrieval, with all descriptions of a video joined to its one caption."""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lavis_uniadapter.common.errors import name_some
from lavis_uniadapter.datasets.records import MAX_NAMED, Record, raise_if_any
from lavis_uniadapter.tools.prepare.annotations import (
    RETRIEVAL,
    AnnotationFile,
    AnyText,
    Identifier,
    PlainName,
    caption_problems,
    count_problems,
    empty_note,
    read_published,
    retrieval_files,
    without_empty,
    write_annotations,
)
from lavis_uniadapter.tools.prepare.videos import require_videos

BENCHMARK = "DiDeMo"
PUBLISHED = {"train": 8395, "val": 1065, "test": 1004}


class Description(Record):
    """A record of ``train_data.json``, ``val_data.json`` and ``test_data.json``."""

    unique = ("video", "annotation_id")
    video: PlainName
    description: AnyText
    annotation_id: Identifier


def add_parser(commands: argparse._SubParsersAction, parents: Sequence) -> None:
    """Add the command ``didemo``."""
    parser = commands.add_parser(
        "didemo",
        parents=parents,
        help="DiDeMo: paragraph retrieval",
        description="Write DiDeMo's annotations for paragraph retrieval in LAVIS's layout: all "
        "descriptions of a video, in the order of the file, are one caption.",
    )
    parser.add_argument("--train", type=Path, metavar="FILE", required=True, help="train_data.json")
    parser.add_argument(
        "--val",
        type=Path,
        metavar="FILE",
        help="val_data.json; without it there is no validation split",
    )
    parser.add_argument("--test", type=Path, metavar="FILE", required=True, help="test_data.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Write the annotations; returns the report.

    Raises:
        DatasetError: naming what is wrong; nothing has been written.
        FileExistsError: the output folder holds other annotations.
    """
    given = {"train": args.train, "val": args.val, "test": args.test}
    sources = {split: path for split, path in given.items() if path is not None}
    descriptions = {split: read_descriptions(path) for split, path in sources.items()}
    files = [
        AnnotationFile(RETRIEVAL[split], split == "train", _paragraphs(by_video))
        for split, by_video in descriptions.items()
    ]
    faults = [*_leak_problems(files), *caption_problems(files)]
    if not args.allow_other_counts:
        faults += count_problems(
            {
                f"videos in {sources[split]}": (len(by_video), PUBLISHED[split])
                for split, by_video in descriptions.items()
            }
        )
    raise_if_any(faults, f"{BENCHMARK} cannot be prepared")
    usable = require_videos(files, args.videos, args.skip_missing, BENCHMARK)
    contents = {file.name: file.records(usable.names) for file in usable.files}
    empty = [n for split, path in sources.items() for n in empty_note(descriptions[split], path)]
    return write_annotations(
        args,
        f"{BENCHMARK}, paragraph retrieval",
        contents,
        [*empty, *usable.notes],
        "--val names no file",
        {"didemo_retrieval": retrieval_files(contents)},
    )


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """The descriptions of each video, in the order of the file.

    Raises:
        DatasetError: the file is not laid out as published, or repeats an annotation.
    """
    descriptions = defaultdict(list)
    for record in read_published(path, Description):
        descriptions[record.video].append(record.description)
    return dict(descriptions)


def _paragraphs(descriptions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    joined = {video: [" ".join(group)] for video, group in without_empty(descriptions).items()}
    return without_empty(joined)


def _leak_problems(files: Sequence[AnnotationFile]) -> Iterator[str]:
    for one, other in itertools.combinations(files, 2):
        both = [video for video in one.captions if video in other.captions]
        if both:
            yield (
                f"{len(both)} videos are both in {one.name} and {other.name}: "
                f"{name_some(both, MAX_NAMED)}; use the published files of one release."
            )
