"""SIGTERM and SIGINT: how schedulers and people stop a run that will continue later."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

# sysexits.h: a temporary failure, try again. Schedulers' requeue rules can tell it from an error.
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was stopped before its end. The message says how to continue."""


class InterruptionWatch:
    """Raises `Interrupted` at a signal, or notes it where the run can save its state first.

    As a context manager it replaces the handlers of the signals. A second SIGINT raises
    KeyboardInterrupt.

    Attributes:
        requested: name of the first signal that arrived, or None.
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
        """Inside, a signal is only noted in ``requested``."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1

    def requested_within(self, seconds: float) -> bool:
        """Wait for a signal: one to a whole process group may end the data workers first."""
        until = time.monotonic() + seconds
        while self.requested is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.requested is not None
