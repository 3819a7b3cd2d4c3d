"""Errors for users: each names what is wrong and how to fix it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# Or a quota is used up, a limit is reached, or the system made a damaged disk read-only.
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class ConfigError(ValueError):
    """A configuration that cannot be run."""


class CheckpointError(RuntimeError):
    """A checkpoint or adapter folder that does not fit the model, or is damaged."""


def disk_problem(error: BaseException) -> str | None:
    """The message about a full disk or a missing permission; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in {*DISK_IS_FULL, errno.EACCES}:
        return None
    return (
        f"'{error.filename}': {error.strerror}. Free some space, correct the permissions or name "
        "another folder, and run the command again."
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_key(key: object, known: Iterable[str], section: str) -> str:
    """The message about a key that a section does not have."""
    hint = nearest(str(key), known) or f" Known keys: {', '.join(sorted(known))}."
    return f"Unknown configuration key '{section}{'.' if section else ''}{key}'.{hint}"


def reject_unknown_keys(given: Iterable[str], known: Iterable[str], section: str) -> None:
    """Raise ConfigError for the first key that is not known."""
    known = set(known)
    for key in given:
        if key not in known:
            raise ConfigError(unknown_key(key, known, section))


def name_some(names: Iterable[str], most: int = 12) -> str:
    """Join names for a message, the first ``most`` of them and how many are left."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
