"""LAVIS dataset builders for a user's own images or videos, annotated in JSON, JSONL, CSV or TSV.

Every record is checked before training, and every problem shown with its file and line. The
records then go to LAVIS's own dataset classes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

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
from lavis_uniadapter.datasets.image_qa import ImageQADataset
from lavis_uniadapter.datasets.layouts import (
    Field,
    are_texts,
    is_text,
    is_whole_number,
    outside_problem,
)
from lavis_uniadapter.datasets.preflight import SPLITS, DatasetError, listing
from lavis_uniadapter.datasets.record_files import (
    Place,
    Problem,
    Record,
    read_records,
    read_strings,
)
from lavis_uniadapter.processors.extracted_frames import clip_file

logger = logging.getLogger(__name__)

_CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "datasets" / "custom"
_VISUAL_KEYS = {"images": "image", "videos": "video"}

# Identifiers are collated to tensors of 64 bits.
_IDENTIFIERS = range(2**63)


def _whole_number(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value.strip()):
        value = int(value)
    return value if is_whole_number(value) and value in _IDENTIFIERS else None


class Entry(NamedTuple):
    """A record that is sound by itself.

    Attributes:
        place: file and line.
        name: of the image or video, below the visual folder.
        texts: its captions, or question and answer.
        id: as given, or None.
    """

    place: Place
    name: str
    texts: tuple[str, ...]
    id: int | str | None


@dataclass
class Annotations:
    """What was read for a split.

    Attributes:
        entries: in the order of the files.
        problems: for which the split cannot be used.
        notes: what a user should know nevertheless.
        left_out: names of missing files whose entries are not used.
        mend: of the problems.
    """

    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    mend: str = "correct or remove the records"

    def used(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.name not in self.left_out]


class CustomBuilder(BaseDatasetBuilder, ABC):
    """Datasets of a user's files, read where they lie.

    Configuration, beside the processors::

        data_type: videos                      # or images
        skip_missing: False                    # True: leave out training records without a file
        build_info:
          annotations:                         # those of train, val, test that there are
            train: {storage: mine/train.csv}   # .json (a list of objects), .jsonl, .csv or .tsv
          videos: {storage: mine/clips}        # images: with data_type images

    Relative paths start at the current folder, not at LAVIS's cache root. Records have ``image`` or
    ``video``, a file name below the visual folder, and the fields of the task.

    Raises:
        ConfigError: an unknown or impossible value, by name.
    """

    text_fields: tuple[Field, ...]
    id_key: str
    id_wanted: str
    # the identifier that a value stands for; None if it stands for none
    read_id: Callable[[object], int | str | None]
    annotation_keys: tuple[str, ...] = SPLITS
    # by data_type: for training, for evaluation
    dataset_classes: Mapping[str, tuple[type[BaseDataset], type[BaseDataset]]]

    def __init__(self, cfg: DictConfig | str | None = None):
        super().__init__(cfg)
        if self.data_type not in list(_VISUAL_KEYS):
            raise ConfigError(f"data_type is {self.data_type!r}; set it to 'images' or 'videos'.")
        self.visual_key = _VISUAL_KEYS[self.data_type]
        self.train_dataset_cls, self.eval_dataset_cls = self.dataset_classes[self.data_type]
        self.skip_missing = self.config.get("skip_missing", False)
        if not isinstance(self.skip_missing, bool):
            raise ConfigError(f"skip_missing is {self.skip_missing!r}; set it to True or False.")
        reject_unknown_keys(self._annotations, self.annotation_keys, "build_info.annotations")
        self._make_paths_absolute()

    def check_records(self) -> None:
        """Check every record of every split, and that its file is there.

        Raises:
            DatasetError: listing what is missing or wrong, by file and line.
            ConfigError: see the builder.
        """
        self._checked()

    def build(self) -> dict[str, BaseDataset]:
        """LAVIS's datasets by split.

        Raises:
            DatasetError, ConfigError: as by check_records.
        """
        return self._build(self._checked())

    def _download_data(self) -> None:
        """Nothing: the files are read where they lie."""

    @property
    def _annotations(self) -> Mapping[str, Any]:
        return (self.config.get("build_info") or {}).get("annotations") or {}

    @property
    def _visual_folder(self) -> str | None:
        info = (self.config.get("build_info") or {}).get(self.data_type)
        return (info or {}).get("storage")

    def _make_paths_absolute(self) -> None:
        # In the config itself, for all that read it, to whom a relative path is LAVIS's.
        infos = {f"annotations.{key}": info for key, info in self._annotations.items()}
        infos[self.data_type] = (self.config.get("build_info") or {}).get(self.data_type)
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
        """The annotation files under a key; none for a key that is not there or has no storage."""
        storage = (self._annotations.get(key) or {}).get("storage")
        return [storage] if isinstance(storage, str) else list(storage or [])

    def _checked(self) -> dict[str, Annotations]:
        # once more, as LAVIS's load_dataset sets the visual folder after construction
        self._make_paths_absolute()
        faults = list(self._config_faults())
        read = self._read()
        for key, part in read.items():
            if part.problems:
                lines = [str(problem) for problem in sorted(part.problems, key=lambda p: p.place)]
                faults.append(
                    f"build_info.annotations.{key} has {len(lines)} problem(s); {part.mend}:"
                    f"{listing(lines)}"
                )
        if faults:
            raise DatasetError(
                "The dataset cannot be used:" + "".join(f"\n- {fault}" for fault in faults)
            )
        return read

    def _config_faults(self) -> Iterator[str]:
        folder, key = self._visual_folder, f"build_info.{self.data_type}.storage"
        if folder is None:
            yield f"{key} is missing; set it to the folder of the {self.data_type}."
        elif not os.path.isdir(folder):
            yield f"{key} is {folder}, and there is no such folder; create it or correct the path."
        if not any(split in self._annotations for split in SPLITS):
            yield f"build_info.annotations names none of {', '.join(SPLITS)}; add one at least."
        for key in self._annotations:
            if not self._paths(key):
                yield (
                    f"build_info.annotations.{key}.storage is missing; set it to a file, or take "
                    f"'{key}' out."
                )

    def _read(self) -> dict[str, Annotations]:
        return {
            split: self._read_split(split, self._paths(split), self._visual_folder)
            for split in SPLITS
            if self._paths(split)
        }

    def _read_split(self, split: str, paths: Sequence[str], root: str | None) -> Annotations:
        """Read and check files of records, and look for what they name below `root`, if any."""
        read = Annotations()
        places: dict[str, Place] = {}  # where each file is named first
        wanted = (self.visual_key, *(text.key for text in self.text_fields))
        for item in chain.from_iterable(read_records(path, wanted) for path in paths):
            if isinstance(item, Problem):
                read.problems.append(item)
                continue
            name_problem = self._name_problem(item.fields)
            if name_problem is None:
                places.setdefault(os.path.normpath(item.fields[self.visual_key]), item.place)
            wrong = list(filter(None, (name_problem, *self._field_problems(item.fields))))
            read.problems += [Problem(item.place, text) for text in wrong]
            if not wrong:
                read.entries.append(self._entry(item))
        read.problems += self._id_problems(read.entries, split)
        self._note_repetitions(read)
        if root is not None and os.path.isdir(root):
            self._look_for_files(read, places, root, may_skip=split == "train")
        return read

    def _name_problem(self, fields: Mapping[str, Any]) -> str | None:
        problem = Field(self.visual_key, is_text, "a file name").problem(fields)
        return problem or outside_problem(fields[self.visual_key], self._visual_folder)

    def _field_problems(self, fields: Mapping[str, Any]) -> Iterator[str | None]:
        identifier = Field(
            self.id_key,
            lambda value: value in (None, "") or self.read_id(value) is not None,
            f"{self.id_wanted}, or nothing,",
        )
        return (part.problem(fields) for part in (*self.text_fields, identifier))

    def _entry(self, record: Record) -> Entry:
        values = [record.fields[text.key] for text in self.text_fields]
        texts = chain.from_iterable([v] if isinstance(v, str) else v for v in values)
        return Entry(
            record.place,
            os.path.normpath(record.fields[self.visual_key]),
            tuple(text.strip() for text in texts),
            self.read_id(record.fields.get(self.id_key)),
        )

    def _id_problems(self, entries: Sequence[Entry], split: str) -> Iterator[Problem]:
        for entry in entries:
            # a number of ours among given ones could be one of them
            if (entry.id is None) != (entries[0].id is None):
                has, have = ("no", "has one") if entry.id is None else ("a", "has none")
                yield Problem(
                    entry.place,
                    f"has {has} '{self.id_key}', and {entries[0].place} {have}; give one in every "
                    "record or in none",
                )
        yield from self._conflicts([e for e in entries if e.id is not None], split)

    def _note_repetitions(self, read: Annotations) -> None:
        # Not an error: people do describe a video twice in the same words (MSR-VTT's do).
        said: set[tuple[str, ...]] = set()
        repeating = []
        for entry in read.entries:
            for statement in self._statements(entry):
                if statement in said:
                    repeating.append(entry.place)
                said.add(statement)
        if repeating:
            read.notes.append(
                f"{repeating[0]}: the first of {len(repeating)} that repeat an earlier one, file "
                "and words alike; all of them are used."
            )

    def _look_for_files(
        self, read: Annotations, places: Mapping[str, Place], root: str, may_skip: bool
    ) -> None:
        found = clip_file if self.visual_key == "video" else str
        missing = [name for name in places if not os.path.isfile(found(os.path.join(root, name)))]
        if not (may_skip and self.skip_missing and len(missing) < len(places)):
            read.problems += [
                Problem(places[name], f"names {name!r}, and there is no such file below {root}")
                for name in missing
            ]
        elif missing:
            read.left_out = set(missing)
            total = len(read.entries)
            read.notes.append(
                f"{total - len(read.used())} of {total} training records are left out "
                f"(skip_missing): {len(missing)} of {len(places)} files are missing below {root}, "
                f"the first being {missing[0]!r}."
            )

    def _build(self, read: Mapping[str, Annotations]) -> dict[str, BaseDataset]:
        for note in chain.from_iterable(part.notes for part in read.values()):
            logger.warning("%s", note)
        own = self.config
        # LAVIS's datasets take their records from JSON files and from nothing else, so files are
        # written for as long as they are built.
        with tempfile.TemporaryDirectory() as folder:
            storages = {}
            for split in filter(self._annotations.get, SPLITS):
                path = Path(folder) / f"{split}.json"
                records = self._records(read[split].used(), split)
                # all ASCII: LAVIS reads in the encoding of the system
                path.write_text(json.dumps(records), encoding="ascii")
                storages[split] = {"storage": str(path)}
            self.config = OmegaConf.merge(own, {"build_info": {"annotations": storages}})
            try:
                return super().build()
            finally:
                self.config = own

    @abstractmethod
    def _conflicts(self, entries: Sequence[Entry], split: str) -> Iterator[Problem]:
        """What is wrong with identifiers, all of them given."""

    @abstractmethod
    def _statements(self, entry: Entry) -> list[tuple[str, ...]]:
        """Each thing that an entry says of its file, with the file's name."""

    @abstractmethod
    def _records(self, entries: Sequence[Entry], split: str) -> list[dict[str, Any]]:
        """Records as LAVIS's dataset classes read them."""


