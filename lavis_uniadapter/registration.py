"""Registers this package's models, processors, tasks, dataset builders and runner with LAVIS."""

import warnings

with warnings.catch_warnings():
    # deprecations in LAVIS's dependencies, about which a user can do nothing
    warnings.simplefilter("ignore", FutureWarning)
    import lavis.models  # noqa: F401  (fills LAVIS's registry before it is added to)

from lavis.datasets.builders import DatasetZoo, dataset_zoo
from lavis.models import ModelZoo, load_model, load_model_and_preprocess, model_zoo

from lavis_uniadapter import datasets, models, processors, runners, tasks
from lavis_uniadapter.checkpoints.released import load_released_checkpoint
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.schema.methods import AdapterConfig
from lavis_uniadapter.models import (
    BlipUniAdapterCaption,
    BlipUniAdapterRetrieval,
    BlipUniAdapterVQA,
)

# LAVIS lists its models and datasets once, at import; list them again with ours.
model_zoo.model_zoo = ModelZoo().model_zoo
dataset_zoo.dataset_zoo = DatasetZoo().dataset_zoo

__all__ = [
    "AdapterConfig",
    "BlipUniAdapterCaption",
    "BlipUniAdapterRetrieval",
    "BlipUniAdapterVQA",
    "CheckpointError",
    "ConfigError",
    "datasets",
    "load_model",
    "load_model_and_preprocess",
    "load_released_checkpoint",
    "model_zoo",
    "models",
    "processors",
    "runners",
    "tasks",
]
