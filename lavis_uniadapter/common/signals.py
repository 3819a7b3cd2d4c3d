"""SIGINT, SIGTERM and SIGHUP: how people, schedulers and closing terminals stop a process.

A command ends with KeyboardInterrupt. Training saves its state first, so there the handler only
notes the signal, and the run checks for it where it can stop. Without torch, as commands need this
before they import anything.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

# sysexits.h: a temporary failure, try again. Schedulers' requeue rules can tell it from an error.
EXIT_INTERRUPTED = 75
# Windows has no SIGHUP and no SIGCHLD.
SIGNALS = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]
OF_CHILDREN = [each for each in signal.Signals if each.name == "SIGCHLD"]


class Interrupted(Exception):
    """The run was stopped before its end. The message says how to continue."""


@contextlib.contextmanager
def handled_by(
    handler: Callable[[int, object], None], numbers: Sequence[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Inside, a function handles signals, except those that are ignored (``nohup``)."""
    replaced = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
        replaced = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)


def interrupt(number: int, frame: object) -> None:
    """A handler that ends a command in an orderly way: temporary files are removed."""
    raise KeyboardInterrupt(number)


def describe(interrupt: KeyboardInterrupt) -> tuple[int, str]:
    """The exit status that shells expect after a signal, and what to print."""
    number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
    return 128 + number, f"interrupted by {number.name}"


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, signals wait, for starting processes: Python drops what a handler raises in a fork.

    A handler of SIGCHLD that is set inside is removed.
    """
    arrived: list[int] = []
    try:
        with handled_by(lambda number, frame: arrived.append(number), SIGNALS + OF_CHILDREN):
            yield
    finally:
        for number in arrived:
            signal.raise_signal(number)


def leave_to_main_process(worker: int) -> None:
    """In a worker: ignore what a terminal sends to all processes; the main one ends the workers."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


class InterruptionWatch:
    """Notes a signal, so that the run can save its state; a second SIGINT raises KeyboardInterrupt.

    Attributes:
        requested: name of the first signal that arrived, or None.
        deferred: a step has begun; the state can only be saved at its end.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.deferred = False

    def note(self, number: int, frame: object) -> None:
        """The handler, see `handled_by`."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self.requested = self.requested or signal.Signals(number).name

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived. Called wherever a run can stop."""
        if self.requested and not self.deferred:
            raise Interrupted(self.requested)

    def requested_within(self, seconds: float) -> bool:
        """Wait for a signal: one to the whole process group may end the data workers first."""
        until = time.monotonic() + seconds
        while self.requested is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.requested is not None
