"""Question answering on images with VideoQA's answer labels."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from PIL import Image


class ImageQADataset(VideoQADataset):
    """LAVIS's ``VideoQADataset`` with an image in the place of the video.

    Records have ``image`` (a file name), ``question``, ``answer`` and ``question_id``. An item is
    what the processors make of image and question under ``image`` and ``text_input``, the
    answer's index in ``class_labels`` under ``answers`` (their number for an answer that is not
    among them), ``question_id`` and ``instance_id``.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.class_labels, f"class_labels of {type(self).__name__} is not built yet."
        record = self.annotation[index]
        with Image.open(os.path.join(self.vis_root, record["image"])) as image:
            pixels = self.vis_processor(image.convert("RGB"))
        return {
            "image": pixels,
            "text_input": self.text_processor(record["question"]),
            "answers": self._get_answer_label(record["answer"]),
            "question_id": record["question_id"],
            "instance_id": record["instance_id"],
        }

    def displ_item(self, index: int) -> OrderedDict[str, Any]:
        """The image's path, the question and the answer of a record."""
        record = self.annotation[index]
        return OrderedDict(
            file=os.path.join(self.vis_root, record["image"]),
            question=record["question"],
            answer=record["answer"],
        )
