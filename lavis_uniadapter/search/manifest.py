"""The record of an index, in SQLite: what it was built with, its files and their segments."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.search.segments import Segment
from lavis_uniadapter.search.store import Store

FORMAT_VERSION = 1
FILE = "manifest.sqlite"

_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    hash TEXT,
    problem TEXT
);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
    start REAL NOT NULL,
    end REAL NOT NULL,
    frames TEXT NOT NULL,
    times TEXT NOT NULL,
    feat BLOB NOT NULL,
    frame_feat BLOB NOT NULL
);
CREATE INDEX segments_of_file ON segments (file);
-- Ids that are being added to the store or deleted from it.
CREATE TABLE pending (id INTEGER PRIMARY KEY);
"""


@dataclass(frozen=True)
class IndexedFile:
    """A file of an index.

    Attributes:
        path: relative to the root, with ``/``.
        size, mtime_ns: when it was read.
        hash: of its content; None if it could not be read.
        problem: why it could not be read, or None.
    """

    path: str
    size: int
    mtime_ns: int
    hash: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class StoredSegment:
    """A segment, its number and its file.

    Attributes:
        id: of the segment, never used again.
        file: path relative to the root.
        segment: where in the file.
        feat: (embed_dim,) unit vector, float16.
        frame_feat: (frames, embed_dim) unit vectors, float16.
        size, mtime_ns: of the file when it was read.
    """

    id: int
    file: str
    segment: Segment
    feat: Tensor
    frame_feat: Tensor
    size: int = 0
    mtime_ns: int = 0

    def check_file(self, path: Path) -> None:
        """Check that the file is as it was when it was indexed.

        Raises:
            OSError: if it is not there.
            ValueError: if it has changed.
        """
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ValueError("it has changed; update the index")


