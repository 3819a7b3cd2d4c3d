"""Relative paths in a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def package_roots() -> Iterator[Path]:
    """The folders of this package and of LAVIS, which is not imported."""
    yield PACKAGE_ROOT
    if lavis := find_spec("lavis"):
        yield from map(Path, lavis.submodule_search_locations or ())


def find(path: str | os.PathLike) -> Path | None:
    """The first that exists: the path itself, the path in this package, the path in LAVIS."""
    candidates = (root / path for root in (Path(), *package_roots()))
    return next((path for path in candidates if os.path.exists(path)), None)
