"""What tasks that predict something for each item have in common, on any number of ranks."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import apply_to_sample
from lavis.tasks.base_task import BaseTask
from tqdm import tqdm


class PredictionTask(BaseTask, ABC):
    """Predicts for every item of a split, gathers over ranks, and scores once.

    LAVIS's tasks pass predictions between ranks through files and recognise repetitions by
    ``question_id`` or ``image_id``, which may be no numbers. Here a prediction belongs to a record
    of the dataset's ``annotation``, and every record must have one. Predictions are on file before
    they are scored.

    A subclass answers ``predict``, ``describe`` and ``metrics``.
    """

    @abstractmethod
    def predict(self, model, samples: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """What is predicted for each item of a batch, under the names that it is saved under."""

    @abstractmethod
    def describe(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved of a record of the annotation, beside its prediction."""

    @abstractmethod
    def metrics(self, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Scores of a split, ``agg_metrics`` among them (more is better)."""

    def evaluation(self, model, data_loader, **kwargs) -> list[dict[str, Any]] | None:
        """All items of a split with their predictions, on the main process; None on the others.

        Raises:
            RuntimeError: if an item got no prediction.
        """
        predictions: dict[int, Mapping[str, Any]] = {}
        progress = tqdm(data_loader, "predicting", leave=False, disable=not is_main_process())
        for samples in progress:
            samples = apply_to_sample(lambda x: x.to(model.device, non_blocking=True), samples)
            indices = map(int, samples["instance_id"])
            predictions.update(zip(indices, self.predict(model, samples), strict=True))
        shares: list = [None] * get_world_size()
        if get_world_size() > 1:
            dist.all_gather_object(shares, predictions)
            predictions = {index: value for share in shares for index, value in share.items()}
        if not is_main_process():
            return None
        records = data_loader.dataset.annotation
        missing = set(range(len(records))) - predictions.keys()
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(records)} items got no prediction, the first being "
                f"{records[min(missing)]}."
            )
        return [{**self.describe(record), **predictions[i]} for i, record in enumerate(records)]

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        """Write predictions, then metrics, to the run's ``result`` folder; returns the metrics."""
        if val_result is None:
            return None
        path = Path(registry.get_path("result_dir")) / f"{split_name}_epoch_{epoch}.json"
        path.write_text(json.dumps(val_result, indent=1) + "\n")
        metrics = self.metrics(val_result)
        write_metrics(metrics, split_name, epoch)
        return metrics


def write_metrics(metrics: Mapping[str, float], split_name: str, epoch: int | str) -> None:
    """Keep a split's metrics in the run's ``result`` folder and log."""
    path = Path(registry.get_path("result_dir")) / f"metrics_{split_name}_epoch_{epoch}.json"
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    # root logger: to the log file, as LAVIS does, and not to the console
    logging.info("%s, epoch %s: %s", split_name, epoch, json.dumps(metrics))
