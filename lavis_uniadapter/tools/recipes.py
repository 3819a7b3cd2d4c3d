"""The recipes of ``projects/``, found by name. Imports neither PyTorch nor LAVIS."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from lavis_uniadapter.common.atomic import atomic
from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema import MODELS

PACKAGE = Path(__file__).resolve().parents[1]
# The demo's tasks: the recipes that train on stills and adapt to clips.
STAGES = {
    "retrieval": ("shapes_pretrain", "shapes_retrieval"),
    "qa": ("shapes_qa_pretrain", "shapes_qa"),
    "caption": ("shapes_caption_pretrain", "shapes_caption"),
}


def _by_name(subfolder: str) -> dict[str, Path]:
    inside = PACKAGE / "projects"  # of an installed package; in a checkout it is beside it
    root = inside if inside.is_dir() else PACKAGE.parent / "projects"
    return {path.stem: path for path in sorted((root / subfolder).glob("*.yaml"))}


def runs() -> dict[str, Path]:
    """What ``train`` and ``evaluate`` take, by name."""
    return _by_name("uniadapter/train") | _by_name("baselines")


def comparisons() -> dict[str, Path]:
    """What ``compare`` takes, by name."""
    return _by_name("uniadapter/compare")


def find(name: str, known: Mapping[str, Path]) -> Path:
    """The file of a recipe, given its name or the path of a file, or a ConfigError."""
    path = known.get(name, Path(name))
    if not path.is_file():
        of_another = name in runs() or name in comparisons()
        hint = " Another command takes it." if of_another else nearest(name, known)
        raise ConfigError(
            f"No configuration file or recipe '{name}' for this command.{hint} 'uniadapter ls' "
            "lists the recipes."
        )
    return path


def copy(name: str, target: Path) -> Path:
    """Copy a recipe, or a comparison given as ``compare/NAME``, or raise ConfigError."""
    known = runs() | {f"compare/{name}": path for name, path in comparisons().items()}
    source = find(name, known)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ConfigError(f"'{target}' exists. Name another file or delete it.")
    if not target.parent.is_dir():
        raise ConfigError(f"No folder '{target.parent}'. Make it, or name another file.")
    with atomic(target) as temporary:
        temporary.write_bytes(source.read_bytes())
    return target


def description(path: Path) -> str:
    """The first part of the comment at the top of a recipe."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"[:;]\s|\.\s", comment)[0].strip(" .\n")


def model_types() -> dict[str, list[str]]:
    """The values of ``model.model_type`` of each of this package's ``model.arch``."""
    return {arch: list(section.files()) for arch, section in MODELS.items()}


def datasets(files: Mapping[str, Path]) -> dict[str, list[str]]:
    """The names of the recipes that use each dataset, by dataset."""
    used: dict[str, list[str]] = {}
    for name, path in files.items():
        for dataset in yaml.safe_load(path.read_text())["datasets"]:
            used.setdefault(dataset, []).append(name)
    return dict(sorted(used.items()))
