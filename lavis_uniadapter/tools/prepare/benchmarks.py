"""MSR-VTT and DiDeMo: the published files, and the annotation files made from them."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from lavis_uniadapter.datasets.records import (
    DatasetError,
    FileName,
    Found,
    Problem,
    Record,
    check_records,
    listing,
    problems,
    read_records,
)

R = TypeVar("R", bound=Record)

# Numbers of videos: of MSR-VTT's official splits, each with 20 captions, of its training lists for
# retrieval, of its 1k-A test (JSFusion), each with one query, and of DiDeMo's splits.
MSRVTT = {"train": 6513, "validate": 497, "test": 2990}
MSRVTT_CAPTIONS = 20
MSRVTT_TRAINING = {"9k": 9000, "7k": 7010}
MSRVTT_QUERIES = 1000
DIDEMO = {"train": 8395, "val": 1065, "test": 1004}


@dataclass(frozen=True)
class Split:
    """The content of one annotation file.

    Attributes:
        recipe: trains on it; its dataset builder has the same name.
        name: "train", "val" or "test".
        captions: of each video, by the file name that the published files give it.
        source: where videos are listed, for messages.
        published: number of videos, and of captions of each.
        written: False if only its numbers are checked.
    """

    recipe: str
    name: str
    captions: dict[str, list[str]]
    source: str
    published: tuple[int, int]
    written: bool = True

    @property
    def captioning(self) -> bool:
        """Whether it is for captioning; otherwise it is for retrieval."""
        return self.recipe.endswith("_caption")

    @property
    def file(self) -> str:
        """Name of the file, as LAVIS's builders have it."""
        return f"{'cap' if self.captioning else 'retrieval'}_{self.name}.json"


# LAVIS's captioning task refers to a video by its number.
VideoId = Annotated[str, Field(pattern=r"^video(0|[1-9][0-9]*)$", description="'video<number>'")]
Text = Annotated[str, Field(description="a string")]


class Listed(Record):
    """A row of MSRVTT_train.9k.csv, MSRVTT_train.7k.csv or MSRVTT_JSFUSION_test.csv."""

    unique = "video_id"
    video_id: VideoId
    sentence: Text = ""  # of the test


class Video(Record):
    """An entry of ``videos`` in MSRVTT_data.json."""

    unique = "video_id"
    video_id: VideoId
    split: Annotated[Literal["train", "validate", "test"], Field(description=" or ".join(MSRVTT))]


class Sentence(Record):
    """An entry of ``sentences`` in MSRVTT_data.json."""

    video_id: VideoId
    caption: Text


class Description(Record):
    """A record of DiDeMo's train_data.json, val_data.json or test_data.json."""

    video: FileName
    description: Text


def msrvtt(args: argparse.Namespace) -> Iterator[Split]:
    """MSR-VTT: retrieval by the 1k-A protocol, and captioning by the official splits."""
    try:
        data = json.loads(args.data.read_bytes())
        videos, sentences = data["videos"], data["sentences"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{args.data} is not MSRVTT_data.json as published ({type(error).__name__}: {error}); "
            "download it again."
        ) from error
    listed = _sound(check_records(videos, Video, f"'videos' of {args.data}"))
    official = {video.video_id: video.split for video in listed}
    texts = _sound(check_records(sentences, Sentence, f"'sentences' of {args.data}"))
    captions = _grouped((text.video_id, text.caption) for text in texts)
    queries = {query.video_id: [query.sentence] for query in _read(args.test_csv, Listed)}
    source = f"the {args.split} training list"
    if args.train_csv is not None:
        train = [row.video_id for row in _read(args.train_csv, Listed)]
        source = str(args.train_csv)
    elif args.split == "7k":
        train = [video for video, split in official.items() if split != "test"]
    else:
        train = [video for video in official if video not in queries]

    number = MSRVTT_TRAINING[args.split], MSRVTT_CAPTIONS
    yield Split("msrvtt_retrieval", "train", _files(train, captions), source, number)
    test = _files(queries, queries)
    yield Split("msrvtt_retrieval", "test", test, str(args.test_csv), (MSRVTT_QUERIES, 1))
    for name, videos in MSRVTT.items():
        chosen = _files((v for v, split in official.items() if split == name), captions)
        number, source = (videos, MSRVTT_CAPTIONS), f"split {name!r} of {args.data}"
        name = name.removesuffix("idate")
        yield Split("msrvtt_caption", name, chosen, source, number, not args.retrieval_only)


def didemo(args: argparse.Namespace) -> Iterator[Split]:
    """DiDeMo: retrieval by paragraphs, all descriptions of a video in the order of the file."""
    for name, number in DIDEMO.items():
        if (path := getattr(args, name)) is not None:
            descriptions = _grouped((r.video, r.description) for r in _read(path, Description))
            paragraphs = {v: [" ".join(filter(str.strip, d))] for v, d in descriptions.items()}
            yield Split("didemo_retrieval", name, paragraphs, str(path), (number, 1))


def _read(path: Path, schema: type[R]) -> list[R]:
    return _sound(read_records(path, schema, formats=(".csv", ".json")))


def _sound(items: Iterable[Found[R] | Problem]) -> list[R]:
    items = list(items)
    if wrong := problems(items):
        raise DatasetError(f"The files differ from the published ones:{listing(wrong)}")
    return [item.record for item in items if isinstance(item, Found)]


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for video, text in pairs:
        groups[video].append(text)
    return dict(groups)


def _files(videos: Iterable[str], captions: dict[str, list[str]]) -> dict[str, list[str]]:
    return {f"{video}.mp4": captions.get(video, []) for video in videos}


BENCHMARKS = {"msrvtt": msrvtt, "didemo": didemo}