class CaptionedBuilder(CustomBuilder):
    """Records have ``caption``, a string (or, in JSON and JSONL, a list of strings).

    There is an item a caption in training, and an item a file in evaluation, where the records of
    a file are merged. ``image_id`` says which files of the training data show the same.
    """

    text_fields = (
        Field("caption", lambda v: is_text(v) or are_texts(v), "a non-empty string (or a list)"),
    )
    id_key = "image_id"

    @abstractmethod
    def _default_id(self, name: str, number: int) -> int | str:
        """The image_id of the number-th file, if none are given."""

    def _conflicts(self, entries: Sequence[Entry], split: str) -> Iterator[Problem]:
        of_name: dict[str, Entry] = {}
        of_id: dict[int | str, Entry] = {}
        for entry in entries:
            other = of_name.setdefault(entry.name, entry)
            if other.id != entry.id:
                yield Problem(
                    entry.place,
                    f"gives '{entry.name}' the image_id {entry.id!r}, and {other.place} gives it "
                    f"{other.id!r}; give a file one image_id",
                )
            other = of_id.setdefault(entry.id, entry)
            if split != "train" and other.name != entry.name:
                yield Problem(
                    entry.place,
                    f"gives '{entry.name}' the image_id {entry.id!r}, which {other.place} gives to "
                    f"'{other.name}'; give each file its own in evaluation",
                )

    def _statements(self, entry: Entry) -> list[tuple[str, ...]]:
        return [(entry.name, caption) for caption in entry.texts]

    def _records(self, entries: Sequence[Entry], split: str) -> list[dict[str, Any]]:
        captions: dict[str, list[str]] = {}
        ids: dict[str, int | str] = {}
        for entry in entries:
            captions.setdefault(entry.name, []).extend(entry.texts)
            default = self._default_id(entry.name, len(ids))
            ids.setdefault(entry.name, default if entry.id is None else entry.id)
        if split == "train":
            said = [(entry.name, caption) for entry in entries for caption in entry.texts]
        else:
            said = list(captions.items())
        return [
            {self.visual_key: name, "caption": caption, "image_id": ids[name]}
            for name, caption in said
        ]


