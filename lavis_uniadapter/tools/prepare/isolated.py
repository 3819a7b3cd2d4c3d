"""Look at files that may crash or hang whatever decodes them, each in a process that may be lost.

`concurrent.futures` gives up all that is left once a worker dies. Here a worker that dies or takes
too long is replaced, the file that did it is named, and the others go on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch

# Forked, as importing this package anew for each worker that is replaced takes seconds. No other
# thread decodes meanwhile, whose locks the fork would leave closed.
_FORK = multiprocessing.get_context("fork")
# How long a killed process may take to go; one that waits for a dead disk does not.
_FAREWELL_SECONDS = 5

Examine = Callable[[str], str | None]


def examine_isolated(
    examine: Examine, paths: Sequence[str], workers: int, seconds: float
) -> Iterator[tuple[str, str | None]]:
    """Examine files in worker processes; closing the iterator ends them at once.

    Args:
        examine: says what is wrong with a file, or None. An exception of it is wrong with the file.
        workers: how many files to look at side by side.
        seconds: that a file may take.

    Yields:
        A path and what is wrong with it or None, as they come.
    """
    waiting = deque(paths)
    busy: dict[Connection, _Worker] = {}
    idle: list[_Worker] = []
    # All of them: an interruption may come while one is in neither of the others. If it comes
    # before one is in here, its pipe ends, and the worker by itself.
    alive: set[_Worker] = set()

    def new_worker() -> _Worker:
        worker = _Worker(examine, seconds, [other.pipe for other in alive])
        alive.add(worker)
        return worker

    def give(path: str, worker: _Worker) -> None:
        worker.take(path, seconds)
        busy[worker.pipe] = worker

    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                give(waiting.popleft(), idle.pop() if idle else new_worker())
            patience = min(worker.deadline for worker in busy.values()) - time.monotonic()
            for pipe in wait(list(busy), max(0, patience)):
                worker = busy.pop(pipe)
                answered, problem = worker.answer()
                if answered:
                    idle.append(worker)
                    yield worker.path, problem
                    continue
                alive.discard(worker)
                if not worker.fresh:
                    # An earlier file may have harmed the process: only what ends a new one is
                    # to blame.
                    give(worker.path, new_worker())
                else:
                    yield worker.path, problem
            now = time.monotonic()
            for worker in [worker for worker in busy.values() if worker.deadline <= now]:
                del busy[worker.pipe]
                alive.discard(worker)
                worker.end()
                yield worker.path, f"it took longer than {seconds:g} s to decode"
    finally:
        for worker in alive:
            worker.end()


class _Worker:
    """A process that examines one file after the other.

    Attributes:
        pipe: to it.
        path: the file that it was given last.
        deadline: when it must have answered, by the monotonic clock.
        fresh: whether it has not answered yet.
    """

    def __init__(self, examine: Examine, seconds: float, others: Sequence[Connection]):
        self.pipe, theirs = _FORK.Pipe()
        self.path = ""
        self.deadline = math.inf
        self.fresh = True
        # Ends of pipes that the fork copies: were they left open in one worker, others would wait
        # for work when this process is gone.
        foreign = [self.pipe, *others]
        self._process = _FORK.Process(
            target=_serve, args=(examine, theirs, foreign, seconds), daemon=True
        )
        # Ctrl-C reaches every process of a terminal. It is blocked for the worker, to whom what is
        # blocked at the fork stays blocked: this process ends it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def take(self, path: str, seconds: float) -> None:
        """Begin with a file."""
        self.path = path
        self.deadline = time.monotonic() + seconds
        # A worker that has died meanwhile does not answer, which is where that is noticed.
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(os.fsencode(path))

    def answer(self) -> tuple[bool, str | None]:
        """Whether it answers, and what is wrong with the file: its answer, or how it died."""
        try:
            # As bytes: what a hostile file may have made of the worker is not to be unpickled.
            problem = self.pipe.recv_bytes()
        except (EOFError, OSError):
            return False, self._cause_of_death()
        self.fresh = False
        return True, os.fsdecode(problem) or None

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.join(_FAREWELL_SECONDS)
        self.pipe.close()

    def _cause_of_death(self) -> str:
        self._process.join(_FAREWELL_SECONDS)
        status = self._process.exitcode
        self.end()
        if status == -signal.SIGKILL:
            return "its decoder was killed (SIGKILL), perhaps as it took too much memory"
        if status is not None and status < 0:
            return f"it crashed the decoder ({signal.Signals(-status).name})"
        return f"it ended the decoder (exit status {status})"


def _serve(
    examine: Examine, pipe: Connection, foreign: Sequence[Connection], seconds: float
) -> None:
    """What a worker does, until its pipe ends."""
    for other in foreign:
        other.close()
    # What decoders print would run through the progress bar.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # OpenMP's threads do not survive a fork; DataLoader's workers do without them, too.
    torch.set_num_threads(1)
    # The end of a worker that hangs when nobody is left to end it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        try:
            path = os.fsdecode(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
            problem = _problem(examine, path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send_bytes(os.fsencode(problem or ""))
        except (EOFError, OSError):  # the check itself has ended
            return


def _problem(examine: Examine, path: str) -> str | None:
    try:
        return examine(path)
    except Exception as error:  # whatever it is, it is this file's
        return f"{type(error).__name__}: {error}"
