"""Errors that a user is meant to read: each names the offending thing and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be run."""


class CheckpointError(RuntimeError):
    """A checkpoint or adapter folder that does not fit the model, or is damaged."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def reject_unknown_keys(given: Iterable[str], known: Iterable[str], section: str) -> None:
    """Raise ConfigError for the first key of a section that nothing reads."""
    known = set(known)
    for key in given:
        if key not in known:
            raise ConfigError(
                f"Unknown configuration key '{section}.{key}'.{nearest(str(key), known)} "
                f"Known keys of '{section}': {', '.join(sorted(known))}."
            )


def name_some(names: Iterable[str], most: int = 12) -> str:
    """Join names for a message, the first ``most`` of them and how many are left."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
