"""Reads comparison files; ``common.schema.compare`` says what they may hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lavis_uniadapter.common.config import read_yaml
from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema.compare import PlanFile, RunEntry


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a configuration, to be run with several seeds."""

    name: str
    cfg_path: Path
    options: tuple[str, ...]
    learning_rates: tuple[float, ...] = ()
    learning_rate_of: str | None = None
    evaluate: bool = False


@dataclass(frozen=True)
class Plan:
    """What a comparison file asks for.

    Attributes:
        tuning_options: for the runs that choose a learning rate.
        reference: the run that the others' differences are taken from.
    """

    output_dir: Path
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    tuning_options: tuple[str, ...]
    reference: str
    base: Entry | None
    entries: tuple[Entry, ...]


def read_plan(path: Path, options: Sequence[str] = (), output_dir: str | None = None) -> Plan:
    """Read a comparison file.

    Args:
        options: for every run, including the base; they win over the file's.
        output_dir: replaces the file's.

    Raises:
        ConfigError: naming what is wrong.
    """
    content = read_yaml(path)
    try:
        return _plan(PlanFile.read(content, ""), path.parent, options, output_dir)
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error}") from None


def _plan(file: PlanFile, folder: Path, options: Sequence[str], output_dir: str | None) -> Plan:
    def entry(name: str, run: RunEntry, common: Sequence[str]) -> Entry:
        cfg_path = run.cfg_path or file.cfg_path
        if not cfg_path or not (folder / cfg_path).is_file():
            raise ConfigError(f"cfg_path of '{name}' is {cfg_path!r}, which is no file.")
        rates = file.learning_rates if run.learning_rates is None else run.learning_rates
        return Entry(
            name=name,
            cfg_path=(folder / cfg_path).resolve(),
            options=(*common, *run.options, *options),
            learning_rates=() if run.learning_rate_of or run.evaluate else rates,
            learning_rate_of=run.learning_rate_of,
            evaluate=run.evaluate,
        )

    entries = {name: entry(name, run, file.options) for name, run in file.runs.items()}
    for name, each in entries.items():
        of = each.learning_rate_of
        if of and not (of in entries and entries[of].learning_rates):
            raise ConfigError(f"learning_rate_of '{of}' of '{name}' is no run with learning_rates.")
    if len({slug(name) for name in entries}) < len(entries):
        raise ConfigError("two runs would have the same folder; rename one.")
    trained = [name for name, each in entries.items() if not each.evaluate]
    reference = file.reference or [*trained, *entries][0]
    if reference not in entries:
        raise ConfigError(f"reference '{reference}' is no run.{nearest(reference, entries)}")
    base = None
    if file.base is not None:
        base = entry("base", file.base.model_copy(update={"learning_rates": ()}), ())
    return Plan(
        output_dir=Path(output_dir or file.output_dir),
        metrics=file.metrics,
        seeds=file.seeds,
        tuning_seed=file.tuning_seed,
        tuning_options=file.tuning_options,
        reference=reference,
        base=base,
        entries=tuple(entries.values()),
    )


def slug(name: str) -> str:
    """A run's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()
