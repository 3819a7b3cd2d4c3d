"""What tasks that predict something for each item have in common, on any number of ranks."""

from __future__ import annotations

import itertools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import apply_to_sample
from lavis.tasks.base_task import BaseTask
from tqdm import tqdm

from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.distributed import gather_to_main
from lavis_uniadapter.datasets.loading import samples_of
from lavis_uniadapter.datasets.reading import Unreadable
from lavis_uniadapter.runners import run_folders

logger = logging.getLogger(__name__)

# Key of the reason with an item, and of the number among the metrics.
UNREADABLE = "unreadable"


class PredictionTask(BaseTask, ABC):
    """Predicts for every item of a split, gathers over ranks, and scores once.

    LAVIS's tasks pass predictions between ranks through files and recognise repetitions by
    ``question_id`` or ``image_id``, which may be no numbers. Here a prediction belongs to a record
    of the dataset's ``annotation``, and every record must have one. Predictions are on file before
    they are scored.

    A subclass answers ``predict``, ``describe`` and ``metrics``, and has in ``NOTHING`` what stands
    for the prediction of an item that cannot be read (``allow_missing``): a wrong one.
    """

    NOTHING: Mapping[str, Any]
    reads_batches = True

    @abstractmethod
    def predict(self, model, samples: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """What is predicted for each item of a batch, under the names that it is saved under."""

    @abstractmethod
    def describe(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved of a record of the annotation, beside its prediction."""

    @abstractmethod
    def metrics(self, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Scores of a split, ``agg_metrics`` among them (more is better)."""

    def outcomes(self, items: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
        """What each item contributes to metrics that are means over items; see write_outcomes."""
        return {}

    def evaluation(self, model, data_loader, **kwargs) -> list[dict[str, Any]] | None:
        """All items of a split with their predictions, on the main process; None on the others.

        Raises:
            RuntimeError: if an item was not predicted exactly once.
        """
        predictions: list[tuple[int, Mapping[str, Any]]] = []
        found: dict[int, Unreadable] = {}
        progress = tqdm(data_loader, "predicting", leave=False, disable=not is_main_process())
        for samples in samples_of(progress, found):
            samples = apply_to_sample(lambda x: x.to(model.device, non_blocking=True), samples)
            indices = map(int, samples["instance_id"])
            predictions += zip(indices, self.predict(model, samples), strict=True)
        # Every rank answers for its share, whether or not its loader is sharded.
        predictions = [p for p in predictions if p[0] % get_world_size() == get_rank()]
        shares = gather_to_main((predictions, found))
        if shares is None:
            return None
        unreadable = {i: fault for _, share in shares for i, fault in share.items()}
        records = data_loader.dataset.annotation
        by_index: dict[int, list[Mapping[str, Any]]] = {i: [] for i in range(len(records))}
        for index, prediction in itertools.chain.from_iterable(share for share, _ in shares):
            by_index[index].append(prediction)
        wrong = [i for i, found in by_index.items() if len(found) != 1]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} of {len(records)} items were not predicted exactly once, the first "
                f"being {records[wrong[0]]}, {len(by_index[wrong[0]])} times. The evaluation "
                "sampler must cover the split: do not shuffle or pad it."
            )
        return [
            {**self.describe(record), **by_index[i][0]}
            | ({**self.NOTHING, UNREADABLE: unreadable[i].reason} if i in unreadable else {})
            for i, record in enumerate(records)
        ]

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        """Write predictions, then metrics, to the run's ``result`` folder; returns the metrics."""
        if val_result is None:
            return None
        path = Path(registry.get_path("result_dir")) / f"{split_name}_epoch_{epoch}.json"
        path.write_text(json.dumps(val_result, indent=1) + "\n")
        metrics = self.metrics(val_result)
        if outcomes := self.outcomes(val_result):
            write_outcomes(outcomes, split_name)
        unreadable = [
            {"index": i, "file": item["file"], "reason": item[UNREADABLE]}
            for i, item in enumerate(val_result)
            if UNREADABLE in item
        ]
        if unreadable:
            metrics[UNREADABLE] = len(unreadable)
        write_unreadable(unreadable, split_name)
        write_metrics(metrics, split_name, epoch)
        return metrics


def write_metrics(metrics: Mapping[str, float], split_name: str, epoch: int | str) -> None:
    """Keep a split's metrics in the run's ``result`` folder and log."""
    path = Path(registry.get_path("result_dir")) / f"metrics_{split_name}_epoch_{epoch}.json"
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    # root logger: to the log file, as LAVIS does, and not to the console
    logging.info("%s, epoch %s: %s", split_name, epoch, json.dumps(metrics))


def write_unreadable(items: Sequence[Mapping[str, Any]], split_name: str) -> None:
    """Keep a list of what was scored as wrong because it could not be read."""
    if items:
        path = Path(registry.get_path("result_dir")) / f"unreadable_{split_name}.json"
        write_json(path, items)
        logger.warning(
            "%s: %d unreadable items are scored as wrong (allow_missing): %s",
            *(split_name, len(items), path),
        )


def write_outcomes(outcomes: Mapping[str, Sequence[Sequence[float]]], split_name: str) -> None:
    """Keep what each query of a split contributes to its metrics, for paired comparisons.

    Args:
        outcomes: by metric, values for each kind of query; the metric is the mean of their means.
    """
    path = Path(registry.get_path("result_dir")) / run_folders.OUTCOMES.format(split=split_name)
    path.write_text(json.dumps(outcomes) + "\n")
