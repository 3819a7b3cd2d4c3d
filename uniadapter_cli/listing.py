"""``uniadapter ls`` and ``uniadapter cp``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from lavis_uniadapter.tools import recipes


def ls(argv: Sequence[str] | None = None) -> int:
    """Print recipes, comparisons, model types and datasets."""
    argparse.ArgumentParser(prog="uniadapter ls", description=ls.__doc__).parse_args(argv)
    runs, comparisons = recipes.runs(), recipes.comparisons()
    sections = {
        "recipes: uniadapter train NAME": _descriptions(runs),
        "comparisons: uniadapter compare NAME": _descriptions(comparisons),
        "model types: model.arch, and its values of model.model_type": {
            arch: ", ".join(types) for arch, types in recipes.model_types().items()
        },
        "datasets, and the recipes that use them": {
            dataset: ", ".join(names) for dataset, names in recipes.datasets(runs).items()
        },
    }
    for title, rows in sections.items():
        width = max(map(len, rows))
        print(title, *(f"  {name:{width}}  {text}" for name, text in rows.items()), "", sep="\n")
    return 0


def _descriptions(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: recipes.description(path) for name, path in files.items()}


def cp(argv: Sequence[str] | None = None) -> int:
    """Copy a recipe or a comparison (compare/NAME) to a file of your own."""
    parser = argparse.ArgumentParser(prog="uniadapter cp", description=cp.__doc__)
    parser.add_argument("name", metavar="NAME", help="from 'uniadapter ls'; compare/NAME")
    parser.add_argument("target", type=Path, metavar="FILE", help="new YAML file")
    args = parser.parse_args(argv)
    print(f"written: {recipes.copy(args.name, args.target)}")
    return 0
