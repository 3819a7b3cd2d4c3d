"""Examine files in worker processes, as a file may crash or hang the decoder."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, TimeoutError, as_completed
from functools import partial
from typing import TypeVar

import torch
from pebble import ProcessExpired, ProcessPool

T = TypeVar("T")


def examine_isolated(
    examine: Callable[[T], str | None], files: Sequence[T], workers: int, seconds: float
) -> Generator[tuple[T, str | None], None, None]:
    """Yield each file and what is wrong with it, or None; closing the iterator ends the workers.

    Args:
        examine: says what is wrong with a file, or None; a function of a module, or a partial of
            one. An error that it raises is the file's problem.
        files: what ``examine`` takes.
        workers: number of processes.
        seconds: that a file may take.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:  # imports LAVIS once, not in every worker
        context.set_forkserver_preload([__name__, getattr(examine, "func", examine).__module__])
    # Files whose process died are examined again, each in a new process, as an earlier file may
    # have damaged the first one.
    for tasks_per_process in (0, 1):  # 0: any number
        if not files:
            return
        died: list[T] = []
        pool = ProcessPool(workers, tasks_per_process, _prepare_worker, context=context)
        work = partial(_examine, examine, int(2 * seconds) + 1)
        try:
            futures: dict[Future, T] = {
                pool.schedule(work, (file,), timeout=seconds): file for file in files
            }
            for future in as_completed(futures):
                file = futures[future]
                try:
                    yield file, future.result()
                except TimeoutError:
                    yield file, f"it took longer than {seconds:g} s to decode"
                except ProcessExpired as error:
                    if tasks_per_process == 0:
                        died.append(file)
                    else:
                        yield file, _death(error.exitcode)
                except Exception as error:  # whatever it is, this file causes it
                    yield file, f"{type(error).__name__}: {error}"
        finally:
            pool.stop()
            pool.join()
        files = died


def _prepare_worker() -> None:
    # What decoders print would break the progress bar.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)  # the workers share the cores


def _examine(examine: Callable[[T], str | None], seconds: int, file: T) -> str | None:
    # The alarm ends a worker that hangs after the main process was killed. Windows has none.
    alarm = getattr(signal, "alarm", lambda seconds: None)
    alarm(seconds)
    try:
        return examine(file)
    finally:
        alarm(0)


def _death(exitcode: int) -> str:
    if exitcode >= 0:
        return f"it ended the decoder (exit status {exitcode})"
    name = signal.Signals(-exitcode).name
    hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"its decoder was killed by {name}{hint}"
