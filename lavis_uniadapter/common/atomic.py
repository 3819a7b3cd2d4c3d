"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there replaces ``path`` at the end.

    The content reaches the disk before the name does. After an error ``path`` is unchanged. A
    killed process leaves ``.<name>.<random>.tmp`` behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.strerror and not error.filename:  # as of writing to an open file
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself; Windows cannot flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # nor can some network file systems
                os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Remove a folder and its parents if they were made inside the block and end up empty."""
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        yield
    finally:
        for each in new:
            with contextlib.suppress(OSError):  # there is something in it
                each.rmdir()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, with the same bytes on every system, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file, indented, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files; none is replaced before all are on the disk."""
    with contextlib.ExitStack() as written:
        for path, content in contents.items():
            temporary = written.enter_context(atomic(path))
            temporary.write_bytes(content)
            flush(temporary)


def flush(path: Path) -> None:
    """Make sure that a file's content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