@registry.register_builder("custom_retrieval")
class CustomRetrievalBuilder(CaptionedBuilder):
    """A user's captioned images or videos, for retrieval.

    ``image_id`` is a string or a whole number, by default the file's name. LAVIS's video datasets
    go by the file's name in any case.
    """

    dataset_classes = {
        "images": (RetrievalDataset, RetrievalEvalDataset),
        "videos": (VideoRetrievalDataset, VideoRetrievalEvalDataset),
    }
    id_wanted = "a string or a whole number"

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "retrieval.yaml")}

    @staticmethod
    def read_id(value: object) -> str | None:
        if is_whole_number(value):
            return str(value)
        return value.strip() if is_text(value) else None

    def _default_id(self, name: str, number: int) -> str:
        return name


@registry.register_builder("custom_caption")
class CustomCaptionBuilder(CaptionedBuilder):
    """A user's captioned images or videos, for captioning.

    ``image_id`` is a whole number, as LAVIS's captioning task writes it beside what the model says;
    by default files are counted from 0, in the order in which they occur.
    """

    dataset_classes = {
        "images": (CaptionDataset, CaptionEvalDataset),
        "videos": (VideoCaptionDataset, VideoCaptionEvalDataset),
    }
    id_wanted = "a whole number"
    read_id = staticmethod(_whole_number)

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "caption.yaml")}

    def _default_id(self, name: str, number: int) -> int:
        return number


