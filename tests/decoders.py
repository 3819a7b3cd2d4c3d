"""Decoders that hang, die or harm their process, for worker processes to import."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

_harm: list[str] = []


def crash() -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


HARMS = {
    "hangs": lambda: time.sleep(10**6),
    "crashes": crash,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(3),
    "raises": lambda: {}["a decoder's own error"],
}


def harmful(name: str) -> None:
    """Do what the name says."""
    HARMS.get(name, lambda: None)()


def harmed_by_an_earlier_file(name: str) -> None:
    """Crash, unless this is the first file of its process."""
    if _harm:
        crash()
    _harm.append(name)


def meet(path: str) -> str:
    """Wait for another file of the same folder."""
    Path(os.fsdecode(path)).touch()
    while len(list(Path(path).parent.iterdir())) < 2:
        time.sleep(0.01)
    return os.path.basename(path)


def hang(path: str) -> None:
    """Do not return."""
    time.sleep(10**6)


def interrupt(file: tuple[str, bool], thorough: bool) -> str:
    """Interrupt the check at file b, as a terminal's Ctrl-C, which reaches all processes."""
    folder, name = os.path.split(file[0])
    if name == "b.mp4":
        time.sleep(1)  # the report on a arrives
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(int(Path(folder, "pid").read_text()), signal.SIGINT)
        time.sleep(10**6)
    return f"{name} is bad"
