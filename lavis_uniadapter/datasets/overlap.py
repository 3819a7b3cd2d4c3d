"""Find what an evaluation split has in common with the training data."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from lavis.datasets.datasets.base_dataset import BaseDataset

from lavis_uniadapter.datasets.layouts import layout_of
from lavis_uniadapter.datasets.preflight import as_list
from lavis_uniadapter.datasets.records import DatasetError

logger = logging.getLogger(__name__)


def check_overlap(datasets: Mapping[str, Mapping[str, BaseDataset]]) -> None:
    """Warn of evaluation splits that share files with the training data.

    Datasets are by name and split. For question answering, where other questions about the same
    images are common practice, a file counts only with the same question.

    Raises:
        DatasetError: a split is the same as a training split, file by file and text by text.
    """
    by_name = (_items(by_split["train"]) for by_split in datasets.values() if "train" in by_split)
    training = list(filter(None, by_name))
    trained = set().union(*training)
    trained_files = {(file,) for file, _ in trained}
    for name, by_split in datasets.items():
        for split, dataset in by_split.items():
            if split == "train" or not trained:
                continue
            items = _items(dataset)
            if items in training:
                raise DatasetError(
                    f"{name}, {split} is the same as the training data: {len(items)} texts of the "
                    f"same files. Set build_info.annotations.{split} to other records."
                )
            asks = any("question" in record for record in dataset.annotation[:1])
            mine: set[tuple[str, ...]] = set(items) if asks else {(file,) for file, _ in items}
            if shared := mine & (trained if asks else trained_files):
                logger.warning(
                    "%s, %s: %d of %d %s are also in the training data, so its result does not "
                    "show how well the model generalises. One of them: %s",
                    *(name, split, len(shared), len(mine)),
                    *("questions about a file" if asks else "files", ": ".join(min(shared))),
                )


def _items(dataset: BaseDataset) -> set[tuple[str, str]]:
    """Each text of a dataset with its file, links resolved; nothing for an unknown layout."""
    layout = layout_of(type(dataset))
    if layout is None:
        return set()
    items, files = set(), {}
    for record in dataset.annotation:
        name = record[layout.visual_key]
        if name not in files:
            files[name] = os.path.realpath(os.path.join(dataset.vis_root, name))
        for text in as_list(record.get("question", record.get("caption"))) or [""]:
            items.add((files[name], " ".join(text.lower().split())))
    return items
