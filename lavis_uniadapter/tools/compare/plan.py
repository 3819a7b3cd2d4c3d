"""Reads comparison files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lavis_uniadapter.common.config import read_yaml
from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema.compare import PlanFile, RunEntry
from lavis_uniadapter.tools import recipes


def read_plan(path: Path, options: Sequence[str] = (), output_dir: str | None = None) -> PlanFile:
    """Read a comparison file; each run gets the full path of its recipe and all its options.

    ``options`` are for every run, the base included, and win over the file's.

    Raises:
        ConfigError: naming what is wrong.
    """
    content = read_yaml(path)
    try:
        return _complete(PlanFile.read(content, ""), path.parent, options, output_dir)
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error}") from None


def _complete(
    plan: PlanFile, folder: Path, options: Sequence[str], output_dir: str | None
) -> PlanFile:
    known = recipes.runs()

    def complete(name: str, run: RunEntry, common: Sequence[str]) -> RunEntry:
        cfg_path = run.cfg_path or plan.cfg_path
        if cfg_path is None:
            raise ConfigError(f"'{name}' has no cfg_path.")
        file = folder / cfg_path
        path = file if file.is_file() else recipes.find(cfg_path, known)
        rates = plan.learning_rates if run.learning_rates is None else run.learning_rates
        changes = {
            "cfg_path": str(path.resolve()),
            "options": (*common, *run.options, *options),
            "learning_rates": () if run.learning_rate_of or run.evaluate else rates,
        }
        return run.model_copy(update=changes)

    runs = {name: complete(name, run, plan.options) for name, run in plan.runs.items()}
    for name, run in runs.items():
        of = run.learning_rate_of
        if of and not (of in runs and runs[of].learning_rates):
            raise ConfigError(f"learning_rate_of '{of}' of '{name}' is no run with learning_rates.")
    if len(set(map(slug, runs))) < len(runs):
        raise ConfigError("two runs would have the same folder; rename one.")
    trained = [name for name, run in runs.items() if not run.evaluate]
    reference = plan.reference or [*trained, *runs][0]
    if reference not in runs:
        raise ConfigError(f"reference '{reference}' is no run.{nearest(reference, runs)}")
    changes = {
        "cfg_path": None,
        "output_dir": output_dir or plan.output_dir,
        "reference": reference,
        "base": None if plan.base is None else complete("base", plan.base, ()),
        "runs": runs,
    }
    return plan.model_copy(update=changes)


def slug(name: str) -> str:
    """A run's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()
