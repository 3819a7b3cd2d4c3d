"""What a comparison file asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lavis_uniadapter.common.errors import ConfigError, nearest, reject_unknown_keys

KEYS = (
    "cfg_path",
    "output_dir",
    "metrics",
    "seeds",
    "options",
    "learning_rates",
    "tuning_seed",
    "tuning_options",
    "reference",
    "base",
    "runs",
)
RUN_KEYS = ("cfg_path", "options", "learning_rates", "learning_rate_of", "evaluate")


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
        tuning_options: for the runs that a learning rate is chosen by.
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
        options: for every run, the base's included; they win over the file's.
        output_dir: instead of the file's.

    Raises:
        ConfigError: naming what is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"No comparison file '{path}'.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}' is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"'{path}' is not a mapping of {', '.join(KEYS)}.")
    reject_unknown_keys(content, KEYS, path.name)
    for key in ("output_dir", "metrics", "runs"):
        if not content.get(key):
            raise ConfigError(f"'{path}' has no {key}.")
    _check_types(content, path.name)

    def entry(name: str, section: Mapping[str, Any], common: Sequence[str]) -> Entry:
        reject_unknown_keys(section, RUN_KEYS, f"{path.name}: runs.{name}")
        _check_types(section, f"{path.name}: runs.{name}")
        cfg = section.get("cfg_path", content.get("cfg_path"))
        if not cfg or not (path.parent / cfg).is_file():
            raise ConfigError(f"'{path}': cfg_path of '{name}' is '{cfg}', which is no file.")
        of = section.get("learning_rate_of")
        evaluate = bool(section.get("evaluate", False))
        rates = section.get("learning_rates", content.get("learning_rates")) or ()
        return Entry(
            name=name,
            cfg_path=(path.parent / cfg).resolve(),
            options=(*common, *(section.get("options") or ()), *options),
            learning_rates=() if of or evaluate else tuple(float(rate) for rate in rates),
            learning_rate_of=of,
            evaluate=evaluate,
        )

    entries = tuple(
        entry(name, section or {}, content.get("options") or ())
        for name, section in content["runs"].items()
    )
    by_name = {e.name: e for e in entries}
    for e in entries:
        if e.learning_rate_of and not by_name.get(e.learning_rate_of, e).learning_rates:
            raise ConfigError(
                f"'{path}': learning_rate_of '{e.learning_rate_of}' of '{e.name}' is no run with "
                "learning_rates."
            )
    if len({slug(name) for name in by_name}) < len(entries):
        raise ConfigError(f"'{path}': two runs would have the same folder; rename one.")
    trained = [e.name for e in entries if not e.evaluate]
    reference = content.get("reference", (trained or list(by_name))[0])
    if reference not in by_name:
        raise ConfigError(
            f"'{path}': reference '{reference}' is no run.{nearest(str(reference), by_name)}"
        )
    base = content.get("base")
    return Plan(
        output_dir=Path(output_dir or content["output_dir"]),
        metrics=tuple(content["metrics"]),
        seeds=tuple(content.get("seeds") or (42,)),
        tuning_seed=int(content.get("tuning_seed", 0)),
        tuning_options=tuple(content.get("tuning_options") or ()),
        reference=reference,
        base=entry("base", {**base, "learning_rates": []}, ()) if base else None,
        entries=entries,
    )


# What each key of a comparison file must be, where it is given.
TYPES = {
    "metrics": (list, "a list of names"),
    "seeds": (list, "a list of whole numbers"),
    "options": (list, "a list of section.key=value"),
    "tuning_options": (list, "a list of section.key=value"),
    "learning_rates": (list, "a list of numbers"),
    "runs": (dict, "a mapping of names to what each runs"),
    "base": (dict, "a mapping with cfg_path and options"),
    "evaluate": (bool, "True or False"),
    "learning_rate_of": (str, "the name of a run"),
}


def _check_types(section: Mapping[str, Any], where: str) -> None:
    for key, (kind, description) in TYPES.items():
        if section.get(key) is not None and not isinstance(section[key], kind):
            raise ConfigError(f"{where}: {key} is {section[key]!r}; it must be {description}.")
    for name, run in (section.get("runs") or {}).items():
        if not isinstance(name, str) or not isinstance(run or {}, dict):
            raise ConfigError(f"{where}: runs.{name} must be a name and a mapping.")


def slug(name: str) -> str:
    """A run's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()
