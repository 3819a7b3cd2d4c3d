"""Find what an evaluation split has in common with the training data."""

from __future__ import annotations

import functools
import logging
import os
from collections import defaultdict
from collections.abc import Mapping

from lavis.datasets.datasets.base_dataset import BaseDataset

from lavis_uniadapter.datasets.layouts import layout_of
from lavis_uniadapter.datasets.preflight import as_list
from lavis_uniadapter.datasets.records import DatasetError

logger = logging.getLogger(__name__)


def check_overlap(datasets: Mapping[str, Mapping[str, BaseDataset]]) -> None:
    """Warn of evaluation splits that share items with the training data.

    An item is a file or, as benchmarks of question answering share images, a question about one.
    Datasets are by name and split.

    Raises:
        DatasetError: a split has the same items with the same captions as a training split.
    """
    training = [_items(of["train"]) for of in datasets.values() if "train" in of]
    if not (trained := set().union(*training)):
        return
    evaluated = ((n, split, d) for n, of in datasets.items() for split, d in of.items())
    for name, split, dataset in evaluated:
        items = _items(dataset) if split != "train" else {}
        if items and items in training:
            raise DatasetError(
                f"{name}, {split} is the same as the training data: {len(items)} items, with the "
                f"same texts. Set build_info.annotations.{split} to other records."
            )
        if shared := items.keys() & trained:
            logger.warning(
                "%s, %s: %d of %d items are also in the training data, so the result does not show "
                "how well the model generalises. One of them: %s",
                *(name, split, len(shared), len(items), " ".join(min(shared)).strip()),
            )


def _items(dataset: BaseDataset) -> dict[tuple[str, str], set[str]]:
    """The captions of each item of a known layout: (file with links resolved, question or "")."""
    if (layout := layout_of(type(dataset))) is None:
        return {}
    items = defaultdict(set)
    real_folder = functools.cache(os.path.realpath)

    @functools.cache
    def resolve(name: str) -> str:
        folder, name = os.path.split(os.path.join(dataset.vis_root, name))
        path = os.path.join(real_folder(folder), name)
        return os.path.realpath(path) if os.path.islink(path) else path

    for record in dataset.annotation:
        texts = (record.get("question", ""), *as_list(record.get("caption")))
        question, *captions = (" ".join(text.lower().split()) for text in texts)
        items[resolve(record[layout.visual_key]), question].update(captions)
    return items
