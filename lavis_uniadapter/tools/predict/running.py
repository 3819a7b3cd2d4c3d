"""Predict about the files of a folder, so that a killed process can be continued."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from torch import Tensor
from tqdm import tqdm

from lavis_uniadapter.common.atomic import write_text
from lavis_uniadapter.common.distributed import init_process_group, on_main_process
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.resumable import Partial, check_output, continued
from lavis_uniadapter.datasets.records import listing
from lavis_uniadapter.search.engine import batches
from lavis_uniadapter.search.indexing import gathered
from lavis_uniadapter.search.reading import FileToRead, read_parts
from lavis_uniadapter.search.segments import MEDIA_EXTENSIONS, find_media, is_video, take_unusable
from lavis_uniadapter.tools.predict.predictors import Predictor

# What is known of a file: its path below the folder, and size and time.
Found = dict[str, os.stat_result]
Entry = dict[str, Any]


@dataclass
class Summary:
    """What a prediction did.

    Attributes:
        output: the file.
        records: how many it has.
        files: that were read.
        continued: how many files earlier processes had done.
        unreadable: why others could not be read, by path; listed in ``OUTPUT.unreadable.jsonl``.
    """

    output: Path
    records: int
    files: int
    continued: int
    unreadable: dict[str, str]

    def __str__(self) -> str:
        earlier = f", {self.continued} done earlier" if self.continued else ""
        text = f"{self.output}: {self.records} records of {self.files} files{earlier}"
        if not self.unreadable:
            return text
        lines = [f"{path}: {why}" for path, why in self.unreadable.items()]
        return f"{text}\nunreadable: {len(lines)}, in {_unreadable(self.output)}{listing(lines)}"


def _unreadable(output: Path) -> Path:
    return output.with_name(f"{output.name}.unreadable.jsonl")


def predict(
    predictor: Predictor,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    workers: int = 2,
    timeout: float = 120,
    overwrite: bool = False,
) -> Summary | None:
    """Predict about images and videos, of which a recipe's number of frames is read.

    Under torchrun every process takes a share. Called again after a kill, it continues.

    Args:
        source: a folder, searched with its subfolders, or a file.
        output: ``.jsonl`` or ``.csv``; see ``columns`` of the predictor.
        workers: processes that read files. 0: this process reads them, and a file at which the
            decoder crashes or hangs stops it.
        timeout: seconds without a new file after which those being read count as unreadable.
        overwrite: replace an output that exists, and what was begun with another predictor.

    Returns:
        A summary on the main process, None on the others.

    Raises:
        ConfigError, CheckpointError: naming what is wrong.
    """
    init_process_group(predictor.config.run_cfg.device)
    path = Path(output)
    errors = (ConfigError, CheckpointError)

    def find() -> tuple[Path, Found, dict[str, str]]:
        check_output(path, overwrite)
        return find_files(Path(os.path.abspath(source)))

    root, found, odd = on_main_process(find, errors=errors)
    files = predictor.select(found)
    predictor.prepare()
    identity = {"folder": str(root), **predictor.identity()}
    with contextlib.ExitStack() as held:
        opened: list[Partial] = []  # on the main process

        def begin() -> set[str]:
            opened.append(held.enter_context(continued(path, identity, overwrite)))
            earlier = {file: entry["state"] for file, entry in opened[0].done.items()}
            same = {f for f, state in earlier.items() if f in found and state == _state(found[f])}
            return same if predictor.independent or len(same) == len(earlier) else set()

        done = on_main_process(begin, errors=errors)
        # the same batches in every process and after every kill, so that scores are the same
        chunks = [c for c in batches(files, predictor.batch_size) if not done.issuperset(c)]
        mine = chunks[get_rank() :: get_world_size()]
        clips = _read(root, mine, predictor, workers, timeout)
        with tqdm(
            **{"total": len(files), "initial": len(done), "desc": "predict", "unit": " files"},
            disable=not is_main_process(),
        ) as bar:
            for entries in gathered(_entries(predictor, clips, found)):
                bar.update(sum(entry["file"] not in done for entry in entries))
                for partial in opened:
                    partial.add(entries)
        if not opened:
            return None
        return _finish(predictor, opened[0], path, files, odd, len(done))


def find_files(source: Path) -> tuple[Path, Found, dict[str, str]]:
    """The folder of a source, its images and videos, and why some cannot be used.

    Images come first, as they have one frame and are batched apart from videos.

    Raises:
        ConfigError: if there are none.
    """
    if source.is_file() and source.suffix.lower() in MEDIA_EXTENSIONS:
        return source.parent, {source.name: source.stat()}, {}
    if not source.is_dir():
        raise ConfigError(f"There is no folder, image or video '{source}'.")
    found = dict(find_media(source, source))
    if not found:
        raise ConfigError(f"'{source}' holds no images or videos. Check the folder.")
    odd = take_unusable(found)
    return source, dict(sorted(found.items(), key=lambda item: is_video(item[0]))), odd


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]


def _read(
    root: Path, chunks: Sequence[Sequence[str]], predictor: Predictor, workers: int, timeout: float
) -> Iterator[dict[str, Tensor | str]]:
    """The files of each chunk: a clip (frames, size, size, 3), or why it cannot be read."""
    files = [(number, file) for number, chunk in enumerate(chunks) for file in chunk]
    to_read = [FileToRead(position, root / file) for position, (_, file) in enumerate(files)]
    read: dict[int, dict[str, Tensor | str]] = defaultdict(dict)
    left = [len(chunk) for chunk in chunks]
    for part in read_parts(to_read, math.inf, predictor.processor.options, workers, timeout):
        number, file = files[part.file]
        if part.problem is not None:
            read[number][file] = part.problem
        elif part.clips is not None:
            read[number][file] = part.clips[0]
        left[number] -= part.is_last
        if left[number] == 0:
            of_chunk = read.pop(number)
            yield {file: of_chunk[file] for file in chunks[number]}


def _entries(
    predictor: Predictor, chunks: Iterator[dict[str, Tensor | str]], found: Found
) -> Iterator[list[Entry]]:
    """What is noted of the files of each chunk."""
    for chunk in chunks:
        entries: dict[str, Entry] = {}
        by_frames: dict[int, list[str]] = defaultdict(list)
        for file, clip in chunk.items():
            entries[file] = {"file": file, "state": _state(found[file])}
            if isinstance(clip, str):
                entries[file]["problem"] = clip
            else:
                by_frames[len(clip)].append(file)
        for some in by_frames.values():
            clips = torch.stack([chunk[file] for file in some])  # type: ignore[misc]
            for file, records in zip(some, predictor(some, clips), strict=True):
                entries[file]["records"] = records
        yield list(entries.values())


def _finish(
    predictor: Predictor,
    partial: Partial,
    path: Path,
    files: Sequence[str],
    odd: dict[str, str],
    continued: int,
) -> Summary:
    """Write the output, and what could not be read."""
    entries = {file: partial.done[file] for file in sorted(files)}
    readable = {f: entry["records"] for f, entry in entries.items() if "records" in entry}
    unreadable = {f: entry["problem"] for f, entry in entries.items() if "problem" in entry}
    records = predictor.finish(readable)
    summary = Summary(path, len(records), len(readable), continued, {**odd, **unreadable})
    lines = [{"file": file, "reason": why} for file, why in summary.unreadable.items()]
    if lines:
        write_text(_unreadable(path), "".join(f"{json.dumps(line)}\n" for line in lines))
    else:
        _unreadable(path).unlink(missing_ok=True)
    partial.finish(records, predictor.columns)
    return summary
