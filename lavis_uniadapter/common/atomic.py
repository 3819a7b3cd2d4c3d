"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a file beside its place and move it there.

    Raises:
        OSError: the file cannot be written; whatever was at ``path`` is unchanged.
    """
    write_together({Path(path): content})


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write indented JSON with `write_atomic`."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def write_together(contents: Mapping[Path, bytes | str]) -> None:
    """Write several files; none is replaced before all are on the disk.

    Raises:
        OSError: a file cannot be written.
    """
    temporary: dict[Path, str] = {}
    try:
        for path, content in contents.items():
            # The random name keeps processes apart that write the same file.
            handle, temporary[path] = tempfile.mkstemp(".tmp", f".{path.name}-", path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary[path], 0o644)
        for path, name in temporary.items():
            os.replace(name, path)
    finally:
        for name in temporary.values():
            Path(name).unlink(missing_ok=True)
