"""LAVIS dataset builders for a user's own images or videos, annotated in JSON, JSONL, CSV or TSV.

Every record is checked before training, and every problem is shown with its file and line. The
records then go to LAVIS's own dataset classes.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from lavis.datasets.datasets.video_caption_datasets import (
    VideoCaptionDataset,
    VideoCaptionEvalDataset,
)
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from omegaconf import DictConfig, ListConfig, OmegaConf

from lavis_uniadapter.common.errors import ConfigError, reject_unknown_keys
from lavis_uniadapter.datasets.custom_records import (
    CaptionRecord,
    QARecord,
    RetrievalRecord,
    found_in,
    image_id_problems,
    lavis_captions,
    lavis_questions,
    missing_file_problems,
    partly_given_problems,
    read_all,
    repetitions,
)
from lavis_uniadapter.datasets.image_qa import ImageQADataset
from lavis_uniadapter.datasets.layouts import Answer, Image, Video, combine
from lavis_uniadapter.datasets.preflight import SPLITS, annotation_fault, section_faults
from lavis_uniadapter.datasets.records import (
    Found,
    Problem,
    Record,
    is_text,
    problems,
    raise_if_any,
)

logger = logging.getLogger(__name__)

_CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "datasets" / "custom"
_VISUAL = {"images": Image, "videos": Video}


class CustomBuilder(BaseDatasetBuilder, ABC):
    """Datasets of a user's files, read in place.

    Configuration, beside the processors::

        data_type: videos                      # or images
        skip_missing: False                    # True: leave out training records without a file
        build_info:
          annotations:                         # those of train, val, test that exist
            train: {storage: mine/train.csv}   # .json (a list of objects), .jsonl, .csv or .tsv
          videos: {storage: mine/clips}        # images: with data_type images

    Relative paths start at the current folder, not at LAVIS's cache root. Records have ``image`` or
    ``video``, a file name below the visual folder, and the fields of ``record_cls``.

    Raises:
        ConfigError: an unknown or impossible value, by name.
    """

    record_cls: type[Record]
    id_key: str
    annotation_keys: tuple[str, ...] = SPLITS
    # by data_type: for training, for evaluation
    dataset_classes: Mapping[str, tuple[type[BaseDataset], type[BaseDataset]]]

    def __init__(self, cfg: DictConfig | str | None = None):
        super().__init__(cfg)
        if self.data_type not in list(_VISUAL):
            raise ConfigError(f"data_type is {self.data_type!r}; set it to 'images' or 'videos'.")
        self.train_dataset_cls, self.eval_dataset_cls = self.dataset_classes[self.data_type]
        self.skip_missing = self.config.get("skip_missing", False)
        if not isinstance(self.skip_missing, bool):
            raise ConfigError(f"skip_missing is {self.skip_missing!r}; set it to True or False.")
        reject_unknown_keys(self._annotations, self.annotation_keys, "build_info.annotations")
        self._make_paths_absolute()

    def prepare(self) -> None:
        """Check every record of every split, and that its file exists.

        Raises:
            DatasetError: listing what is missing or wrong, by file and line.
            ConfigError: see the builder.
        """
        self._read_checked()

    def build(self) -> dict[str, BaseDataset]:
        """LAVIS's datasets by split.

        Raises:
            DatasetError, ConfigError: as by prepare.
        """
        return self._build(self._read_checked())

    def _build(self, read: Mapping[str, Sequence[Found]]) -> dict[str, BaseDataset]:
        own = self.config
        # LAVIS's datasets read their records from JSON files only, so files are written for as
        # long as they are built.
        with tempfile.TemporaryDirectory() as folder:
            storages = {}
            for split in filter(read.__contains__, SPLITS):
                if repeated := repetitions(read[split], self.id_key):
                    logger.warning(
                        "%s: the first of %d that repeat an earlier one, file and words alike; "
                        "all of them are used.",
                        *(repeated[0].place, len(repeated)),
                    )
                path = Path(folder) / f"{split}.json"
                records = [item.record for item in read[split]]
                records = self._lavis_records(records, split == "train")
                # all ASCII: LAVIS reads in the encoding of the system
                path.write_text(json.dumps(records), encoding="ascii")
                storages[split] = {"storage": str(path)}
            self.config = OmegaConf.merge(own, {"build_info": {"annotations": storages}})
            try:
                return super().build()
            finally:
                self.config = own

    def _download_data(self) -> None:
        """Nothing: the files are read in place."""

    @property
    def _build_info(self) -> Mapping[str, Any]:
        return self.config.get("build_info") or {}

    @property
    def _annotations(self) -> Mapping[str, Any]:
        return self._build_info.get("annotations") or {}

    def _make_paths_absolute(self) -> None:
        # In the config itself, as LAVIS and others that read it take relative paths differently.
        infos = {f"annotations.{key}": info for key, info in self._annotations.items()}
        infos[self.data_type] = self._build_info.get(self.data_type)
        for name, info in infos.items():
            if not isinstance(info, DictConfig | None):
                raise ConfigError(
                    f"build_info.{name} is {info!r}; write {{storage: <path>}} instead."
                )
            storage = (info or {}).get("storage")
            if storage is None:
                continue
            several = isinstance(storage, ListConfig) and name != self.data_type
            paths = list(storage) if several else [storage]
            if not all(map(is_text, paths)):
                raise ConfigError(f"build_info.{name}.storage is {storage!r}; it must be a path.")
            paths = [os.path.abspath(os.path.expanduser(path)) for path in paths]
            info.storage = paths if several else paths[0]

    def _paths(self, key: str) -> list[str]:
        """The annotation files under a key; none for a key that is missing or has no storage."""
        storage = (self._annotations.get(key) or {}).get("storage")
        return [storage] if isinstance(storage, str) else list(storage or [])

    def _read_checked(self) -> dict[str, list[Found]]:
        # once more, as LAVIS's load_dataset sets the visual folder after construction
        self._make_paths_absolute()
        faults = list(section_faults(self.config, self.data_type))
        faults += [
            f"build_info.annotations.{key}.storage is missing; set it to a file, or remove '{key}'."
            for key in self._annotations
            if not self._paths(key)
        ]
        read = self._read()
        wrong = {key: sorted(problems(items)) for key, items in read.items()}
        faults += [annotation_fault(key, some) for key, some in wrong.items() if some]
        raise_if_any(faults, "The dataset cannot be used")
        return {key: found_in(items) for key, items in read.items()}

    def _read(self) -> dict[str, list[Found | Problem]]:
        return {split: self._read_split(split) for split in SPLITS if self._paths(split)}

    def _read_split(self, split: str) -> list[Found | Problem]:
        schema = combine(_VISUAL[self.data_type], self.record_cls)
        items = read_all(self._paths(split), schema)
        found = found_in(items)
        items += partly_given_problems(found, self.id_key)
        items += self._conflicts(found, split == "train")
        folder = (self._build_info.get(self.data_type) or {}).get("storage")
        may_miss = split == "train" and self.skip_missing  # see building.check_built
        if not may_miss and folder is not None and os.path.isdir(folder):
            items += missing_file_problems(found, folder)
        return items

    def _conflicts(self, found: Sequence[Found], training: bool) -> Iterator[Problem]:
        return image_id_problems(found, training)

    @abstractmethod
    def _lavis_records(self, records: Sequence[Record], training: bool) -> list[dict[str, Any]]:
        """Records as LAVIS's dataset classes read them."""


