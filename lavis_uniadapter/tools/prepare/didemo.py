"""DiDeMo: paragraph retrieval, where a video's descriptions, joined, are its one caption."""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lavis_uniadapter.common.errors import name_some
from lavis_uniadapter.datasets.preflight import MAX_NAMED, raise_if_any
from lavis_uniadapter.tools.prepare.annotations import (
    RETRIEVAL,
    AnnotationFile,
    caption_problems,
    empty_note,
    report,
    retrieval_files,
    training_command,
    without_empty,
    write_together,
)
from lavis_uniadapter.tools.prepare.sources import (
    count_problems,
    file_field,
    id_field,
    read_list,
    repetition_problems,
    text_field,
)
from lavis_uniadapter.tools.prepare.videos import require_videos

BENCHMARK = "DiDeMo"
PUBLISHED = {"train": 8395, "val": 1065, "test": 1004}


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
    sources = {
        split: path
        for split, path in (("train", args.train), ("val", args.val), ("test", args.test))
        if path is not None
    }
    descriptions = {split: read_descriptions(path) for split, path in sources.items()}
    files = [
        AnnotationFile(RETRIEVAL[split], split == "train", _paragraphs(by_video))
        for split, by_video in descriptions.items()
    ]
    problems = [*_leak_problems(files), *caption_problems(files)]
    if not args.allow_other_counts:
        problems += count_problems(
            {
                f"videos in {sources[split]}": (len(by_video), PUBLISHED[split])
                for split, by_video in descriptions.items()
            }
        )
    raise_if_any(problems, f"{BENCHMARK} cannot be prepared")

    usable = require_videos(files, args.videos, args.skip_missing, BENCHMARK)
    contents = {file.name: file.records(usable.names) for file in usable.files}
    changed = write_together(args.output, contents, args.overwrite)
    left_out = [
        note for split, path in sources.items() for note in empty_note(descriptions[split], path)
    ]
    return report(
        f"{BENCHMARK}, paragraph retrieval",
        args.output,
        contents,
        changed,
        [*left_out, *usable.notes],
        "--val names no file",
        [training_command("didemo_retrieval", args.output, retrieval_files(contents), args.videos)],
    )


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """The descriptions of each video, in the order of the file.

    Raises:
        DatasetError: the file is not laid out as published, or repeats an annotation.
    """
    fields = [file_field("video"), text_field("description"), id_field("annotation_id")]
    records = read_list(path, fields)
    problems = repetition_problems(
        (f"{r['video']} annotation_id {r['annotation_id']}" for r in records),
        f"{path} has annotations",
    )
    raise_if_any(problems, f"{BENCHMARK} cannot be prepared")
    descriptions = defaultdict(list)
    for record in records:
        descriptions[record["video"]].append(record["description"])
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
                f"{name_some(both, MAX_NAMED)}; take the published files of one release."
            )
