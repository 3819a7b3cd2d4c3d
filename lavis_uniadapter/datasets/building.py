"""Build LAVIS's datasets, checked before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.distributed as dist
from lavis.common.dist_utils import is_dist_avail_and_initialized, is_main_process
from lavis.common.registry import registry
from lavis.common.utils import get_cache_path

from lavis_uniadapter.datasets.builders import ShapesBuilder
from lavis_uniadapter.datasets.preflight import check_annotations, check_dataset


def build_checked_datasets(datasets_cfg: Mapping, splits: Collection[str]) -> dict[str, dict]:
    """Datasets by name and split, from the ``datasets:`` section of a configuration.

    The main process checks for all: every problem of a dataset is named before training starts.

    Args:
        datasets_cfg: a node a dataset, as LAVIS's builders take it.
        splits: those that the run uses; whoever only evaluates needs no training data.

    Raises:
        DatasetError: listing what is missing or malformed.
    """
    built = {}
    for name, config in datasets_cfg.items():
        for split in set(config.build_info.annotations) - set(splits):
            del config.build_info.annotations[split]
        builder = registry.get_builder_class(name)(config)
        if isinstance(builder, ShapesBuilder):
            if is_main_process():
                builder._download_data()
            _barrier()
        check_annotations(builder.config)
        _name_local_annotations(builder.config)
        built[name] = builder.build_datasets()
        if is_main_process():
            for split, dataset in built[name].items():
                check_dataset(dataset, split)
        _barrier()
    return built


def _name_local_annotations(config: Mapping) -> None:
    """LAVIS's builders ask for a ``url`` even where the annotation file is already in place."""
    for info in config.build_info.annotations.values():
        if info.get("url") is None:
            storages = [info.storage] if isinstance(info.storage, str) else list(info.storage)
            info.url = [get_cache_path(storage) for storage in storages]


def _barrier() -> None:
    if is_dist_avail_and_initialized():
        dist.barrier()
