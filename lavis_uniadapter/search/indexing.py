"""Bring an index up to date with its folder: read, encode and store what is new or has changed."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from torch import Tensor
from tqdm import tqdm

from lavis_uniadapter.common.distributed import gather
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.search.engine import Engine
from lavis_uniadapter.search.manifest import (
    IndexedFile,
    Manifest,
    StoredSegment,
    delete_files,
    insert_file,
)
from lavis_uniadapter.search.reading import FileToRead, Part, read_parts
from lavis_uniadapter.search.segments import Segment, find_media, take_unusable
from lavis_uniadapter.search.store import Store

T = TypeVar("T")


@dataclass
class Summary:
    """What an update did.

    Attributes:
        new, changed, gone: paths of files, relative to the root.
        unchanged: their number.
        unreadable: why each could not be read, by path.
        segments: in the index now.
        files: readable ones in the index now.
    """

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    unchanged: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    files: int = 0
    segments: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.new)} new, {len(self.changed)} changed, {len(self.gone)} gone, "
            f"{self.unchanged} unchanged, {len(self.unreadable)} unreadable",
            f"the index holds {self.segments} segments of {self.files} files",
        ]
        shown = list(self.unreadable.items())[:20]
        lines += [f"  cannot read '{path}': {why}" for path, why in shown]
        if len(self.unreadable) > len(shown):
            lines.append(f"  and {len(self.unreadable) - len(shown)} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Work:
    """What differs between a folder and its index.

    Attributes:
        files: to read, with the hash that is known of each.
        changed: paths of those that the index has in another state.
        gone: paths that are in the index alone.
        unchanged: number of the others.
        unreadable: why some cannot be in an index, by path.
    """

    files: list[IndexedFile]
    changed: set[str]
    gone: list[str]
    unchanged: int
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass
class EncodedFile:
    """A file with the features of its segments, or why it cannot be read.

    Attributes:
        file: its position in the work.
        feat: (embed_dim,) unit vectors, by number of the segment.
        frame_feat: (frames, embed_dim) unit vectors, likewise.
    """

    file: int
    segments: list[Segment] = field(default_factory=list)
    feat: dict[int, Tensor] = field(default_factory=dict)
    frame_feat: dict[int, Tensor] = field(default_factory=dict)
    hash: str | None = None
    problem: str | None = None

    @property
    def is_whole(self) -> bool:
        if self.problem is not None:
            return True
        return self.hash is not None and len(self.feat) == len(self.segments)


def compare(manifest: Manifest, root: Path, scope: Path) -> Work:
    """Compare a folder with its index, by sizes and times.

    Files that could not be read are tried again. Only below ``scope`` can files be gone.

    Raises:
        ConfigError: if the folder has no images or videos, and the index has.
    """
    known = manifest.files()
    prefix = "" if scope == root else scope.relative_to(root).as_posix() + "/"
    present = dict(find_media(root, scope))
    of_scope = {path for path in known if path.startswith(prefix)}
    if not present:
        what = f"; the index has {len(of_scope)} of them" if of_scope else ""
        raise ConfigError(f"'{scope}' holds no images or videos{what}. Check the folder.")
    unreadable = take_unusable(present)
    files = []
    for path, status in present.items():
        now = IndexedFile(path, status.st_size, status.st_mtime_ns)
        before = known.get(path)
        if before is None or before.problem is not None:
            files.append(now)
        elif (before.size, before.mtime_ns) != (now.size, now.mtime_ns):
            files.append(replace(now, hash=before.hash))
    changed = {file.path for file in files if file.hash is not None}
    gone = sorted(of_scope.difference(present))
    return Work(files, changed, gone, len(present) - len(files), unreadable)


def encode_parts(engine: Engine, parts: Iterable[Part]) -> Iterator[list[EncodedFile]]:
    """Encode segments in batches; yields the files that each batch completes.

    Clips are batched with clips of as many frames. Features are in float16, on the CPU.
    """
    unfinished: dict[int, EncodedFile] = {}
    waiting: dict[int, list[tuple[EncodedFile, int, Tensor]]] = defaultdict(list)

    def encode(frames: int) -> None:
        batch = waiting.pop(frames)
        encoded = engine.encode(torch.stack([clip for _, _, clip in batch]))
        feat, frame_feat = encoded.feat.half().cpu(), encoded.frame_feat.half().cpu()
        for i, (file, number, _) in enumerate(batch):
            file.feat[number], file.frame_feat[number] = feat[i].clone(), frame_feat[i].clone()

    def completed() -> list[EncodedFile]:
        whole = [file for file in unfinished.values() if file.is_whole]
        for file in whole:
            del unfinished[file.file]
        return whole

    for part in parts:
        if part.first == 0 and not part.is_last:
            unfinished[part.file] = EncodedFile(part.file)
        file = unfinished.setdefault(part.file, EncodedFile(part.file))
        if part.problem is not None:
            file = unfinished[part.file] = EncodedFile(part.file)
        file.hash, file.problem = part.hash, part.problem
        file.segments += part.segments
        for i, clip in enumerate(part.clips if part.clips is not None else ()):
            queue = waiting[len(clip)]
            queue.append((file, part.first + i, clip))
            if len(queue) == engine.batch_size:
                encode(len(clip))
        yield completed()
    for frames in list(waiting):
        encode(frames)
    yield completed()


def update(
    manifest: Manifest | None,
    store: Store | None,
    engine: Engine,
    work: Work,
    root: Path,
    *,
    window: float,
    workers: int,
    timeout: float,
) -> Summary:
    """Bring an index up to date. Every rank calls it; each encodes its share.

    What is done is committed file by file, so a killed process loses a batch at most.

    Args:
        manifest, store: of the index, on the main process; None on the others.
        work: what to do, the same on every rank.
        window: seconds of a segment.
        workers: processes that read files, beside each rank.
        timeout: seconds without a new segment after which the file being read counts as
            unreadable.
    """
    summary = Summary(gone=work.gone, unchanged=work.unchanged, unreadable=dict(work.unreadable))
    if manifest is not None and store is not None and work.gone:
        _delete(manifest, store, work.gone)
    rank, world = get_rank(), get_world_size()
    to_read = [
        FileToRead(n, root / work.files[n].path, work.files[n].hash)
        for n in range(rank, len(work.files), world)
    ]
    parts = read_parts(to_read, window, engine.processor.options, workers, timeout)
    clips, hidden = 0, not is_main_process() or not work.files
    with tqdm(total=len(work.files), desc="index", unit=" files", disable=hidden) as bar:
        for batch in gathered(encode_parts(engine, parts)):
            if manifest is not None and store is not None:
                _write(manifest, store, work, batch, summary)
            clips += sum(len(done.feat) for done in batch)
            rate = clips / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.1f} clips/s", refresh=False)
            bar.update(len(batch))
    if manifest is not None:
        summary.files, summary.segments = manifest.counts()
    return summary


def gathered(done: Iterator[list[T]]) -> Iterator[list[T]]:
    """What all ranks have done, until the last rank has no more; every rank must iterate."""
    if get_world_size() == 1:
        yield from filter(None, done)
        return
    while True:
        # a batch a round, so that ranks that are done wait in few collectives
        batch = next(filter(None, done), None)
        batches = gather(batch)
        if all(b is None for b in batches):
            return
        yield list(itertools.chain.from_iterable(b for b in batches if b is not None))


def _write(
    manifest: Manifest, store: Store, work: Work, batch: Sequence[EncodedFile], summary: Summary
) -> None:
    """Commit encoded files to the store and the record."""
    to_write = []
    for done in batch:
        before = work.files[done.file]
        if done.hash is not None and done.hash == before.hash:
            manifest.touch(before)
            summary.unchanged += 1
        else:
            to_write.append((replace(before, hash=done.hash, problem=done.problem), done))
    if not to_write:
        return
    old = manifest.ids_of(file.path for file, _ in to_write)
    ids = iter(manifest.next_ids(sum(len(done.segments) for _, done in to_write)))
    rows = [(file, _stored(file.path, done, ids)) for file, done in to_write]
    new = [stored for _, segments in rows for stored in segments]
    with manifest.pending([*old, *(stored.id for stored in new)]) as database:
        store.delete(old)
        if new:
            store.add([s.id for s in new], torch.stack([s.feat for s in new]))
        for file, segments in rows:
            insert_file(database, file, segments)
    for file, _ in rows:
        if file.problem is not None:
            summary.unreadable[file.path] = file.problem
        elif file.path in work.changed:
            summary.changed.append(file.path)
        else:
            summary.new.append(file.path)


def _stored(path: str, done: EncodedFile, ids: Iterator[int]) -> list[StoredSegment]:
    return [
        StoredSegment(next(ids), path, segment, done.feat[i], done.frame_feat[i])
        for i, segment in enumerate(done.segments)
    ]


def _delete(manifest: Manifest, store: Store, paths: Sequence[str]) -> None:
    ids = manifest.ids_of(paths)
    with manifest.pending(ids) as database:
        store.delete(ids)
        delete_files(database, paths)
