"""The names in LAVIS's registry, without importing LAVIS, which takes seconds."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

from lavis_uniadapter.common import paths
from lavis_uniadapter.common.schema.shapes import GENERATED

DECORATOR = re.compile(r'^@registry\.register_(\w+)\(\s*"([^"]+)"', re.MULTILINE)
KINDS = ("task", "runner", "lr_scheduler", "model", "builder", "processor")
Names = Mapping[str, list[str]]


def in_registry() -> Names:
    """By kind, the names that are registered now."""
    from lavis.common.registry import registry

    return {kind: sorted(registry.mapping[f"{kind}_name_mapping"]) for kind in KINDS}


def in_sources() -> Names | None:
    """By kind, the names that LAVIS and this package will register.

    None if LAVIS has been imported, since other code may have registered names since then, and if
    LAVIS is not installed.
    """
    return _in_sources() if "lavis" not in sys.modules and find_spec("lavis") else None


@cache
def _in_sources() -> Names:
    names = {kind: set[str]() for kind in KINDS} | {"builder": set(GENERATED)}
    for root in paths.package_roots():
        for file in root.rglob("*.py"):
            for kind, name in DECORATOR.findall(file.read_text(encoding="utf-8")):
                names[kind].add(name)
    return {kind: sorted(found) for kind, found in names.items()}
