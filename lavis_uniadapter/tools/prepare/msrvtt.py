"""MSR-VTT: retrieval by the 1k-A protocol (JSFusion), captioning by the official splits."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lavis_uniadapter.common.errors import ConfigError, name_some
from lavis_uniadapter.datasets.records import (
    MAX_NAMED,
    DatasetError,
    Record,
    UnusableFile,
    check_records,
    load_json,
    raise_if_any,
)
from lavis_uniadapter.tools.prepare.annotations import (
    RETRIEVAL,
    AnnotationFile,
    AnyText,
    Identifier,
    PlainName,
    caption_problems,
    count_problems,
    empty_note,
    published,
    read_published,
    retrieval_files,
    without_empty,
    write_annotations,
)
from lavis_uniadapter.tools.prepare.videos import require_videos

BENCHMARK = "MSR-VTT"
# Published numbers of videos; each has 20 captions.
OFFICIAL = {"train": 6513, "validate": 497, "test": 2990}
LAVIS_SPLITS = {"train": "train", "validate": "val", "test": "test"}
CAPTIONS_PER_VIDEO = 20
TRAINING = {"9k": 9000, "7k": 7010}
TEST_1K_A = 1000

VAL = RETRIEVAL["val"]
CAPTIONING = {"train": "cap_train.json", "val": "cap_val.json", "test": "cap_test.json"}

_VIDEO_ID = re.compile(r"video(0|[1-9][0-9]*)")


class Video(Record):
    """An entry of ``videos`` in ``MSRVTT_data.json``."""

    unique = ("video_id",)
    video_id: PlainName
    split: Annotated[Literal["train", "validate", "test"], Field(description=" or ".join(OFFICIAL))]


class Sentence(Record):
    """An entry of ``sentences`` in ``MSRVTT_data.json``."""

    unique = ("video_id", "sen_id")
    video_id: PlainName
    caption: AnyText
    sen_id: Identifier


class Listed(Record):
    """A row of a training list."""

    unique = ("video_id",)
    video_id: PlainName


class Query(Listed):
    """A row of the 1k-A test."""

    sentence: AnyText


def add_parser(commands: argparse._SubParsersAction, parents: Sequence) -> None:
    """Add the command ``msrvtt``."""
    parser = commands.add_parser(
        "msrvtt",
        parents=parents,
        help="MSR-VTT: retrieval (1k-A) and captioning",
        description="Write MSR-VTT's annotations for retrieval (1k-A test) and captioning "
        "(official splits) in LAVIS's layout.",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", required=True, help="MSRVTT_data.json")
    parser.add_argument(
        "--test-csv",
        type=Path,
        metavar="FILE",
        required=True,
        help="MSRVTT_JSFUSION_test.csv: the 1k-A test",
    )
    parser.add_argument(
        "--train-csv",
        type=Path,
        metavar="FILE",
        help="MSRVTT_train.9k.csv or MSRVTT_train.7k.csv; without it, the videos that are not in "
        "--test-csv (9k), or those of the official train and validate splits (7k)",
    )
    parser.add_argument(
        "--split", choices=TRAINING, default="9k", help="training list of retrieval (default 9k)"
    )
    parser.add_argument(
        "--num-val",
        type=int,
        default=0,
        metavar="N",
        help=f"hold N videos out of training as {VAL}, which 1k-A itself does not have "
        "(default 0: none)",
    )
    parser.add_argument("--seed", type=int, default=42, help="picks those N (default 42)")
    parser.add_argument(
        "--retrieval-only",
        action="store_true",
        help="write no cap_*.json, and ask for no videos that only these need",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Write the annotations; returns the report.

    Raises:
        ConfigError, DatasetError: naming what is wrong; nothing has been written.
        FileExistsError: the output folder holds other annotations.
    """
    data = read_data(args.data)
    queries = read_published(args.test_csv, Query)
    test = [query.video_id for query in queries]
    train = _training_list(args, data, test)
    raise_if_any(_list_problems(args, data, train, test), f"{BENCHMARK} cannot be prepared")

    sentences = {query.video_id: [query.sentence] for query in queries}
    files = [
        AnnotationFile(RETRIEVAL["train"], True, _captions_of(train, data.captions)),
        AnnotationFile(RETRIEVAL["test"], False, _captions_of(test, sentences)),
    ]
    if not args.retrieval_only:
        files += _captioning_files(data)
    raise_if_any(caption_problems(files), f"{BENCHMARK} cannot be prepared")
    _refuse_stale_validation(args)

    usable = require_videos(files, args.videos, args.skip_missing, BENCHMARK)
    files = [*hold_out(usable.files[0], args.num_val, args.seed), *usable.files[1:]]
    contents = {file.name: file.records(usable.names) for file in files}
    tasks = {"msrvtt_retrieval": retrieval_files(contents)}
    if not args.retrieval_only:
        tasks["msrvtt_caption"] = CAPTIONING
    return write_annotations(
        args,
        f"{BENCHMARK}, {args.split} training list",
        contents,
        [*empty_note(data.captions, args.data), *usable.notes],
        "1k-A has none; --num-val N holds N videos out of training",
        tasks,
    )


@dataclass(frozen=True)
class MSRVTTData:
    """``MSRVTT_data.json``: official split and captions, each by video_id."""

    splits: Mapping[str, str]
    captions: Mapping[str, list[str]]


