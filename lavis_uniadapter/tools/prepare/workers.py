"""Check files in worker processes, as a file may crash or hang whatever decodes it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError, as_completed
from typing import TypeVar

import torch
from pebble import ProcessExpired, ProcessPool

T = TypeVar("T")
Examine = Callable[[T], str | None]


def examine_isolated(
    examine: Examine, files: Sequence[T], workers: int, seconds: float
) -> Iterator[tuple[T, str | None]]:
    """Examine files in worker processes; closing the iterator ends them at once.

    Args:
        examine: says what is wrong with a file, or None; a function of a module, or a partial of
            one. An error that it raises is the file's problem.
        files: what ``examine`` takes.
        workers: how many files are examined at the same time.
        seconds: that a file may take.

    Yields:
        A file and what is wrong with it, or None.
    """
    crashed = []
    for file, outcome in _outcomes(examine, files, workers, seconds):
        if isinstance(outcome, ProcessExpired):
            crashed.append(file)
        else:
            yield file, outcome
    # An earlier file may have damaged the process: only what ends a new one is to blame.
    for file, outcome in _outcomes(examine, crashed, workers, seconds, max_tasks=1):
        yield file, _death(outcome) if isinstance(outcome, ProcessExpired) else outcome


def _outcomes(
    examine: Examine,
    files: Sequence[T],
    workers: int,
    seconds: float,
    max_tasks: int = 0,
) -> Iterator[tuple[T, str | ProcessExpired | None]]:
    if not files:
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        # Imported once by the server; a spawned process imports LAVIS for seconds every time.
        context.set_forkserver_preload([__name__, getattr(examine, "func", examine).__module__])
    pool = ProcessPool(workers, max_tasks, _start_worker, context=context)
    try:
        futures: dict[Future, T] = {
            pool.schedule(_examine_guarded, (examine, seconds, file), timeout=seconds): file
            for file in files
        }
        for future in as_completed(futures):
            try:
                outcome: str | ProcessExpired | None = future.result()
            except TimeoutError:
                outcome = f"it took longer than {seconds:g} s to decode"
            except ProcessExpired as error:
                outcome = error
            except Exception as error:  # whatever it is, this file causes it
                outcome = f"{type(error).__name__}: {error}"
            yield futures[future], outcome
    finally:
        pool.stop()
        pool.join()


def _start_worker() -> None:
    # What decoders print would break the progress bar.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)


def _examine_guarded(examine: Examine, seconds: float, file: T) -> str | None:
    # Ends a worker that hangs after the main process, which would end it, was killed.
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
    problem = examine(file)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    return problem


def _death(error: ProcessExpired) -> str:
    if error.exitcode >= 0:
        return f"it ended the decoder (exit status {error.exitcode})"
    name = signal.Signals(-error.exitcode).name
    if name == "SIGKILL":
        return "its decoder was killed (SIGKILL), perhaps as it took too much memory"
    return f"it crashed the decoder ({name})"
