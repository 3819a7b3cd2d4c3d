"""What the tasks have in common: selecting a metric, predicting on any number of ranks, writing."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import apply_to_sample
from lavis.tasks.base_task import BaseTask
from torch.utils.data import Dataset
from tqdm import tqdm

from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.distributed import gather_to_main
from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.common.schema.run import unread
from lavis_uniadapter.datasets.loading import samples_of
from lavis_uniadapter.datasets.reading import Unreadable
from lavis_uniadapter.runners import run_folders

logger = logging.getLogger(__name__)

# Key of the reason in an item, and of the number of items among the metrics.
UNREADABLE = "unreadable"


class MeasuredTask(BaseTask, ABC):
    """A task that writes metrics to the run's folder, one of which selects the best epoch."""

    NAME: str  # in LAVIS's registry
    METHOD: str  # of the models that can run the task
    MODEL: str  # such a model of this package
    DATASETS: tuple[type, ...] = (Dataset,)  # that the task can read
    OTHER_DATASETS: str  # what the others are
    LOWER_IS_BETTER: tuple[str, ...] = ()  # endings of metrics
    reads_batches = True  # of runner_uniadapter's loaders; LAVIS's tasks read samples

    def __init__(self, run_cfg: Mapping[str, Any]):
        BaseTask.__init__(self)
        self.cfg = run_cfg
        self.settings = Evaluation.for_task(self.NAME, run_cfg)
        self.selection_metric = self.settings.selection_metric

    @classmethod
    def setup_task(cls, cfg):
        """Build from a configuration; ConfigError if the model or a setting does not fit."""
        if not cls.fits(registry.get_model_class(cfg.model_cfg.arch)):
            raise ConfigError(
                f"run.task is {cfg.run_cfg.task}, and model.arch '{cfg.model_cfg.arch}' has no "
                f"method '{cls.METHOD}'. Use {cls.MODEL}, or another task."
            )
        # LAVIS's own train script has validated nothing
        if problem := unread(cfg.run_cfg, cfg.run_cfg.get("runner", "runner_base")):
            raise ConfigError(f"run.{problem}")
        return cls(cfg.run_cfg)

    @classmethod
    def fits(cls, model_cls: type) -> bool:
        return hasattr(model_cls, cls.METHOD)

    def build_datasets(self, cfg):
        """LAVIS's datasets, by name and split; ConfigError for one that the task cannot read."""
        datasets = super().build_datasets(cfg)
        for name, splits in datasets.items():
            for dataset in splits.values():
                if not isinstance(dataset, self.DATASETS):
                    raise ConfigError(
                        f"run.task is {self.NAME}, and the dataset '{name}' is a "
                        f"{type(dataset).__name__}, {self.OTHER_DATASETS}"
                    )
        return datasets

    def check_selection_metric(self, known: Sequence[str]) -> None:
        """Raise ConfigError unless ``run.selection_metric`` is one of the task's metrics."""
        if self.selection_metric not in known:
            raise ConfigError(
                f"run.selection_metric is '{self.selection_metric}'."
                f"{nearest(str(self.selection_metric), known)} Known: {', '.join(known)}."
            )

    def write(
        self,
        split_name: str,
        epoch: int | str,
        metrics: Mapping[str, float],
        outcomes: Mapping[str, Sequence[Sequence[float]]],
        unreadable: Sequence[Mapping[str, Any]],
    ) -> dict[str, float]:
        """Write the metrics of a split to the run's ``result`` folder.

        Args:
            outcomes: what each query or item contributes to a metric; see ``retrieval_outcomes``.
            unreadable: ``index``, ``file`` and ``reason`` of what was scored as wrong.

        Returns:
            The metrics, with the number of unreadable items and ``agg_metrics``, which LAVIS
            maximises (0 without the selection metric).
        """
        selected = metrics.get(self.selection_metric, 0.0)
        lower_is_better = self.selection_metric.endswith(self.LOWER_IS_BETTER)
        metrics = {**metrics, "agg_metrics": 1 / selected if lower_is_better else selected}
        if unreadable:
            metrics[UNREADABLE] = len(unreadable)
            path = write_result(f"unreadable_{split_name}.json", unreadable)
            logger.warning(
                "%s: %d unreadable items are scored as wrong (allow_missing): %s",
                *(split_name, len(unreadable), path),
            )
        write_result(f"metrics_{split_name}_epoch_{epoch}.json", metrics)
        # To the root logger: LAVIS writes it to the log file, not to the console.
        logging.info("%s, epoch %s: %s", split_name, epoch, json.dumps(metrics))
        if outcomes:
            write_result(run_folders.OUTCOMES.format(split=split_name), outcomes)
        return metrics


class PredictionTask(MeasuredTask):
    """Predicts for every item of a split, gathers over ranks, and scores once.

    Each record of the dataset's ``annotation`` has one prediction, whatever its id is. (LAVIS's
    tasks need numbers.) Predictions are written before they are scored.
    """

    WRONG_PREDICTION: Mapping[str, Any]  # for an unreadable item (``allow_missing``)

    @abstractmethod
    def predict(self, model, samples: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """A prediction for each item of a batch, as it is written."""

    @abstractmethod
    def describe(self, record: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[str, Any]:
        """What is written of a record of the annotation, beside its file and prediction."""

    @abstractmethod
    def metrics(self, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of a split."""

    def outcomes(self, items: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
        """What each item contributes to metrics that are means over items; see ``write``."""
        return {}

    def evaluation(self, model, data_loader, **kwargs) -> list[dict[str, Any]] | None:
        """All items of a split with their predictions, on the main process; None on the others."""
        predictions: dict[int, dict[str, Any]] = {}
        unreadable: dict[int, Unreadable] = {}
        progress = tqdm(data_loader, "predicting", leave=False, disable=not is_main_process())
        for samples in samples_of(progress, unreadable):
            samples = apply_to_sample(lambda x: x.to(model.device, non_blocking=True), samples)
            indices = map(int, samples["instance_id"])
            predictions.update(zip(indices, self.predict(model, samples), strict=True))
        for index, fault in unreadable.items():
            predictions[index] |= {**self.WRONG_PREDICTION, UNREADABLE: fault.reason}
        shares = gather_to_main(predictions)
        if shares is None:
            return None
        predictions = {index: item for share in shares for index, item in share.items()}
        records = data_loader.dataset.annotation
        if missing := set(range(len(records))).difference(predictions):
            raise RuntimeError(
                f"{len(missing)} of {len(records)} items were not predicted, the first being "
                f"{records[min(missing)]}. The evaluation sampler must cover the split."
            )
        return [
            {
                "file": record.get("video", record.get("image")),
                **self.describe(record, predictions[index]),
                **predictions[index],
            }
            for index, record in enumerate(records)
        ]

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        """Write predictions, then metrics, to the run's ``result`` folder; returns the metrics."""
        write_result(f"{split_name}_epoch_{epoch}.json", val_result)
        unreadable = [
            {"index": index, "file": item["file"], "reason": item[UNREADABLE]}
            for index, item in enumerate(val_result)
            if UNREADABLE in item
        ]
        metrics, outcomes = self.metrics(val_result), self.outcomes(val_result)
        return self.write(split_name, epoch, metrics, outcomes, unreadable)


def write_result(name: str, content: Any) -> Path:
    """Write a JSON file of the run's ``result`` folder; returns its path."""
    path = Path(registry.get_path("result_dir")) / name
    write_json(path, content)
    return path


def visual_kind(dataset: Dataset) -> str:
    """``video`` or ``image``: what a LAVIS dataset shows, by its annotation."""
    return "video" if "video" in dataset.annotation[0] else "image"
