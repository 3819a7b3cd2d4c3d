"""LAVIS dataset builders for a user's own images or videos, annotated in JSON, JSONL, CSV or TSV.

Files are read by the schema of the task, and their records are converted to those of LAVIS's own
dataset classes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from omegaconf import DictConfig
from pydantic import BeforeValidator, Field

from lavis_uniadapter.common.errors import ConfigError, reject_unknown_keys
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.common.schema.data import DatasetSection, Source
from lavis_uniadapter.datasets.layouts import (
    DATASET_CLASSES,
    LAYOUTS,
    Answer,
    Identifier,
    layout,
)
from lavis_uniadapter.datasets.preflight import (
    annotation_fault,
    as_list,
    blank_texts,
    section_faults,
)
from lavis_uniadapter.datasets.records import (
    FORMATS,
    SPLITS,
    Found,
    Place,
    Problem,
    Text,
    Texts,
    check_placed,
    is_split,
    problems,
    raise_if_any,
    read_records,
)

logger = logging.getLogger(__name__)

_CONFIGS = PACKAGE_ROOT / "configs" / "datasets" / "custom"


def _text(value: object) -> object:
    """An identifier as text, as 7 in JSON is the 7 of a table; an empty cell is None."""
    return (str(value).strip() or None) if type(value) in (int, str) else value


def _number(value: object) -> object:
    text = _text(value)
    is_number = isinstance(text, str) and re.fullmatch(r"[0-9]{1,19}", text)
    return int(str(text)) if is_number else text


Captions = Annotated[
    list[Text],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1, description="a non-empty string (or a list)"),
]
# Identifiers are collated to tensors of 64 bits.
Number = Annotated[
    Annotated[int, Field(strict=True, lt=2**63)] | None,
    BeforeValidator(_number),
    Field(description="a whole number, or nothing,"),
]
Name = Annotated[
    str | None, BeforeValidator(_text), Field(description="a string or a whole number, or nothing,")
]
# Records for LAVIS, each with the place of the user's record, or what is wrong there.
Converted = Iterator[tuple[Place, dict[str, Any] | Problem]]


class CustomBuilder(BaseDatasetBuilder):
    """Datasets of a user's files, read in place.

    Relative paths start at the current folder, not at LAVIS's cache root. Records have ``image`` or
    ``video``, a file name below the visual folder, and ``fields``; see the default configurations.

    Raises:
        ConfigError: an unknown or impossible value, by name.
        DatasetError: in prepare and build, listing what is wrong by file and line.
    """

    task: str
    fields: Mapping[str, Any]
    numbered: bool  # the default image_id of a file is a number; otherwise it is its name
    more_annotations: tuple[str, ...] = ()  # beside splits

    def __init__(self, cfg: DictConfig | str | None = None):
        super().__init__(cfg)
        if self.data_type not in ("images", "videos"):
            raise ConfigError(f"data_type is {self.data_type!r}; set it to 'images' or 'videos'.")
        self.visual_key = self.data_type.removesuffix("s")
        classes = DATASET_CLASSES[self.task, self.data_type]
        self.train_dataset_cls, self.eval_dataset_cls = classes

    def prepare(self) -> None:
        """Check every record of every split."""
        self._read()

    def build(self) -> dict[str, BaseDataset]:
        """LAVIS's datasets by split."""
        return self._build(self._read())

    def _build(self, read: Mapping[str, Sequence[Found]]) -> dict[str, BaseDataset]:
        folder, _ = self._paths()
        datasets = {}
        for split in filter(is_split, read):
            mode = "train" if split == "train" else "eval"
            dataset_cls = self.train_dataset_cls if split == "train" else self.eval_dataset_cls
            # LAVIS's datasets read files, in the encoding of the system: hence all ASCII
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / f"{split}.json"
                records = [item.record.model_dump() for item in read[split]]
                path.write_text(json.dumps(records), encoding="ascii")
                datasets[split] = dataset_cls(
                    vis_processor=self.vis_processors[mode],
                    text_processor=self.text_processors[mode],
                    vis_root=folder,
                    ann_paths=[str(path)],
                )
        return datasets

    def _download_data(self) -> None:
        """Nothing: the files are read in place."""

    def _paths(self) -> tuple[str | None, dict[str, list[str]]]:
        """The visual folder, and the annotation files by key; absolute."""
        info = DatasetSection.read(self.config, "").build_info
        annotations = (info and info.annotations) or {}
        others = [key for key in annotations if not is_split(key)]
        known = (*SPLITS, "test_NAME", *self.more_annotations)
        reject_unknown_keys(others, known, "build_info.annotations")
        folder = _storages(getattr(info, self.data_type, None))
        files = {key: _storages(source) for key, source in annotations.items() if source}
        return folder[0] if len(folder) == 1 else None, files

    def _read(self) -> dict[str, list[Any]]:
        """LAVIS's records by split."""
        self.build_processors()
        folder, paths = self._paths()
        faults = list(section_faults(self.data_type, folder, paths))
        read: dict[str, list[Any]] = {}
        for key, files in ((key, files) for key, files in paths.items() if files):
            read[key] = self._read_files(key, files)
            texts = ((item.place, dict(item.record)) for item in read[key])
            processor = self.text_processors["train" if key == "train" else "eval"]
            if wrong := problems(read[key]) or list(blank_texts(texts, processor)):
                faults.append(annotation_fault(key, wrong))
        raise_if_any(faults, "The dataset cannot be used")
        return read

    def _read_files(self, key: str, files: Sequence[str]) -> list[Found | Problem]:
        schema = layout(self.visual_key, **self.fields)
        items: list[Any] = [item for path in files for item in read_records(path, schema)]
        return items if problems(items) else list(self._convert(items, key == "train"))

    def _convert(self, items: Sequence[Found], training: bool) -> Iterator[Found | Problem]:
        text, unique = (Text, None) if training else (Texts, "image_id")
        schema = layout(self.visual_key, unique, caption=text, image_id=Identifier)
        return check_placed(lavis_captions(items, training, self.numbered), schema, "")