@registry.register_builder("custom_qa")
class CustomQABuilder(CustomBuilder):
    """Questions and answers on a user's images or videos.

    Records have ``question`` and ``answer``, strings, and may have ``question_id``, a whole number
    that no other record of the split has; by default records are counted from 0.

    The candidate answers, ``class_labels`` of the datasets, are those of the training records, the
    most frequent first, or those that ``build_info.annotations.answer_list.storage`` names: a
    ``.json`` list of strings or a ``.txt`` file of one answer a line.
    """

    text_fields = (
        Field("question", is_text, "a non-empty string"),
        Field("answer", is_text, "a non-empty string"),
    )
    id_key = "question_id"
    # train_answers is the builder's own
    annotation_keys = (*SPLITS, "answer_list", "train_answers")
    dataset_classes = {
        "images": (ImageQADataset, ImageQADataset),
        "videos": (VideoQADataset, VideoQADataset),
    }
    id_wanted = "a whole number"
    read_id = staticmethod(_whole_number)

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "qa.yaml")}

    def __init__(self, cfg: DictConfig | str | None = None):
        super().__init__(cfg)
        # Who only evaluates takes the training split out of the config, from which LAVIS then
        # makes a builder anew; the candidates shall be the same.
        train = self._paths("train")
        if train and not self._paths("answer_list"):
            self._annotations.train_answers = {"storage": train}

    def _read(self) -> dict[str, Annotations]:
        read = super()._read()
        listed, train_answers = self._paths("answer_list"), self._paths("train_answers")
        if listed:
            read["answer_list"] = self._read_answer_list(listed)
        elif train_answers and "train" not in read:
            # without looking for the files of the training split, which are not needed
            read["train_answers"] = self._read_split("train", train_answers, root=None)
            read["train_answers"].mend = "correct them, or name the candidates under answer_list"
        elif read and "train" not in read:
            raise ConfigError(
                "There are no candidate answers. Name the training records under build_info."
                "annotations.train.storage, or a list under build_info.annotations.answer_list."
                "storage (.json or .txt)."
            )
        if read:
            self._note_strange_answers(read)
        return read

    def _read_answer_list(self, paths: Sequence[str]) -> Annotations:
        read = Annotations()
        first: dict[str, Place] = {}
        answer = self.text_fields[-1]
        for item in chain.from_iterable(read_strings(path, answer.key) for path in paths):
            if isinstance(item, Problem):
                read.problems.append(item)
            elif wrong := answer.problem(item.fields):
                read.problems.append(Problem(item.place, wrong))
            else:
                text = item.fields[answer.key].strip()
                if first.setdefault(text, item.place) is not item.place:
                    wrong = f"has the answer {text!r}, as {first[text]} has"
                    read.problems.append(Problem(item.place, wrong))
                read.entries.append(Entry(item.place, "", (text,), None))
        return read

    @staticmethod
    def _answer_source(read: Mapping[str, Annotations]) -> Annotations:
        return next(read[key] for key in ("answer_list", "train", "train_answers") if key in read)

    def _class_labels(self, read: Mapping[str, Annotations]) -> dict[str, int]:
        # With skip_missing also of entries that are left out: candidates shall not depend on the
        # files that a machine has. Equally frequent ones, such as a list's, stay in their order.
        entries = self._answer_source(read).entries
        counts = Counter(entry.texts[-1] for entry in entries).most_common()
        return {answer: label for label, (answer, _) in enumerate(counts)}

    def _note_strange_answers(self, read: Mapping[str, Annotations]) -> None:
        candidates = self._class_labels(read)
        for part in (read[split] for split in SPLITS if split in read):
            strange = [entry for entry in part.entries if entry.texts[-1] not in candidates]
            if strange:
                part.notes.append(
                    f"{strange[0].place}: the first of {len(strange)} of {len(part.entries)} "
                    "questions whose answer is not among the candidates, so that no ranking finds "
                    "it."
                )

    def _build(self, read: Mapping[str, Annotations]) -> dict[str, BaseDataset]:
        datasets = super()._build(read)
        for dataset in datasets.values():
            dataset.class_labels = self._class_labels(read)
        return datasets

    def _conflicts(self, entries: Sequence[Entry], split: str) -> Iterator[Problem]:
        of_id: dict[int | str, Entry] = {}
        for entry in entries:
            other = of_id.setdefault(entry.id, entry)
            if other is not entry:
                yield Problem(entry.place, f"has the question_id {entry.id}, as {other.place} has")

    def _statements(self, entry: Entry) -> list[tuple[str, ...]]:
        return [(entry.name, *entry.texts)]

    def _records(self, entries: Sequence[Entry], split: str) -> list[dict[str, Any]]:
        return [
            {
                self.visual_key: entry.name,
                "question": entry.texts[0],
                "answer": entry.texts[1],
                "question_id": number if entry.id is None else entry.id,
            }
            for number, entry in enumerate(entries)
        ]