class Manifest:
    """Open the record of an index, and create it where there is none.

    Args:
        folder: of the index.
        about: what a new index is built with; see ``Index``. None: there must be one.

    Raises:
        ConfigError: if there is no index, it is of another version, or it is damaged.
    """

    def __init__(self, folder: Path, about: dict[str, Any] | None = None):
        self._path = folder / FILE
        if about is None and not self._path.is_file():
            raise ConfigError(
                f"'{folder}' holds no index. Build one: uniadapter search index DIR --cfg RECIPE "
                f"--index {folder}"
            )
        try:
            self._database = self._connect(writable=about is not None)
            if not self._has_tables():
                if about is None:
                    raise ConfigError(
                        f"The index in '{folder}' is not finished. Run 'uniadapter search index' "
                        "again."
                    )
                self._create({"format": FORMAT_VERSION, **about})
            self.about = self._read_about()
        except sqlite3.OperationalError as error:  # locked, no permission, a full disk
            raise ConfigError(f"The index in '{folder}' cannot be opened: {error}.") from error
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"The index in '{folder}' is damaged ({error}). Delete the folder and build the "
                "index again."
            ) from error
        if self.about.get("format") != FORMAT_VERSION:
            raise ConfigError(
                f"The index in '{folder}' has format {self.about.get('format')}, and this version "
                f"reads {FORMAT_VERSION}. Delete the folder and build the index again."
            )

    def _connect(self, writable: bool) -> sqlite3.Connection:
        target = self._path.absolute().as_uri()
        if not writable and not os.access(self._path.parent, os.W_OK):
            target += "?immutable=1"  # SQLite would make files beside it
        database = sqlite3.connect(target, uri=True, check_same_thread=False, timeout=60)
        database.execute("PRAGMA foreign_keys = ON")
        if writable:
            # readers see the last committed state while an indexer writes
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
        return database

    def _has_tables(self) -> bool:
        found = self._database.execute("SELECT 1 FROM sqlite_master WHERE name = 'about'")
        return found.fetchone() is not None

    def _create(self, about: dict[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in about.items()]
        with self._database:
            self._database.execute("BEGIN")
            for statement in _SCHEMA.split(";"):
                self._database.execute(statement)
            self._database.executemany("INSERT INTO about VALUES (?, ?)", rows)

    def _read_about(self) -> dict[str, Any]:
        rows = self._database.execute("SELECT key, value FROM about")
        return {key: json.loads(value) for key, value in rows}

    def close(self) -> None:
        self._database.close()

    # --- reading ----------------------------------------------------------------------------------

    def files(self) -> dict[str, IndexedFile]:
        """All files by path."""
        rows = self._database.execute("SELECT path, size, mtime_ns, hash, problem FROM files")
        return {row[0]: IndexedFile(*row) for row in rows}

    def counts(self) -> tuple[int, int]:
        """Numbers of readable files and of segments."""
        files = self._database.execute("SELECT COUNT(*) FROM files WHERE problem IS NULL")
        segments = self._database.execute("SELECT COUNT(*) FROM segments")
        return files.fetchone()[0], segments.fetchone()[0]

    def state(self) -> tuple[int, int]:
        """Numbers of segments, and of those that are being added or deleted."""
        row = self._database.execute(
            "SELECT (SELECT COUNT(*) FROM segments), (SELECT COUNT(*) FROM pending)"
        ).fetchone()
        return row[0], row[1]

    def segments(self, ids: Sequence[int]) -> list[StoredSegment]:
        """Segments by their ids, in that order; unknown ids are skipped."""
        rows = self._database.execute(
            "SELECT segments.id, path, start, end, frames, times, feat, frame_feat, size, mtime_ns "
            "FROM segments JOIN files ON files.id = segments.file "
            "WHERE segments.id IN (SELECT value FROM json_each(?))",
            [json.dumps(list(ids))],
        )
        found = {}
        for number, path, start, end, frames, times, feat, frame_feat, *state in rows:
            segment = Segment(start, end, tuple(json.loads(frames)), tuple(json.loads(times)))
            each = _tensor(frame_feat).unflatten(0, (len(segment.times), -1))
            found[number] = StoredSegment(number, path, segment, _tensor(feat), each, *state)
        return [found[number] for number in ids if number in found]

    # --- writing ----------------------------------------------------------------------------------

    @contextmanager
    def pending(self, ids: Sequence[int]) -> Iterator[sqlite3.Connection]:
        """A change of the store and of the record that a killed process leaves undone or whole.

        Inside, the caller changes the store, then the record through the connection. Until both
        are done the ids are noted, for ``recover``.
        """
        with self._database:
            self._database.executemany("INSERT OR IGNORE INTO pending VALUES (?)", _rows(ids))
        with self._database:
            yield self._database
            self._database.execute("DELETE FROM pending")

    def recover(self, store: Store) -> None:
        """Delete what a killed process was adding or deleting; its files are read again."""
        ids = [row[0] for row in self._database.execute("SELECT id FROM pending")]
        if ids:
            store.delete(ids)
            with self._database:
                self._database.execute(
                    "DELETE FROM files WHERE id IN (SELECT file FROM segments WHERE id IN "
                    "(SELECT id FROM pending))"
                )
                self._database.execute("DELETE FROM pending")

    def next_ids(self, number: int) -> range:
        """Ids for new segments."""
        row = self._database.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'segments'"
        ).fetchone()
        last = row[0] if row else 0
        return range(last + 1, last + 1 + number)

    def ids_of(self, paths: Iterable[str]) -> list[int]:
        """Ids of the segments of files."""
        rows = self._database.execute(
            "SELECT segments.id FROM segments JOIN files ON files.id = segments.file "
            "WHERE path IN (SELECT value FROM json_each(?))",
            [json.dumps(list(paths))],
        )
        return [row[0] for row in rows]

    def touch(self, file: IndexedFile) -> None:
        """Note the new size and time of a file whose content is what it was."""
        with self._database:
            self._database.execute(
                "UPDATE files SET size = ?, mtime_ns = ? WHERE path = ?",
                (file.size, file.mtime_ns, file.path),
            )


def delete_files(database: sqlite3.Connection, paths: Iterable[str]) -> None:
    """Delete files with their segments; inside ``Manifest.pending``."""
    database.executemany("DELETE FROM files WHERE path = ?", _rows(paths))


def insert_file(
    database: sqlite3.Connection, file: IndexedFile, segments: Sequence[StoredSegment] = ()
) -> None:
    """Insert a file with its segments, or replace it; inside ``Manifest.pending``."""
    delete_files(database, [file.path])
    cursor = database.execute(
        "INSERT INTO files (path, size, mtime_ns, hash, problem) VALUES (?, ?, ?, ?, ?)",
        (file.path, file.size, file.mtime_ns, file.hash, file.problem),
    )
    database.executemany(
        "INSERT INTO segments (id, file, start, end, frames, times, feat, frame_feat) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(stored.id, cursor.lastrowid, stored.segment.start, stored.segment.end),
                *(json.dumps(stored.segment.frames), json.dumps(stored.segment.times)),
                *(_bytes(stored.feat), _bytes(stored.frame_feat)),
            )
            for stored in segments
        ],
    )


def _bytes(vectors: Tensor) -> bytes:
    return vectors.to(torch.float16).cpu().numpy().tobytes()


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.float16).copy())


def _rows(values: Iterable[Any]) -> list[tuple[Any]]:
    return [(value,) for value in values]