def _storages(source: Source | None) -> list[str]:
    paths = as_list(source.storage if source else None)
    return [os.path.abspath(path) for path in paths]


def lavis_captions(items: Sequence[Found], training: bool, numbered: bool) -> Converted:
    """Records for LAVIS: one per caption in training, one per file in evaluation."""
    by_file: dict[str, tuple[Place, dict[str, Any]]] = {}
    for place, own in ((item.place, item.record) for item in items):
        image_id = own.image_id
        if image_id is None:
            image_id = len(by_file) if numbered else own.file
        new = {own.visual_key: own.file, "caption": [], "image_id": image_id}
        first, record = by_file.setdefault(own.file, (place, new))
        if own.image_id not in (None, record["image_id"]):
            ids = f"the image_id {image_id!r} here, and {record['image_id']!r} in {first}"
            yield place, Problem(place, f"'{own.file}' has {ids}; give each file one")
        record["caption"] += own.caption
        for caption in own.caption if training else ():
            yield place, {**record, "caption": caption}
    if not training:
        yield from by_file.values()


@registry.register_builder("custom_retrieval")
class CustomRetrievalBuilder(CustomBuilder):
    """A user's captioned images or videos, for retrieval.

    Training images with the same ``image_id`` match each other's captions. LAVIS's video datasets
    use the file's name instead.
    """

    task = "retrieval"
    fields = {"caption": Captions, "image_id": (Name, None)}
    numbered = False
    DATASET_CONFIG_DICT = {"default": f"{_CONFIGS}/retrieval.yaml"}


@registry.register_builder("custom_caption")
class CustomCaptionBuilder(CustomBuilder):
    """A user's captioned images or videos, for captioning."""

    task = "caption"
    fields = {"caption": Captions, "image_id": (Number, None)}
    numbered = True
    DATASET_CONFIG_DICT = {"default": f"{_CONFIGS}/caption.yaml"}


@registry.register_builder("custom_qa")
class CustomQABuilder(CustomBuilder):
    """Questions about a user's images or videos, answered by one of a set of candidates.

    The candidates are the answers in the files under ``build_info.annotations.answer_list``: a
    JSON list or lines (.txt) of answers, or files of records. By default these are the training
    records. The most frequent candidates come first.
    """

    task = "qa"
    fields = {"question": Text, "answer": Text, "question_id": (Number, None)}
    more_annotations = ("answer_list",)
    DATASET_CONFIG_DICT = {"default": f"{_CONFIGS}/qa.yaml"}

    def __init__(self, cfg: DictConfig | str | None = None):
        super().__init__(cfg)
        # Set here, as an evaluation removes the training split but needs the same candidates.
        _, paths = super()._paths()
        if paths.get("train") and "answer_list" not in paths:
            self.config.build_info.annotations.answer_list = {"storage": paths["train"]}

    def _paths(self) -> tuple[str | None, dict[str, list[str]]]:
        folder, paths = super()._paths()
        if "answer_list" not in paths:
            raise ConfigError(
                "There are no candidate answers. Name the training records under build_info."
                "annotations.train.storage, or a list under build_info.annotations."
                "answer_list.storage (.json or .txt)."
            )
        if paths["answer_list"] == paths.get("train"):
            del paths["answer_list"]
        return folder, paths

    def _read_files(self, key: str, files: Sequence[str]) -> list[Found | Problem]:
        if key != "answer_list":
            return super()._read_files(key, files)
        formats = (*FORMATS, ".txt")
        return [item for path in files for item in read_records(path, Answer, formats)]

    def _convert(self, items: Sequence[Found], training: bool) -> Iterator[Found | Problem]:
        records = (
            (item.place, {"question_id": n, **item.record.model_dump(exclude_none=True)})
            for n, item in enumerate(items)
        )
        return check_placed(records, LAYOUTS[self.train_dataset_cls], "")

    def _build(self, read: Mapping[str, Sequence[Found]]) -> dict[str, BaseDataset]:
        candidates = read["answer_list" if "answer_list" in read else "train"]
        counts = Counter(item.record.answer for item in candidates).most_common()
        labels = {answer: label for label, (answer, _) in enumerate(counts)}
        datasets = super()._build(read)
        for split, dataset in datasets.items():
            dataset.class_labels = labels
            strange = [item for item in read[split] if item.record.answer not in labels]
            if strange:
                logger.warning(
                    "%d of %d answers are not among the candidates, so they are never predicted. "
                    "The first is in %s.",
                    *(len(strange), len(read[split]), strange[0].place),
                )
        return datasets
