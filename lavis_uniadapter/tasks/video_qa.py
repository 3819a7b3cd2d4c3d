"""The question answering task, for video and images, on LAVIS's VideoQA builders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.multimodal_classification_datasets import (
    MultimodalClassificationDataset,
)
from lavis.models.alpro_models.alpro_qa import AlproQA
from lavis.tasks.base_task import BaseTask
from lavis.tasks.vqa import VQATask

from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.evaluation.answer_metrics import (
    OTHER,
    QUESTION_TYPES,
    answer_metrics,
    is_correct,
    question_type,
)
from lavis_uniadapter.runners import stock_runners
from lavis_uniadapter.tasks.prediction import PredictionTask

logger = logging.getLogger("lavis_uniadapter")


@registry.register_task("video_qa")
class VideoQATask(PredictionTask, VQATask):
    """VideoQA by ranking the training answers or by generation, scored by exact match.

    LAVIS's ``msrvtt_qa`` and ``msvd_qa`` give an answer as a class index, and one index for all
    answers that are no class. Here the datasets' class labels are extended by those answers, so
    that an index stands for one answer: the model learns every training answer, ranks those that
    are classes, and is scored on all. LAVIS's ``alpro_qa``, a classifier, is trained and tested on
    the same classes; training questions whose answer is none of them are left out.

    Settings (``run:``), as in LAVIS's ``vqa``: ``inference_method`` (rank | generate),
    ``num_ans_candidates``, ``num_beams``, ``max_len``, ``min_len``; and ``selection_metric``
    (accuracy), which picks the best epoch.
    """

    selection_metric = "accuracy"
    num_classes: int | None = None  # of a classifier
    NOTHING = {"prediction": ""}

    @classmethod
    def setup_task(cls, cfg):
        """Build from a configuration.

        Raises:
            ConfigError: for a model that answers no questions, or an unknown method or metric.
        """
        model_cls = registry.get_model_class(cfg.model_cfg.arch)
        classifies = issubclass(model_cls, AlproQA)
        if not classifies and not hasattr(model_cls, "predict_answers"):
            raise ConfigError(
                f"run.task is video_qa, and model.arch '{cfg.model_cfg.arch}' answers no "
                "questions. Take blip_uniadapter_vqa."
            )
        stock_runners.check(cfg.run_cfg)
        settings = Evaluation.for_task("video_qa", cfg.run_cfg)
        task = super().setup_task(cfg)
        task.num_classes = cfg.model_cfg.num_classes if classifies else None
        task.selection_metric = settings.selection_metric
        known = ["accuracy", *(f"accuracy_{kind}" for kind in (*QUESTION_TYPES, OTHER))]
        if task.selection_metric not in known:
            raise ConfigError(
                f"run.selection_metric is '{task.selection_metric}'."
                f"{nearest(str(task.selection_metric), known)} Known: {', '.join(known)}."
            )
        return task

    def build_datasets(self, cfg):
        """LAVIS's datasets, with class labels for every answer in them.

        Raises:
            ConfigError: for a dataset that has no class labels, or a validation split without
                questions of the kind that the selection metric is about.
        """
        datasets = BaseTask.build_datasets(self, cfg)  # VQATask's looks for COCO's question files
        labels: dict[str, int] = {}
        every = [(name, d) for name, splits in datasets.items() for d in splits.values()]
        for name, dataset in every:
            if not isinstance(dataset, MultimodalClassificationDataset):
                raise ConfigError(
                    f"run.task is video_qa, and the dataset '{name}' is a "
                    f"{type(dataset).__name__}, which has no answer classes. For COCO's and "
                    "Visual Genome's questions take run.task: vqa."
                )
            for answer in sorted(dataset.class_labels, key=dataset.class_labels.get):
                labels.setdefault(answer, len(labels))
        self.answer_list = list(labels)
        if self.num_classes is not None:
            self._prepare_for_classifier(datasets)
        for _, dataset in every:
            for record in dataset.annotation:
                labels.setdefault(record["answer"], len(labels))
        for _, dataset in every:
            dataset.class_labels = labels
        self._answers = list(labels)
        self._check_selection_metric(datasets, cfg.run_cfg.get("valid_splits") or ())
        return datasets

    def _prepare_for_classifier(self, datasets) -> None:
        """Leave out training questions whose answer is no class: a classifier fails on them."""
        if self.num_classes != len(self.answer_list):
            raise ConfigError(
                f"model.num_classes is {self.num_classes}, and the datasets "
                f"{', '.join(datasets)} have {len(self.answer_list)} answer classes (ans2label). "
                "Give both the same number."
            )
        for name, splits in datasets.items():
            if (train := splits.get("train")) is None:
                continue
            number = len(train)
            train.annotation = [r for r in train.annotation if r["answer"] in train.class_labels]
            train._add_instance_ids()
            if len(train) < number:
                logger.warning(
                    "%s, train: %d of %d questions left out, as their answers are no classes.",
                    *(name, number - len(train), number),
                )

    def _check_selection_metric(self, datasets, valid_splits: Sequence[str]) -> None:
        kind = self.selection_metric.removeprefix("accuracy").removeprefix("_")
        for name, splits in datasets.items():
            for split in set(valid_splits).intersection(splits if kind else ()):
                questions = (record["question"] for record in splits[split].annotation)
                if kind not in map(question_type, questions):
                    raise ConfigError(
                        f"run.selection_metric is '{self.selection_metric}', and {name}, {split} "
                        f"has no question of that kind. Take accuracy."
                    )

    def train_step(self, model, samples: Mapping[str, Any]):
        """Loss of a batch of LAVIS's ``VideoQADataset``: one answer a question, of weight 1."""
        if self.num_classes is not None:
            indices = lavis_versions.numbers(samples["answers"], samples["video"].device)
            output = model({**samples, "answers": indices})
            return lavis_versions.train_step_result(output["loss"])
        answers = [self._answers[int(index)] for index in samples["answers"]]
        ones = torch.ones(len(answers))
        output = model({**samples, "answer": answers, "n_answers": ones.long(), "weight": ones})
        return lavis_versions.train_step_result(output["loss"])

    def predict(self, model, samples):
        if self.num_classes is not None:
            best = model.predict(samples)["predictions"].argmax(dim=1)
            return [{"prediction": self.answer_list[i]} for i in best.tolist()]
        answers = model.predict_answers(
            samples=samples,
            answer_list=self.answer_list,
            inference_method=self.inference_method,
            num_beams=self.num_beams,
            max_len=self.max_len,
            min_len=self.min_len,
            num_ans_candidates=self.num_ans_candidates,
        )
        return [{"prediction": answer} for answer in answers]

    def evaluation(self, model, data_loader, **kwargs):
        items = super().evaluation(model, data_loader, **kwargs)
        return items and [{**item, "correct": is_correct(item)} for item in items]

    def describe(self, record):
        return {
            "question_id": record["question_id"],
            "file": record.get("video", record.get("image")),
            "question": record["question"],
            "question_type": question_type(record["question"]),
            "answer": record["answer"],
        }

    def metrics(self, items):
        metrics = answer_metrics(items, self.answer_list)
        return {**metrics, "agg_metrics": metrics[self.selection_metric]}

    def outcomes(self, items):
        return {"accuracy": [[100.0 * item["correct"] for item in items]]}
