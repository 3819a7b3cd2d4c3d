"""Question answering on images with VideoQA's answer labels."""

from __future__ import annotations

import os
from typing import Any

from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from PIL import Image


class ImageQADataset(VideoQADataset):
    """LAVIS's ``VideoQADataset`` with ``image`` in place of ``video``, in records and items."""

    def __getitem__(self, index: int) -> dict[str, Any]:
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
