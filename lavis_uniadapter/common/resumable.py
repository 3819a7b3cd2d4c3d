"""An output file of records that a killed process continues. Imports neither PyTorch nor LAVIS.

While the work lasts, ``OUTPUT.partial`` has a line of JSON for each file that is done, after a line
that says what the work is. The output is written from it in the end.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lavis_uniadapter.common.atomic import atomic, write_text
from lavis_uniadapter.common.errors import ConfigError, name_some

FORMATS = (".jsonl", ".csv")


def check_output(path: Path, overwrite: bool) -> None:
    """Raise ConfigError if an output cannot be written, or exists and is not to be replaced."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"'{path}': the output's name must end in {' or '.join(FORMATS)}.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"Cannot write into the folder '{path.parent}'. Name another --output.")
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder. Name a file as --output.")
    if path.exists() and not overwrite:
        raise ConfigError(f"'{path}' exists and is complete. To replace it, give --overwrite.")


class Partial:
    """What is done so far, by file. ``continued`` opens it.

    Attributes:
        done: the last entry of each file.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], overwrite: bool):
        self._output, self._path = output, partial_of(output)
        self.done: dict[str, dict[str, Any]] = {}
        identity = json.loads(json.dumps(identity))
        lines = self._read_lines()
        begun, *entries = lines or [identity]
        if different := [key for key in identity if begun.get(key) != identity[key]]:
            if not overwrite:
                raise ConfigError(
                    f"'{self._path}' was begun with another {name_some(different)}. Use the same "
                    "again to continue it, or start anew with --overwrite."
                )
            lines, entries = [], []
        self.done = {entry["file"]: entry for entry in entries}
        if not lines:
            write_text(self._path, json.dumps(identity) + "\n")

    def _read_lines(self) -> list[Any]:
        """The lines of an earlier process, without one that it has not finished."""
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise ConfigError(f"'{self._path}' is damaged. Start anew: delete it.") from None

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write entries, each with the key ``file``.

        Raises:
            ConfigError: if the disk is full.
        """
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            with open(self._path, "a", encoding="ascii") as file:
                file.write(lines)
        except OSError as error:
            raise ConfigError(
                f"Cannot write '{self._path}': {error.strerror}. The same command continues."
            ) from error
        self.done.update({entry["file"]: entry for entry in entries})

    def finish(self, records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Write the output and delete what it was made from."""
        with (
            atomic(self._output) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            if self._output.suffix.lower() == ".csv":
                table = csv.DictWriter(file, columns, lineterminator="\n")
                table.writeheader()
                table.writerows(records)
            else:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        self._path.unlink()


def partial_of(output: Path) -> Path:
    """Where an output that is not complete lies."""
    return output.with_name(f"{output.name}.partial")


@contextlib.contextmanager
def continued(output: Path, identity: Mapping[str, Any], overwrite: bool) -> Iterator[Partial]:
    """Begin or continue the work on an output.

    Args:
        identity: what decides the records, by names for messages.
        overwrite: start anew if the work was begun with another identity.

    Raises:
        ConfigError: if it was, or another process works on the output.
    """
    lock = output.with_name(f".{output.name}.lock")
    try:
        held = FileLock(lock, blocking=False).acquire()
    except Timeout:
        raise ConfigError(f"Another process writes '{output}'.") from None
    with held:
        yield Partial(output, identity, overwrite)
    lock.unlink(missing_ok=True)
