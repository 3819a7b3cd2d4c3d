"""The captioning task, scored against the references in the annotation of a split."""

from __future__ import annotations

from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.video_caption_datasets import VideoCaptionEvalDataset
from torch.utils.data import Dataset

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.evaluation.caption_metrics import METRICS, caption_metrics, has_java
from lavis_uniadapter.tasks.prediction import PredictionTask, visual_kind


@registry.register_task("uniadapter_captioning")
class UniAdapterCaptionTask(PredictionTask):
    """Captioning by beam search, scored against the captions in the annotation of the split.

    LAVIS's ``captioning`` downloads COCO's files and scores against them, whatever the dataset.

    Settings (``run:``): ``num_beams``, ``max_len``, ``min_len``; ``selection_metric`` (cider); and
    ``report_metric: False`` for splits without references, whose captions are written only.
    """

    NAME, METHOD, MODEL = "uniadapter_captioning", "generate", "blip_uniadapter_caption"
    DATASETS = (CaptionDataset, CaptionEvalDataset, VideoCaptionEvalDataset)
    OTHER_DATASETS = "not one of LAVIS's caption datasets. Choose another run.task."
    WRONG_PREDICTION = {"caption": ""}

    def __init__(self, run_cfg):
        super().__init__(run_cfg)
        self.check_selection_metric(METRICS)
        if self.selection_metric == "meteor" and not has_java():
            raise ConfigError("run.selection_metric is meteor, which needs Java. Install Java.")
        self.report_metric = self.settings.report_metric
        if not self.report_metric:
            self.selection_metric = "agg_metrics"

    def build_datasets(self, cfg):
        """LAVIS's datasets; for evaluation, one record per visual input, with all its captions.

        Raises:
            ConfigError: if training captions do not begin with the model's prompt.
            DatasetError: if a record of an evaluation split has no caption to score against.
        """
        datasets = super().build_datasets(cfg)
        for name, splits in datasets.items():
            for split, dataset in splits.items():
                if split == "train":
                    _check_prompt(dataset, cfg.model_cfg.get("prompt") or "", name)
                else:
                    self._merge_captions(dataset, f"{name}, {split}")
        return datasets

    def _merge_captions(self, dataset: Dataset, where: str) -> None:
        key = visual_kind(dataset)
        merged: dict[str, dict[str, Any]] = {}
        for record in dataset.annotation:
            caption = record.get("caption") or []
            captions = [caption] if isinstance(caption, str) else list(caption)
            if not captions and self.report_metric:
                raise DatasetError(
                    f"{where}: {record[key]} has no caption to score against. Add 'caption' to "
                    "the annotation, or set run.report_metric=False to write captions only."
                )
            first = merged.setdefault(record[key], {**record, "caption": []})
            first["caption"] += captions
        dataset.annotation = list(merged.values())
        dataset._add_instance_ids()

    def predict(self, model, samples):
        captions = model.generate(
            samples,
            num_beams=self.settings.num_beams,
            max_length=self.settings.max_len,
            min_length=self.settings.min_len,
        )
        ids = samples["image_id"]
        ids = ids.tolist() if torch.is_tensor(ids) else ids
        return [{"image_id": i, "caption": c} for i, c in zip(ids, captions, strict=True)]

    def describe(self, record, prediction):
        return {"references": record["caption"]}

    def metrics(self, items):
        if not self.report_metric:
            return {}
        return caption_metrics([i["caption"] for i in items], [i["references"] for i in items])


def _check_prompt(dataset: Dataset, prompt: str, name: str) -> None:
    given = getattr(dataset.text_processor, "prompt", "") or ""
    if given != prompt:
        raise ConfigError(
            f"datasets.{name}.text_processor.train.prompt is {given!r} and model.prompt is "
            f'{prompt!r}. Give both the same, e.g. "a picture of ".'
        )
