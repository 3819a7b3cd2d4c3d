"""Where relative paths of a configuration lead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lavis.common.registry import registry

PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def _candidates(path: str | os.PathLike) -> Iterator[Path]:
    path = Path(path).expanduser()
    yield path
    if not path.is_absolute():
        yield PACKAGE_ROOT / path
        yield Path(registry.get_path("library_root")) / path


def find(path: str | os.PathLike) -> Path | None:
    """First existing of: the path itself, the path in this package, the path in LAVIS."""
    return next((p for p in _candidates(path) if p.exists()), None)
