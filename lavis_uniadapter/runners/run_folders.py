"""Run folders: who works in one, and what a finished run left in it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

CONFIG = "config.json"
SUMMARY = "summary.json"
LOCK = ".lock"
LOG = "log.txt"
# What each query contributes to the metrics of a split, in the run's folder ``result``.
OUTCOMES = "outcomes_{split}.json"
LAVIS_RESULTS = "evaluate.txt"
# Where LAVIS's name or unit of a metric differs: its name, and how many of ours its one is.
LAVIS_METRICS = {
    "accuracy": ("agg_metrics", 1),
    "cider": ("CIDEr", 100),
    "bleu_4": ("Bleu_4", 100),
    "meteor": ("METEOR", 100),
    "rouge_l": ("ROUGE_L", 100),
}
# This task's accuracy, "acc", is a fraction; that of LAVIS's question answering is in percent.
CLASSIFICATION = "multimodal_classification"
# LAVIS names retrieval by what is found: images for a text, texts for an image.
LAVIS_DIRECTIONS = {"t2v": "img", "t2i": "img", "v2t": "txt", "i2t": "txt"}


@dataclass
class BestEpoch:
    """The best epoch so far, by the first validation split.

    Attributes:
        metric: ``agg_metrics``, of which more is better.
        value: the selection metric itself, where it has another name.
        epoch: counted from 0; None before the first validation.
    """

    metric: float = float("-inf")
    value: float | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class RunSummary:
    """What a comparison needs of a run; None where the folder does not tell.

    Attributes:
        metrics: of the test split.
        best: the best validation score (``agg_metrics``, of which more is better).
        seconds: of training and evaluation, earlier processes of the run included.
        peak_bytes: most memory of the main process; on CUDA, of the device.
        outcomes: by metric, what each query contributes; see ``MeasuredTask.write``.
        precision: the number format, such as float32 or bf16.
    """

    seed: int | None
    metrics: Mapping[str, float]
    best: float | None
    trained_parameters: int | None
    total_parameters: int | None
    seconds: float | None
    peak_bytes: int | None
    outcomes: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    precision: str | None = None

    def metric(self, name: str) -> float | None:
        """A metric of the test split, under our name or LAVIS's."""
        if name in self.metrics:
            return self.metrics[name]
        way, _, measure = name.partition("_")
        directed = (f"{LAVIS_DIRECTIONS.get(way)}_{measure}", 1)
        theirs, factor = LAVIS_METRICS.get(name, directed)
        return factor * self.metrics[theirs] if theirs in self.metrics else None


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has used so far; on CUDA, of its device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class FolderInUse(RuntimeError):
    """Another process works in a folder."""


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, until the end of the block or of the process.

    Raises:
        FolderInUse: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK, blocking=False).acquire()
    except Timeout:
        raise FolderInUse(f"Another process works in '{folder}'.") from None
    with lock:
        yield


def is_in_use(folder: Path) -> bool:
    """Whether another process holds a folder."""
    try:
        with sole_user(folder):
            return False
    except FolderInUse:
        return True


def is_finished(folder: Path) -> bool:
    """Whether a run of this package has done all that its configuration asked for."""
    return (folder / SUMMARY).is_file()


def read(folder: Path, split: str = "test") -> RunSummary:
    """Read a run folder.

    Raises:
        FileNotFoundError: if it holds no result of a finished run.
    """
    if is_finished(folder):
        return _read_summary(folder, split)
    if not (folder / LAVIS_RESULTS).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds neither {SUMMARY} nor {LAVIS_RESULTS}: no finished run of this "
            "package's runner or of LAVIS's. Give the folder with checkpoint_best.pth in it."
        )
    metrics = _lavis_results(folder, split)
    return RunSummary(None, metrics, None, _trained_by_lavis(folder), None, None, None)


def _read_summary(folder: Path, split: str) -> RunSummary:
    summary = json.loads((folder / SUMMARY).read_text())
    measured = (summary["metrics"] or {}).get(split, {})
    if summary.get("task") == CLASSIFICATION:
        measured = _in_percent(measured)
    outcomes = folder / "result" / OUTCOMES.format(split=split)
    return RunSummary(
        seed=summary.get("seed"),
        metrics=measured,
        best=summary["best"]["score"],
        trained_parameters=summary["parameters"]["trained"],
        total_parameters=summary["parameters"]["total"],
        seconds=_logged_seconds(folder) or summary["seconds"],
        peak_bytes=summary["peak_bytes"],
        outcomes=json.loads(outcomes.read_text()) if outcomes.is_file() else {},
        precision=summary.get("precision"),
    )


def _lavis_results(folder: Path, split: str) -> dict[str, float]:
    """The last result that a LAVIS task wrote."""
    last = list(json_values((folder / LAVIS_RESULTS).read_text()))[-1]
    if split in last:  # captioning and classification name the split
        last = _in_percent(last[split])
    return {k: v for k, v in last.items() if isinstance(v, int | float)}


def _in_percent(classification: dict[str, float]) -> dict[str, float]:
    """What a classification task measured, with its accuracy in percent and under our name."""
    if "acc" not in classification:
        return classification
    return {**classification, "accuracy": 100 * classification["acc"]}


def _logged_seconds(folder: Path) -> float | None:
    if not (folder / LOG).is_file():
        return None
    lines = json_values((folder / LOG).read_text())
    return sum(v for line in lines for k, v in line.items() if k.endswith("_seconds"))


def json_values(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects one after another, on one line or several."""
    decoder, at = json.JSONDecoder(), 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        value, at = decoder.raw_decode(text, at)
        yield value


def _trained_by_lavis(folder: Path) -> int | None:
    """Parameters that the optimizer in a LAVIS checkpoint has moments of."""
    for path in sorted(folder.glob("checkpoint_*.pth")):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # not worth stopping a comparison for
            logger.warning("'%s': trained parameters unknown, cannot be read: %s", path, error)
            continue
        moments = content["optimizer"]["state"].values()
        return sum(state["exp_avg"].numel() for state in moments)
    return None
