"""Ranks of a process group, forked from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def in_ranks(number: int, do: Callable[[], object], folder: Path, ends_with: int = 0) -> None:
    """Do something in processes with torchrun's environment, in a folder.

    What a rank prints is added to ``rank<r>.out``. The calling process must not have started
    threads: it calls ``torch.set_num_threads(1)`` first.

    Args:
        ends_with: the exit code that every rank must have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(number):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        ranks.append(context.Process(target=_be_a_rank, args=(do, folder, environment)))
        ranks[-1].start()
    for process in ranks:
        process.join()
    if any(process.exitcode != ends_with for process in ranks):
        printed = [(folder / f"rank{r}.out").read_text()[-3000:] for r in range(number)]
        codes = [process.exitcode for process in ranks]
        raise RuntimeError(f"exit {codes}, expected {ends_with}:\n" + "\n".join(printed))


def _be_a_rank(do: Callable[[], object], folder: Path, environment: dict[str, object]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(folder)
    output = open(f"rank{environment['RANK']}.out", "a")
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.stdout = sys.stderr = output
    torch.set_num_threads(1)
    do()
