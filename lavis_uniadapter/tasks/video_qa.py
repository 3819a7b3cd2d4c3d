"""The question answering task, for video and images, on LAVIS's VideoQA builders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.multimodal_classification_datasets import (
    MultimodalClassificationDataset,
)
from lavis.models.alpro_models.alpro_qa import AlproQA

from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.evaluation.answer_metrics import (
    METRICS,
    answer_metrics,
    is_correct,
    question_type,
)
from lavis_uniadapter.tasks.prediction import PredictionTask

logger = logging.getLogger("lavis_uniadapter")

SETTINGS = {"inference_method", "num_ans_candidates", "num_beams", "max_len", "min_len"}


@registry.register_task("video_qa")
class VideoQATask(PredictionTask):
    """VideoQA by ranking the training answers or by generation, scored by exact match.

    LAVIS's ``msrvtt_qa`` and ``msvd_qa`` give all answers that are not a class the same index. Here
    each has an index of its own: the model learns every training answer, ranks those that are
    classes, and is scored on all. LAVIS's ``alpro_qa``, a classifier, has the same classes and
    skips training questions whose answer is not one.

    Settings (``run:``) are those of LAVIS's ``vqa``, and ``selection_metric`` (accuracy).
    """

    NAME, METHOD, MODEL = "video_qa", "predict_answers", "blip_uniadapter_vqa"
    DATASETS = (MultimodalClassificationDataset,)
    OTHER_DATASETS = "without answer classes. For COCO's and Visual Genome's set run.task: vqa."
    WRONG_PREDICTION = {"prediction": ""}
    num_classes: int | None = None  # of a classifier

    @classmethod
    def fits(cls, model_cls):
        return super().fits(model_cls) or issubclass(model_cls, AlproQA)

    def build_datasets(self, cfg):
        """LAVIS's datasets, with class labels for every answer in them.

        Raises:
            ConfigError: for a selection metric that the first validation split does not have.
        """
        datasets = super().build_datasets(cfg)
        labels: dict[str, int] = {}
        every = [dataset for splits in datasets.values() for dataset in splits.values()]
        for dataset in every:
            for answer in sorted(dataset.class_labels, key=dataset.class_labels.get):
                labels.setdefault(answer, len(labels))
        self.answer_list = list(labels)
        if issubclass(registry.get_model_class(cfg.model_cfg.arch), AlproQA):
            self.num_classes = cfg.model_cfg.num_classes
            self._prepare_for_classifier(datasets)
        for dataset in every:
            for record in dataset.annotation:
                labels.setdefault(record["answer"], len(labels))
        for dataset in every:
            dataset.class_labels = labels
        self._answers = list(labels)
        selecting, *_ = cfg.run_cfg.get("valid_splits") or [None]
        validated = [splits[selecting] for splits in datasets.values() if selecting in splits]
        asked = {question_type(r["question"]) for d in validated for r in d.annotation}
        self.check_selection_metric(METRICS)
        if asked and self.selection_metric.removeprefix("accuracy_") not in {"accuracy", *asked}:
            raise ConfigError(
                f"run.selection_metric is '{self.selection_metric}', and the split '{selecting}' "
                "has no question of that type. Use accuracy."
            )
        return datasets

    def _prepare_for_classifier(self, datasets) -> None:
        """Leave out training questions whose answer is not a class: a classifier fails on them."""
        if self.num_classes != len(self.answer_list):
            raise ConfigError(
                f"model.num_classes is {self.num_classes}, and the datasets "
                f"{', '.join(datasets)} have {len(self.answer_list)} answer classes (ans2label). "
                "Make them equal."
            )
        for name, splits in datasets.items():
            if (train := splits.get("train")) is None:
                continue
            every = train.annotation
            train.annotation = [r for r in every if r["answer"] in train.class_labels]
            train._add_instance_ids()
            if left_out := len(every) - len(train):
                logger.warning(
                    "%s, train: %d of %d questions left out: their answers are not classes.",
                    *(name, left_out, len(every)),
                )

    def train_step(self, model, samples: Mapping[str, Any]):
        """Loss of a batch of LAVIS's ``VideoQADataset``: one answer per question, of weight 1."""
        if self.num_classes is not None:
            indices = lavis_versions.numbers(samples["answers"], samples["video"].device)
            answers = {"answers": indices}
        else:
            ones = torch.ones(len(samples["answers"]))
            texts = [self._answers[int(index)] for index in samples["answers"]]
            answers = {"answer": texts, "n_answers": ones.long(), "weight": ones}
        return lavis_versions.train_step_result(model({**samples, **answers})["loss"])

    def predict(self, model, samples):
        if self.num_classes is not None:
            best = model.predict(samples)["predictions"].argmax(dim=1)
            answers = [self.answer_list[i] for i in best.tolist()]
        else:
            settings = self.settings.model_dump(include=SETTINGS)
            answers = model.predict_answers(samples, answer_list=self.answer_list, **settings)
        return [{"prediction": answer} for answer in answers]

    def describe(self, record, prediction):
        return {
            **{key: record[key] for key in ("question_id", "question", "answer")},
            "question_type": question_type(record["question"]),
            "correct": is_correct(record | prediction),
        }

    def metrics(self, items):
        return answer_metrics(items, self.answer_list)

    def outcomes(self, items):
        return {"accuracy": [[100.0 * item["correct"] for item in items]]}