def read_data(path: Path) -> MSRVTTData:
    """Read ``MSRVTT_data.json``.

    Raises:
        DatasetError: it is not laid out as published, or contradicts itself.
    """
    try:
        content = load_json(str(path))
    except UnusableFile as error:
        raise DatasetError(f"{error.problem}; download it again.") from error
    if not isinstance(content, Mapping):
        raise DatasetError(f"{path} is not as it is published: it must be an object, {{...}}.")
    videos, sentences = (
        published(path, check_records(content.get(key), schema, f"'{key}' of {path}"))
        for key, schema in (("videos", Video), ("sentences", Sentence))
    )
    splits = {video.video_id: video.split for video in videos}
    captions = defaultdict(list)
    for sentence in sentences:
        captions[sentence.video_id].append(sentence.caption)
    unknown = _unknown_problems(captions, splits, f"'sentences' of {path}", path)
    raise_if_any(unknown, f"{BENCHMARK} cannot be prepared")
    return MSRVTTData(splits, captions)


def hold_out(train: AnnotationFile, num_val: int, seed: int) -> list[AnnotationFile]:
    """`train`, without `num_val` of its videos, and a validation file of these.

    Videos are ranked by a hash of seed and name, so that the pick depends neither on the order
    of a file nor on which other videos are there.

    Raises:
        ConfigError: `num_val` is negative, or leaves nothing to train on.
    """
    if not 0 <= num_val < len(train.captions):
        raise ConfigError(
            f"--num-val is {num_val}; of {len(train.captions)} training videos it must be from 0 "
            f"to {len(train.captions) - 1}."
        )
    if num_val == 0:
        return [train]
    ranked = sorted(
        train.captions, key=lambda video: hashlib.sha256(f"{seed} {video}".encode()).digest()
    )
    held = set(ranked[:num_val])
    val = replace(train, name=VAL, training=False).without(set(ranked[num_val:]))
    return [train.without(held), val]


def _training_list(args: argparse.Namespace, data: MSRVTTData, test: Iterable[str]) -> list[str]:
    if args.train_csv is not None:
        return [row.video_id for row in read_published(args.train_csv, Listed)]
    if args.split == "7k":
        return [video for video, split in data.splits.items() if split in ("train", "validate")]
    tested = set(test)
    return [video for video in data.splits if video not in tested]


def _list_problems(
    args: argparse.Namespace, data: MSRVTTData, train: list[str], test: list[str]
) -> Iterator[str]:
    train_source = args.train_csv or f"the {args.split} training list"
    for videos, source in ((train, train_source), (test, args.test_csv)):
        yield from _unknown_problems(videos, data.splits, source, args.data)
    leaked = sorted(set(train) & set(test))
    if leaked:
        yield (
            f"{len(leaked)} test videos of {args.test_csv} are also in {train_source}: "
            f"{name_some(leaked, MAX_NAMED)}; use the training list that belongs to this test."
        )
    if not args.retrieval_only:
        unnumbered = [video for video in data.splits if not _VIDEO_ID.fullmatch(video)]
        if unnumbered:
            yield (
                "captioning needs a number for image_id, so video_ids must be 'video<number>'; not "
                f"so: {name_some(unnumbered, MAX_NAMED)}. --retrieval-only needs no numbers."
            )
    if not args.allow_other_counts:
        found = list(data.splits.values())
        yield from count_problems(
            {
                f"videos of split {split!r} in {args.data}": (found.count(split), published)
                for split, published in OFFICIAL.items()
            }
            | {
                f"captions in {args.data}": (
                    sum(map(len, data.captions.values())),
                    CAPTIONS_PER_VIDEO * sum(OFFICIAL.values()),
                ),
                f"videos in {train_source} (--split {args.split})": (
                    len(train),
                    TRAINING[args.split],
                ),
                f"videos in {args.test_csv}": (len(test), TEST_1K_A),
            }
        )


def _unknown_problems(
    videos: Iterable[str], known: Mapping[str, str], source: Path | str, data: Path
) -> Iterator[str]:
    unknown = [video for video in dict.fromkeys(videos) if video not in known]
    if unknown:
        yield (
            f"{source} names {len(unknown)} videos that are not among the 'videos' of {data}: "
            f"{name_some(map(repr, unknown), MAX_NAMED)}."
        )


def _captions_of(videos: Iterable[str], captions: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return without_empty({f"{video}.mp4": captions.get(video, []) for video in videos})


def _captioning_files(data: MSRVTTData) -> list[AnnotationFile]:
    return [
        AnnotationFile(
            CAPTIONING[LAVIS_SPLITS[official]],
            official == "train",
            _captions_of(
                (v for v, split in data.splits.items() if split == official), data.captions
            ),
            _image_id,
        )
        for official in OFFICIAL
    ]


def _image_id(video: str) -> int:
    # A whole number, as LAVIS's captioning task takes int() of it.
    return int(_VIDEO_ID.match(video)[1])


def _refuse_stale_validation(args: argparse.Namespace) -> None:
    stale = args.output / VAL
    if args.num_val == 0 and stale.exists():
        raise FileExistsError(
            f"{stale} is left from another run, and its videos would now be trained on. Delete "
            "it, hold as many out again with --num-val, or name another --output."
        )
