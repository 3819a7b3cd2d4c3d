"""SIGTERM and SIGINT: how schedulers and people end a run that is to go on later."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

# sysexits.h: a temporary failure, try again. Told from errors by schedulers' requeue rules.
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to end before it was done. The message says where it can go on."""


class InterruptionWatch:
    """Turns the signals into an `Interrupted`: at once, or where the run can save itself.

    As a context manager it holds the signals; outside they do what they did before. A second
    SIGINT ends the run at once.

    Attributes:
        requested: name of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferring = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> InterruptionWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: object) -> None:
        again = self.requested is not None
        self.requested = self.requested or signal.Signals(number).name
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferring:
            raise Interrupted(self.requested)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted; whoever looks at ``requested`` acts on it."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1

    def requested_within(self, seconds: float) -> bool:
        """Whether a signal has come, or comes soon: one to a whole group reaches workers first."""
        until = time.monotonic() + seconds
        while self.requested is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.requested is not None
