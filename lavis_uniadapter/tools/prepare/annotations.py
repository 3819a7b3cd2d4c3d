"""Annotation files in LAVIS's layout: what they hold, writing them, and the report about them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.errors import name_some
from lavis_uniadapter.datasets.preflight import MAX_NAMED

Record = dict[str, Any]

# As LAVIS's dataset builders expect them.
RETRIEVAL = {split: f"retrieval_{split}.json" for split in ("train", "val", "test")}


@dataclass(frozen=True)
class AnnotationFile:
    """What one annotation file is to hold.

    Attributes:
        name: of the file.
        training: a record a caption, as LAVIS's training datasets take it; otherwise a record a
            video, with the list of its captions.
        captions: by annotated name of the video.
        image_id: gives the number under which captioning refers to a video; None for retrieval.
    """

    name: str
    training: bool
    captions: Mapping[str, Sequence[str]]
    image_id: Callable[[str], int] | None = None

    def without(self, videos: Collection[str]) -> AnnotationFile:
        kept = {video: self.captions[video] for video in self.captions if video not in videos}
        return replace(self, captions=kept)

    def records(self, names: Mapping[str, str]) -> list[Record]:
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
    """`captions` without those that hold nothing but white space."""
    return {
        video: [caption for caption in group if caption.strip()]
        for video, group in captions.items()
    }


def empty_note(captions: Mapping[str, Sequence[str]], source: Path) -> Iterator[str]:
    """A line for the report, if `without_empty` leaves any of `captions` out."""
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


def write_together(
    folder: Path, contents: Mapping[str, Sequence[Record]], overwrite: bool
) -> list[str]:
    """Write annotation files into `folder`: all of them, or on any error none.

    Each is written beside its place and then moved there; a process that is killed between two of
    these moves, which take microseconds, leaves some moved and some not.

    Args:
        folder: made if need be.
        contents: records by file name.
        overwrite: replace files that differ.

    Returns:
        The names of the files that were not there already with the same contents.

    Raises:
        FileExistsError: a file is there with other contents, and `overwrite` is not set.
        OSError: a file cannot be written.
    """
    encoded = {name: _encode(records) for name, records in contents.items()}
    changed = [name for name in encoded if not _holds(folder / name, encoded[name])]
    different = [name for name in changed if (folder / name).exists()]
    if different and not overwrite:
        raise FileExistsError(
            f"{folder} holds other contents in {', '.join(different)}. Replace them with "
            "--overwrite, or name another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".prepare-*"):  # by a killed run
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=folder) as workplace:
        new, old = Path(workplace, "new"), Path(workplace, "old")
        new.mkdir()
        old.mkdir()
        for name in changed:
            with open(new / name, "wb") as file:
                file.write(encoded[name])
                file.flush()
                os.fsync(file.fileno())
        for name in different:
            shutil.copy2(folder / name, old / name)
        try:
            for name in changed:
                os.replace(new / name, folder / name)
        except BaseException:
            for name in changed:
                if name in different:
                    os.replace(old / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            raise
    return changed


def _encode(records: Sequence[Record]) -> bytes:
    # In ASCII, as LAVIS opens annotations in the encoding of the locale.
    lines = ",\n".join(json.dumps(record) for record in records)
    return f"[\n{lines}\n]\n".encode("ascii")


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def report(
    title: str,
    folder: Path,
    contents: Mapping[str, Sequence[Record]],
    changed: Collection[str],
    left_out: Sequence[str],
    why_no_val: str,
    commands: Sequence[str],
) -> str:
    """What `write_together` wrote, counted in the records themselves, and what to do next.

    Args:
        title: of the benchmark.
        folder, contents, changed: arguments and result of `write_together`.
        left_out: what of the sources is not in `contents`, and why.
        why_no_val: why there is no validation file, where there is none.
        commands: what to type next.
    """
    width = max(map(len, contents))
    lines = [f"{title}, annotations in {folder}:"]
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
    return "\n".join([*lines, "next:", *commands])


def retrieval_files(names: Collection[str]) -> dict[str, str]:
    """Those of the retrieval files that are among `names`, by split."""
    return {split: name for split, name in RETRIEVAL.items() if name in names}


def training_command(dataset: str, folder: Path, files: Mapping[str, str], videos: Path) -> str:
    """The command that trains on annotations in `folder`.

    Args:
        dataset: name of LAVIS's dataset builder, and of the project's configuration file.
        folder: of the annotations.
        files: their names by split; without one of "val", none is validated on.
        videos: folder of the videos.
    """
    build_info = f"datasets.{dataset}.build_info"
    options = [
        # Absolute, as LAVIS takes relative paths from its cache root.
        f"{build_info}.annotations.{split}.storage={os.path.abspath(folder / name)}"
        for split, name in files.items()
    ]
    options.append(f"{build_info}.videos.storage={os.path.abspath(videos)}")
    options.append(f"run.valid_splits=[{'val' if 'val' in files else ''}]")
    command = f"python train.py --cfg-path projects/uniadapter/train/{dataset}.yaml --options"
    return " \\\n      ".join([f"  {command}", *map(shlex.quote, options)])
