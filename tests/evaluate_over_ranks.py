"""Evaluate recipes, each in several processes.

    python tests/evaluate_over_ranks.py '[[2, ["msrvtt_qa", "run.k_test=2"]], ...]'

The processes are forked from one that has imported everything, which saves seconds for each.
"""

import json
import sys
from pathlib import Path

import torch
from stock_runs import in_processes

import lavis_uniadapter  # noqa: F401
from uniadapter_cli.main import main as uniadapter


def evaluate(arguments: list[str]) -> None:
    if uniadapter(["evaluate", *arguments]):
        raise RuntimeError("the run failed")


if __name__ == "__main__":
    torch.set_num_threads(1)  # no other thread when processes are forked

    for processes, arguments in json.loads(sys.argv[1]):
        in_processes(processes, lambda given=arguments: evaluate(given), Path.cwd())
