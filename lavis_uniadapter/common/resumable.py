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
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"Cannot write '{path}'. Name a file in a folder that exists and can be written."
        )
    if path.exists() and not overwrite:
        raise ConfigError(f"'{path}' exists and is complete. To replace it, give --overwrite.")


@contextlib.contextmanager
def continued(output: Path, identity: Mapping[str, Any], overwrite: bool) -> Iterator[Partial]:
    """Begin or continue the work on an output.

    Args:
        identity: what decides the records, by names for messages.
        overwrite: start anew if the work was begun with another identity.

    Raises:
        ConfigError: if it was, or another process works on the output.
    """
    path = output.with_name(f".{output.name}.lock")
    try:
        lock = FileLock(path, blocking=False).acquire()
    except Timeout:
        raise ConfigError(f"Another process is writing '{output}'.") from None
    with lock:
        try:
            yield Partial(output, identity, overwrite)
        finally:
            path.unlink(missing_ok=True)


class Partial:
    """What is done of an output; see ``continued``.

    Attributes:
        done: the last entry of each file, by its name.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], overwrite: bool):
        self._output = output
        self._path = output.with_name(f"{output.name}.partial")
        identity = json.loads(json.dumps(identity))
        begun, *entries = self._read() or [identity]
        different = [key for key in identity if begun.get(key) != identity[key]]
        if different and not overwrite:
            raise ConfigError(
                f"'{self._path}' was begun with another {name_some(different)}. Use the same "
                "again to continue it, or start anew with --overwrite."
            )
        self.done = {} if different else {entry["file"]: entry for entry in entries}
        if not self.done:
            with self._writing():
                write_text(self._path, json.dumps(identity) + "\n")

    def _read(self) -> list[Any]:
        """The lines of an earlier process, without one that it has not finished."""
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise ConfigError(f"'{self._path}' is damaged. Delete it to start anew.") from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the disk is full
            raise ConfigError(
                f"Cannot write '{error.filename or self._path}': {error.strerror}. Fix that "
                "and run the same command again to continue."
            ) from error

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write entries, each with the key ``file``; ConfigError if the disk is full."""
        with self._writing(), open(self._path, "a", encoding="ascii") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        self.done.update({entry["file"]: entry for entry in entries})

    def finish(self, records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Write the output and delete what it was made from."""
        with (
            self._writing(),
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