@registry.register_builder("custom_retrieval")
class CustomRetrievalBuilder(CustomBuilder):
    """A user's captioned images or videos, for retrieval.

    ``image_id`` is a string or a whole number, by default the file's name; training images with
    the same one match each other's captions. LAVIS's video datasets use the file's name anyway.
    """

    record_cls = RetrievalRecord
    id_key = "image_id"
    dataset_classes = {
        "images": (RetrievalDataset, RetrievalEvalDataset),
        "videos": (VideoRetrievalDataset, VideoRetrievalEvalDataset),
    }
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "retrieval.yaml")}

    def _lavis_records(self, records: Sequence[Record], training: bool) -> list[dict[str, Any]]:
        return lavis_captions(records, training, default_id=lambda name, number: name)


@registry.register_builder("custom_caption")
class CustomCaptionBuilder(CustomBuilder):
    """A user's captioned images or videos, for captioning.

    ``image_id`` is a whole number; by default files are counted from 0 in order of appearance.
    """

    record_cls = CaptionRecord
    id_key = "image_id"
    dataset_classes = {
        "images": (CaptionDataset, CaptionEvalDataset),
        "videos": (VideoCaptionDataset, VideoCaptionEvalDataset),
    }
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "caption.yaml")}

    def _lavis_records(self, records: Sequence[Record], training: bool) -> list[dict[str, Any]]:
        return lavis_captions(records, training, default_id=lambda name, number: number)


@registry.register_builder("custom_qa")
class CustomQABuilder(CustomBuilder):
    """Questions about a user's images or videos, answered by one of a set of candidates.

    The candidates are the answers in the files under ``build_info.annotations.answer_list``: a
    JSON list or lines (.txt) of answers, or files of records. By default these are the training
    records. The most frequent candidates come first.
    """

    record_cls = QARecord
    id_key = "question_id"
    annotation_keys = (*SPLITS, "answer_list")
    dataset_classes = {
        "images": (ImageQADataset, ImageQADataset),
        "videos": (VideoQADataset, VideoQADataset),
    }
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "qa.yaml")}

    def __init__(self, cfg: DictConfig | str | None = None):
        super().__init__(cfg)
        # Named now, as an evaluation removes the training split and needs the same candidates.
        train = self._paths("train")
        if train and not self._paths("answer_list"):
            self._annotations.answer_list = {"storage": train}

    def _build(self, read: Mapping[str, Sequence[Found]]) -> dict[str, BaseDataset]:
        found = read.get("answer_list", read.get("train", ()))
        counts = Counter(item.record.answer for item in found).most_common()
        labels = {answer: label for label, (answer, _) in enumerate(counts)}
        datasets = super()._build(read)
        for split, dataset in datasets.items():
            dataset.class_labels = labels
            strange = [item for item in read[split] if item.record.answer not in labels]
            if strange:
                logger.warning(
                    "%s: the first of %d of %d questions whose answer is not among the "
                    "candidates, so that no ranking finds it.",
                    *(strange[0].place, len(strange), len(read[split])),
                )
        return datasets

    def _read(self) -> dict[str, list[Found | Problem]]:
        read = super()._read()
        answers = self._paths("answer_list")
        if read and not answers:
            raise ConfigError(
                "There are no candidate answers. Name the training records under build_info."
                "annotations.train.storage, or a list under build_info.annotations."
                "answer_list.storage (.json or .txt)."
            )
        if "train" not in read or answers != self._paths("train"):
            formats = (".json", ".txt", ".jsonl", ".csv", ".tsv")
            read["answer_list"] = read_all(answers, Answer, formats)
        return read

    def _conflicts(self, found: Sequence[Found], training: bool) -> Iterator[Problem]:
        return iter(())

    def _lavis_records(self, records: Sequence[Record], training: bool) -> list[dict[str, Any]]:
        return lavis_questions(records)
