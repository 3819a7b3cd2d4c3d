"""Types of command-line arguments, for argparse."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

path = os.path.expanduser  # with the home folder for ~


def checked(
    convert: Callable[[str], T], is_valid: Callable[[T], bool], what: str
) -> Callable[[str], T]:
    """The type of an argument that must be ``what``, as its error message says."""

    def parse(text: str) -> T:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if is_valid(value):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {what}")

    return parse


def _expanded(text: str) -> Path:
    return Path(text).expanduser()


positive = checked(int, lambda number: number >= 1, "a whole number of 1 or more")
count = checked(int, lambda number: number >= 0, "a whole number of 0 or more")
port = checked(int, lambda number: 0 <= number < 65536, "a port, 0 to 65535")
seconds = checked(float, lambda number: 0 < number < math.inf, "a number of seconds above 0")
probability = checked(float, lambda number: 0 <= number <= 1, "a number from 0 to 1")
text = checked(str, lambda value: bool(value.strip()), "a text with words")
folder = checked(_expanded, Path.is_dir, "an existing folder")
file = checked(_expanded, Path.is_file, "an existing file")
# checked before hours of work, not after
new_file = checked(
    _expanded, lambda p: p.parent.is_dir() and not p.is_dir(), "a file in an existing folder"
)
