"""The question answering task, for video and images, on LAVIS's VideoQA builders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.multimodal_classification_datasets import (
    MultimodalClassificationDataset,
)
from lavis.tasks.vqa import VQATask

from lavis_uniadapter.errors import ConfigError
from lavis_uniadapter.evaluation.answer_metrics import Answered, answer_metrics
from lavis_uniadapter.tasks.prediction import PredictionTask


@registry.register_task("video_qa")
class VideoQATask(PredictionTask, VQATask):
    """VideoQA by ranking the training answers or by generation, scored by exact match.

    LAVIS's ``msrvtt_qa`` and ``msvd_qa`` give an answer as a class index, and one index for all
    answers that are no class. Here the datasets' class labels are extended by those answers, so
    that an index stands for one answer: the model learns every training answer, ranks those that
    are classes, and is scored on all.

    Settings (``run:``), as in LAVIS's ``vqa``: ``inference_method`` (rank | generate),
    ``num_ans_candidates``, ``num_beams``, ``max_len``, ``min_len``.
    """

    METRIC = "accuracy"

    @classmethod
    def setup_task(cls, cfg):
        """Build from a configuration.

        Raises:
            ConfigError: for a model that answers no questions, or an unknown method.
        """
        model_cls = registry.get_model_class(cfg.model_cfg.arch)
        if not hasattr(model_cls, "predict_answers"):
            raise ConfigError(
                f"run.task is video_qa, and model.arch '{cfg.model_cfg.arch}' answers no "
                "questions. Take blip_uniadapter_vqa."
            )
        method = cfg.run_cfg.get("inference_method", "rank")
        if method not in ("rank", "generate"):
            raise ConfigError(f"run.inference_method is '{method}'; it must be rank or generate.")
        return super().setup_task(cfg)

    @property
    def selection_metric(self) -> str:
        return self.METRIC

    def build_datasets(self, cfg):
        """LAVIS's datasets, with class labels for every answer in them.

        Raises:
            ConfigError: for a dataset that has no class labels.
        """
        datasets = super().build_datasets(cfg)
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
        for _, dataset in every:
            for record in dataset.annotation:
                labels.setdefault(record["answer"], len(labels))
        for _, dataset in every:
            dataset.class_labels = labels
        self._answers = list(labels)
        return datasets

    def train_step(self, model, samples: Mapping[str, Any]) -> torch.Tensor:
        """Loss of a batch of LAVIS's ``VideoQADataset``: one answer a question, of weight 1."""
        answers = [self._answers[index] for index in samples["answers"].tolist()]
        ones = torch.ones(len(answers), device=samples["answers"].device)
        return model(
            {**samples, "answer": answers, "n_answers": ones.long(), "weight": ones},
        )["loss"]

    def predict(self, model, samples: Mapping[str, Any]) -> Sequence[str]:
        return model.predict_answers(
            samples=samples,
            answer_list=self.answer_list,
            inference_method=self.inference_method,
            num_beams=self.num_beams,
            max_len=self.max_len,
            min_len=self.min_len,
            num_ans_candidates=self.num_ans_candidates,
        )

    def score(self, predictions, records):
        answered = [
            Answered(record["question"], record["answer"], prediction)
            for record, prediction in zip(records, predictions, strict=True)
        ]
        metrics = answer_metrics(answered, self.answer_list)
        items = [
            {
                "question_id": record["question_id"],
                "file": record.get("video", record.get("image")),
                "question": item.question,
                "question_type": item.question_type,
                "answer": item.answer,
                "prediction": item.prediction,
                "correct": item.correct,
            }
            for record, item in zip(records, answered, strict=True)
        ]
        return {**metrics, "agg_metrics": metrics[self.METRIC]}, items
