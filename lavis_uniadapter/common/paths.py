"""Relative paths in a configuration."""

from __future__ import annotations

import os
from pathlib import Path

from lavis.common.registry import registry

PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def find(path: str | os.PathLike) -> Path | None:
    """The first that exists: the path itself, the path in this package, the path in LAVIS."""
    roots = (Path(), PACKAGE_ROOT, Path(registry.get_path("library_root")))
    candidates = (root / Path(path).expanduser() for root in roots)
    return next((path for path in candidates if path.exists()), None)
