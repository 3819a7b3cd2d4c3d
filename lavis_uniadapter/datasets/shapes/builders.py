"""LAVIS dataset builders of the "shapes" data set, which generate instead of downloading."""

from __future__ import annotations

from pathlib import Path

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.builders.video_qa_builder import VideoQABuilder
from omegaconf import OmegaConf

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.common.schema.shapes import GENERATED
from lavis_uniadapter.datasets.layouts import DATASET_CLASSES
from lavis_uniadapter.datasets.preflight import check_annotations
from lavis_uniadapter.datasets.shapes.generation import ensure_generated


class ShapesBuilder(BaseDatasetBuilder):
    """A builder that generates its files, on first use and from a seed.

    The builders of all tasks read one folder of stills and one of clips; the first one that is
    used generates all of it.
    """

    name: str

    def prepare(self) -> None:
        """Generate the data set that the `generate` block describes, unless it exists.

        Raises:
            ConfigError: the `generate` block or a storage path is not as the generator needs it.
            DatasetError: an annotation file is none of those that are generated.
            FileExistsError: the storage folder holds something else.
        """
        options = GENERATED[self.name].read(self.config.get("generate"), "generate")
        info = self.config.build_info
        for key in (self.data_type, *(f"annotations.{key}" for key in info.annotations)):
            storage = OmegaConf.select(info, f"{key}.storage")
            if not isinstance(storage, str):
                raise ConfigError(f"build_info.{key}.storage is {storage}; it must be a path.")
        visual = Path(get_cache_path(info[self.data_type].storage))
        annotations = visual.parent / "annotations"
        for key, source in info.annotations.items():
            if Path(get_cache_path(source.storage)).parent != annotations:
                raise ConfigError(
                    f"build_info.annotations.{key}.storage is {source.storage}, but the generator "
                    f"writes to {annotations}; keep all storage paths in one folder."
                )
        ensure_generated(options, visual.parent)
        check_annotations(self)

    def _download_data(self) -> None:
        self.prepare()


for _name in GENERATED:
    _task = _name.split("_")[-1]
    _train, _eval = DATASET_CLASSES[_task, "images" if "_image_" in _name else "videos"]
    _bases = (ShapesBuilder, VideoQABuilder) if _task == "qa" else (ShapesBuilder,)
    _config = PACKAGE_ROOT / f"configs/datasets/shapes/{_name.removeprefix('shapes_')}.yaml"
    _attributes = {
        "name": _name,
        "train_dataset_cls": _train,
        "eval_dataset_cls": _eval,
        "DATASET_CONFIG_DICT": {"default": str(_config)},
    }
    registry.register_builder(_name)(type(_name, _bases, _attributes))
