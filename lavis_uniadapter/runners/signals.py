"""SIGTERM and SIGINT: how schedulers and people stop a run that will continue later."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

# sysexits.h: a temporary failure, try again. Schedulers' requeue rules can tell it from an error.
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was stopped before its end. The message says how to continue."""


class InterruptionWatch:
    """Notes a signal, so that the run can save its state; a second SIGINT raises KeyboardInterrupt.

    As a context manager it replaces the handlers of the signals.

    Attributes:
        requested: name of the first signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._raises = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptionWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name
        if self._raises:
            raise Interrupted(self.requested)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises `Interrupted`, also one that arrived before."""
        self._raises = True
        try:
            if self.requested:
                raise Interrupted(self.requested)
            yield
        finally:
            self._raises = False

    def requested_within(self, seconds: float) -> bool:
        """Wait for a signal: one to the whole process group may end the data workers first."""
        until = time.monotonic() + seconds
        while self.requested is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.requested is not None
