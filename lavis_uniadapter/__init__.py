"""UniAdapter for BLIP, as a plugin of salesforce LAVIS.

Importing this package registers its models, processors, tasks, dataset builders and runner with
LAVIS, whose own functions then find them by name.
"""

import sys
import warnings

from lavis_uniadapter.version import __version__

# ``python -m lavis_uniadapter.doctor`` must start where LAVIS, or what it needs, does not import.
# While Python looks for the module that -m names, sys.argv[0] is "-m".
_is_doctor = sys.argv[:1] == ["-m"] and any(
    argument.removeprefix("-m") == "lavis_uniadapter.doctor" for argument in sys.orig_argv
)

if not _is_doctor:
    with warnings.catch_warnings():
        # third parties' deprecations, of which there is nothing for a user to mend
        warnings.simplefilter("ignore", FutureWarning)
        import lavis.models  # noqa: F401  (fills LAVIS's registry before it is added to)

    from lavis.datasets.builders import DatasetZoo, dataset_zoo
    from lavis.models import ModelZoo, load_model, load_model_and_preprocess, model_zoo

    from lavis_uniadapter import datasets, models, processors, runners, tasks
    from lavis_uniadapter.adapters.config import AdapterConfig
    from lavis_uniadapter.checkpoints.released import load_released_checkpoint
    from lavis_uniadapter.common.errors import CheckpointError, ConfigError
    from lavis_uniadapter.models import (
        BlipUniAdapterCaption,
        BlipUniAdapterRetrieval,
        BlipUniAdapterVQA,
    )

    # LAVIS lists its models and data sets once, when imported; list them again with ours.
    model_zoo.model_zoo = ModelZoo().model_zoo
    dataset_zoo.dataset_zoo = DatasetZoo().dataset_zoo

__all__ = [
    "__version__",
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
