"""LAVIS's image datasets for a user's own images: read upright, and deep ones scaled to 8 bits.

The benchmarks keep LAVIS's classes, as the published numbers were obtained without either.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from PIL import Image

from lavis_uniadapter.processors.images import read_image


class OwnImages:
    """Reads the image of a record."""

    vis_processor: Callable[[Image.Image], Any]
    vis_root: str

    def _image(self, record: dict[str, Any]) -> Any:
        return self.vis_processor(read_image(os.path.join(self.vis_root, record["image"])))


class OwnRetrievalDataset(OwnImages, RetrievalDataset):
    """Captioned images for training."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {
            "image": self._image(record),
            "text_input": self.text_processor(record["caption"]),
            "image_id": self.img_ids[record["image_id"]],
            "instance_id": record["instance_id"],
        }


class OwnRetrievalEvalDataset(OwnImages, RetrievalEvalDataset):
    """The images of a gallery."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._image(self.annotation[index]), "index": index}


class OwnCaptionDataset(OwnImages, CaptionDataset):
    """The same, as tasks of captioning expect them."""

    __getitem__ = OwnRetrievalDataset.__getitem__


class OwnCaptionEvalDataset(OwnImages, CaptionEvalDataset):
    """Images to caption."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {
            "image": self._image(record),
            "image_id": record["image_id"],
            "instance_id": record["instance_id"],
        }


class ImageQADataset(OwnImages, VideoQADataset):
    """LAVIS's ``VideoQADataset`` with ``image`` in place of ``video``, in records and items."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {
            "image": self._image(record),
            "text_input": self.text_processor(record["question"]),
            "answers": self._get_answer_label(record["answer"]),
            "question_id": record["question_id"],
            "instance_id": record["instance_id"],
        }
