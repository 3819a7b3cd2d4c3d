"""The captioning task, scored against the data set's own references."""

from __future__ import annotations

from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.video_caption_datasets import VideoCaptionEvalDataset
from torch.utils.data import Dataset

from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.datasets.preflight import DatasetError
from lavis_uniadapter.evaluation.caption_metrics import METRICS, caption_metrics, has_java
from lavis_uniadapter.runners import stock_runners
from lavis_uniadapter.tasks.prediction import PredictionTask

CAPTION_DATASETS = (CaptionDataset, CaptionEvalDataset, VideoCaptionEvalDataset)


@registry.register_task("uniadapter_captioning")
class UniAdapterCaptionTask(PredictionTask):
    """Captioning by beam search, scored against the captions in the annotation of the split.

    LAVIS's ``captioning`` scores against COCO's files, whatever the data set, and downloads them.

    Settings (``run:``): ``num_beams`` (3), ``max_len`` (30) and ``min_len`` (5) in tokens;
    ``report_metric`` (True): False for a split without references, whose captions are written and
    not scored; ``selection_metric`` (cider): what picks the best epoch.
    """

    NOTHING = {"caption": ""}

    def __init__(
        self,
        *,
        num_beams: int = 3,
        max_len: int = 30,
        min_len: int = 5,
        report_metric: bool = True,
        selection_metric: str = "cider",
    ):
        super().__init__()
        self.num_beams = num_beams
        self.max_len = max_len
        self.min_len = min_len
        self.report_metric = report_metric
        self.selection_metric = selection_metric

    @classmethod
    def setup_task(cls, cfg):
        """Build from a configuration.

        Raises:
            ConfigError: for a model that writes no captions, or an unknown metric.
        """
        run = cfg.run_cfg
        if not hasattr(registry.get_model_class(cfg.model_cfg.arch), "generate"):
            raise ConfigError(
                f"run.task is uniadapter_captioning, and model.arch '{cfg.model_cfg.arch}' writes "
                "no captions. Take blip_uniadapter_caption."
            )
        stock_runners.check(run)
        settings = Evaluation.for_task("uniadapter_captioning", run)
        metric = settings.selection_metric
        if metric not in METRICS:
            raise ConfigError(
                f"run.selection_metric is '{metric}'.{nearest(str(metric), METRICS)} "
                f"Known: {', '.join(METRICS)}."
            )
        if metric == "meteor" and not has_java():
            raise ConfigError("run.selection_metric is meteor, which needs Java; install it.")
        return cls(
            selection_metric=metric if settings.report_metric else "agg_metrics",
            num_beams=settings.num_beams,
            max_len=settings.max_len,
            min_len=settings.min_len,
            report_metric=settings.report_metric,
        )

    def build_datasets(self, cfg):
        """LAVIS's datasets; for evaluation, one record a visual input, with all its captions.

        Raises:
            ConfigError: for a dataset that is none of LAVIS's for captioning, or if training
                captions do not begin with the model's prompt.
            DatasetError: if a record of an evaluation split has no caption to score against.
        """
        datasets = super().build_datasets(cfg)
        for name, splits in datasets.items():
            for split, dataset in splits.items():
                if not isinstance(dataset, CAPTION_DATASETS):
                    raise ConfigError(
                        f"run.task is uniadapter_captioning, and '{name}', {split} is a "
                        f"{type(dataset).__name__}, which is none of LAVIS's caption datasets."
                    )
                if split == "train":
                    _check_prompt(dataset, cfg.model_cfg.get("prompt") or "", name)
                else:
                    self._merge_captions(dataset, f"{name}, {split}")
        return datasets

    def _merge_captions(self, dataset: Dataset, where: str) -> None:
        key = "video" if "video" in dataset.annotation[0] else "image"
        merged: dict[str, dict[str, Any]] = {}
        for record in dataset.annotation:
            caption = record.get("caption") or []
            captions = [caption] if isinstance(caption, str) else list(caption)
            if not captions and self.report_metric:
                raise DatasetError(
                    f"{where}: {record[key]} has no caption to score against. Add 'caption' to "
                    "the annotation, or write captions alone by run.report_metric=False."
                )
            first = merged.setdefault(record[key], {**record, "caption": []})
            first["caption"] += captions
        dataset.annotation = list(merged.values())
        dataset._add_instance_ids()

    def predict(self, model, samples):
        captions = model.generate(
            samples,
            use_nucleus_sampling=False,
            num_beams=self.num_beams,
            max_length=self.max_len,
            min_length=self.min_len,
        )
        ids = samples["image_id"]
        ids = ids.tolist() if torch.is_tensor(ids) else ids
        return [
            {"image_id": i, "caption": caption} for i, caption in zip(ids, captions, strict=True)
        ]

    def describe(self, record):
        return {
            "file": record.get("video", record.get("image")),
            "references": record["caption"],
        }

    def metrics(self, items):
        if not self.report_metric:
            return {"agg_metrics": 0.0}
        metrics = caption_metrics(
            [item["caption"] for item in items], [item["references"] for item in items]
        )
        return {**metrics, "agg_metrics": metrics[self.selection_metric]}


def _check_prompt(dataset: Dataset, prompt: str, name: str) -> None:
    given = getattr(dataset.text_processor, "prompt", "") or ""
    if given != prompt:
        raise ConfigError(
            f"datasets.{name}.text_processor.train.prompt is {given!r} and model.prompt is "
            f'{prompt!r}. Give both the same, e.g. "a picture of ".'
        )
