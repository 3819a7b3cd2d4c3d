"""Checks around LAVIS's own building of datasets, for every task."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, MutableMapping
from functools import partial

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.datasets.base_dataset import BaseDataset

from lavis_uniadapter.common.distributed import on_main_process
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.custom import CustomBuilder
from lavis_uniadapter.datasets.overlap import check_overlap
from lavis_uniadapter.datasets.preflight import (
    as_list,
    check_annotations,
    check_dataset,
    leave_out,
    unreadable_files,
)
from lavis_uniadapter.datasets.records import SPLITS, DatasetError, is_split, listing

logger = logging.getLogger(__name__)


def make_buildable(datasets_cfg: MutableMapping, splits: Collection[str]) -> None:
    """Check the datasets of a configuration and adapt it, in place, to LAVIS's builders.

    Splits that the run does not use are removed, and datasets without any others. A builder with a
    method ``prepare`` (of custom or generated data) checks or makes its files there.

    Raises:
        DatasetError: listing what is missing or malformed.
        ConfigError: no dataset has any of the splits, or several have the same one to evaluate.
    """
    available: set[str] = set()
    for name, config in list(datasets_cfg.items()):
        builder = registry.get_builder_class(name)(config)
        annotations = _annotations(builder.config)
        # LAVIS's builders build no splits of other names
        is_built = is_split if isinstance(builder, CustomBuilder) else SPLITS.__contains__
        there = list(filter(is_built, annotations))
        available.update(there)
        unused = [s for s in there if s not in splits or annotations[s] is None]
        for split in unused:
            del annotations[split]
        if there and there == unused:
            del datasets_cfg[name]
            continue
        prepare = getattr(builder, "prepare", partial(check_annotations, builder))
        on_main_process(prepare, errors=(ConfigError, DatasetError, FileExistsError))
        for info in annotations.values():
            if info.get("url") is None:
                # LAVIS's builders ask for one even if the annotation file exists
                info.url = [get_cache_path(storage) for storage in as_list(info.storage)]
    if not datasets_cfg:
        raise ConfigError(
            f"The run's splits are {', '.join(sorted(splits)) or 'none'}, and the datasets have "
            f"{', '.join(sorted(available)) or 'none'}. Correct run.train_splits, valid_splits or "
            "test_splits."
        )
    for split in sorted({*splits} - {"train"}):
        having = [name for name in datasets_cfg if split in _annotations(datasets_cfg[name])]
        if len(having) > 1:
            raise ConfigError(
                f"The datasets {', '.join(having)} all have a '{split}' split, and a run evaluates "
                f"on one. Remove it from the others: datasets.<name>.build_info.annotations."
                f"{split}=null."
            )


def _annotations(config: Mapping) -> MutableMapping:
    # LAVIS's web datasets and image folders have none
    return (config.get("build_info") or {}).get("annotations") or {}


def _check_records(datasets: Mapping[str, Mapping[str, BaseDataset]]) -> None:
    for by_split in datasets.values():
        for split, dataset in by_split.items():
            check_dataset(dataset, split)
    check_overlap(datasets)


def check_built(
    datasets: Mapping[str, Mapping[str, BaseDataset]], datasets_cfg: Mapping, files: bool = True
) -> None:
    """Check datasets that a LAVIS task built, by name and split.

    With ``skip_missing``, records of unreadable files are removed from the training split.

    Without ``files``, images and videos are not read.

    Raises:
        DatasetError: listing what is missing or malformed.
        ConfigError: ``skip_missing`` is set, but files are not read.
    """
    on_main_process(_check_records, datasets, errors=(DatasetError,))
    images = 0
    for name, by_split in datasets.items():
        skip_missing = datasets_cfg[name].get("skip_missing", False)
        if skip_missing and not files:
            raise ConfigError(
                f"datasets.{name}.skip_missing is True, and run.check_files is False, so missing "
                "files are not found. Set run.check_files: True."
            )
        for split, dataset in by_split.items():
            training = split == "train"
            allowed = skip_missing if training else datasets_cfg[name].get("allow_missing", False)
            check = (unreadable_files, dataset, split)
            unusable = on_main_process(*check, errors=()) if files else {}
            what = f"{name}, {split}: {len(unusable)} files cannot be read"
            if unusable and not allowed:
                reasons = [f"{path}: {why}" for path, why in unusable.items()]
                raise DatasetError(
                    f"{what}. Download them again, correct the visual folder, or remove their "
                    "records from the annotations (skip_missing: True leaves them out of training, "
                    f"allow_missing: True scores them as wrong in evaluation):{listing(reasons)}"
                )
            if unusable and training:
                left_out = leave_out(dataset, unusable)
                logger.warning(
                    "%s; %d records left out (skip_missing), %d records remain.",
                    *(what, left_out, len(dataset)),
                )
            elif unusable:
                logger.warning("%s; their items are scored as wrong (allow_missing).", what)
            if training and hasattr(dataset, "img_ids"):
                # Contrastive learning finds positives by these numbers, and each of LAVIS's
                # datasets counts them from 0.
                dataset.img_ids = {key: images + i for key, i in dataset.img_ids.items()}
                images += len(dataset.img_ids)
