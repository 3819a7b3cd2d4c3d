"""Checks around LAVIS's own building of datasets, whatever the task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from torch.utils.data import Dataset

from lavis_uniadapter.common.distributed import on_main_process
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.custom import CustomBuilder
from lavis_uniadapter.datasets.layouts import layout_of
from lavis_uniadapter.datasets.preflight import (
    SPLITS,
    DatasetError,
    check_annotations,
    check_dataset,
    leave_out,
)
from lavis_uniadapter.datasets.shapes.builders import ShapesBuilder

logger = logging.getLogger(__name__)
T = TypeVar("T")


def make_buildable(datasets_cfg: Mapping, splits: Collection[str]) -> None:
    """Check a configuration's datasets, and make it one that LAVIS's builders build.

    Splits that the run does not use are taken out, and datasets that have no others: whoever only
    evaluates needs no training data. Every problem of a dataset is named, before anything is built.

    Args:
        datasets_cfg: a node a dataset, as LAVIS's builders take it; changed in place.
        splits: those that the run uses.

    Raises:
        DatasetError: listing what is missing or malformed.
        ConfigError: if no dataset has any of the splits, or several have the same one to evaluate.
    """
    available: set[str] = set()
    for name, config in list(datasets_cfg.items()):
        builder = registry.get_builder_class(name)(config)
        annotations = _annotations(builder.config)
        there = [split for split in SPLITS if split in annotations]
        available.update(there)
        unused = [s for s in there if s not in splits or annotations[s] is None]
        for split in unused:
            del annotations[split]
        if there and there == unused:
            del datasets_cfg[name]
            continue
        if isinstance(builder, ShapesBuilder):
            _on_main_process(builder._download_data)
        if isinstance(builder, CustomBuilder):
            _on_main_process(builder.check_records)
        else:
            _on_main_process(check_annotations, builder)
        _name_local_annotations(annotations)
    if not datasets_cfg:
        raise ConfigError(
            f"The run's splits are {', '.join(sorted(splits)) or 'none'}, and the datasets have "
            f"{', '.join(sorted(available)) or 'none'}. Correct run.train_splits, valid_splits or "
            "test_splits."
        )
    for split in ("val", "test"):
        having = [name for name in datasets_cfg if split in _annotations(datasets_cfg[name])]
        if len(having) > 1:
            raise ConfigError(
                f"The datasets {', '.join(having)} all have a '{split}' split, and a run evaluates "
                f"on one. Take it out of the others: datasets.<name>.build_info.annotations."
                f"{split}=null."
            )


def check_built(
    datasets: Mapping[str, Mapping[str, Dataset]], datasets_cfg: Mapping, files: bool = True
) -> None:
    """Check what LAVIS built, files included; leave out what ``skip_missing`` allows to.

    Args:
        datasets: by name and split, as a LAVIS task builds them.
        datasets_cfg: their configuration.
        files: look at the visual files too, which takes a while where there are many.

    Raises:
        DatasetError: listing what is missing or malformed.
        ConfigError: if files are to be left out and are not looked at.
    """
    for name, by_split in datasets.items():
        skip_missing, allow_missing = (
            bool(datasets_cfg[name].get(key, False)) for key in ("skip_missing", "allow_missing")
        )
        if skip_missing and not files:
            raise ConfigError(
                f"datasets.{name}.skip_missing is True and run.check_files False: whose files are "
                "missing is not known. Set run.check_files: True."
            )
        for split, dataset in by_split.items():
            if layout_of(type(dataset)) is None:
                logger.warning("%s, %s: this kind of dataset is not checked.", name, split)
                continue
            tolerant = skip_missing if split == "train" else allow_missing
            unusable = _on_main_process(check_dataset, dataset, split, tolerant, files)
            if split != "train":
                # read by the runner's loaders
                dataset.allow_missing = allow_missing
                if unusable.paths():
                    logger.warning(
                        "%s, %s: %d files are missing and %d cannot be decoded; their items are "
                        "scored as wrong (allow_missing).",
                        *(name, split, len(unusable.missing), len(unusable.undecodable)),
                    )
            elif unusable.paths():
                records = leave_out(dataset, unusable)
                logger.warning(
                    "%s, %s: %d records left out (skip_missing), as %d files are missing and %d "
                    "cannot be decoded; %d records remain.",
                    *(name, split, records, len(unusable.missing), len(unusable.undecodable)),
                    len(dataset),
                )
    trained = [by_split["train"] for by_split in datasets.values() if "train" in by_split]
    _number_apart(dataset for dataset in trained if hasattr(dataset, "img_ids"))


def _annotations(config: Mapping) -> Mapping:
    # LAVIS's web datasets and image folders have none
    return (config.get("build_info") or {}).get("annotations") or {}


def _number_apart(datasets: Iterable[Dataset]) -> None:
    """Give the visual inputs of several training sets different numbers.

    Each of LAVIS's datasets counts them from 0 in ``img_ids``, by which contrastive learning
    tells what shows the same.
    """
    offset = 0
    for dataset in datasets:
        dataset.img_ids = {name: offset + i for name, i in dataset.img_ids.items()}
        offset += len(dataset.img_ids)


def _on_main_process(check: Callable[..., T], *args: Any) -> T:
    return on_main_process(check, *args, errors=(ConfigError, DatasetError, FileExistsError))


def _name_local_annotations(annotations: Mapping) -> None:
    """LAVIS's builders ask for a ``url`` even where the annotation file is already in place."""
    for info in annotations.values():
        if info.get("url") is None:
            storages = [info.storage] if isinstance(info.storage, str) else list(info.storage)
            info.url = [get_cache_path(storage) for storage in storages]
