"""LAVIS dataset builders of the "shapes" data set, which generate instead of downloading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from omegaconf import OmegaConf

from lavis_uniadapter.datasets.shapes import (
    ANNOTATIONS,
    ClipsConfig,
    ShapesConfig,
    StillsConfig,
    ensure_clips,
    ensure_stills,
)
from lavis_uniadapter.errors import ConfigError

_CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "datasets" / "shapes"


class ShapesBuilder(BaseDatasetBuilder):
    """A builder that generates its files, on first use and from a seed."""

    generate_config_cls: type[ShapesConfig]
    ensure: Callable[[Any, Path], None]

    def _download_data(self) -> None:
        """Generate the data set that the `generate` block describes, unless it is there.

        Raises:
            ConfigError: the `generate` block or a storage path is not as the generator needs it.
            FileExistsError: the storage folder holds something else.
        """
        options = OmegaConf.to_container(OmegaConf.create(self.config.get("generate") or {}))
        generate = self.generate_config_cls.from_mapping(options)
        self.ensure(generate, self._storage_folder(generate))

    def _storage_folder(self, generate: ShapesConfig) -> Path:
        """The one folder in which all the storage paths of the configuration lie."""
        build_info = self.config.build_info
        folder = Path(get_cache_path(build_info.get(self.data_type).storage)).parent
        expected = {f"{self.data_type}.storage": folder / generate.visual_folder}
        given = {f"{self.data_type}.storage": build_info.get(self.data_type).storage}
        for split, info in build_info.annotations.items():
            expected[f"annotations.{split}.storage"] = folder / ANNOTATIONS / f"{split}.json"
            given[f"annotations.{split}.storage"] = info.storage
        for name, path in expected.items():
            if Path(get_cache_path(given[name])) != path:
                raise ConfigError(
                    f"build_info.{name} is {given[name]}, but the generator would write "
                    f"{path}; keep all the storage paths of the data set in one folder."
                )
        return folder


@registry.register_builder("shapes_image_retrieval")
class ShapesStillsBuilder(ShapesBuilder):
    """Captioned stills of one coloured shape."""

    train_dataset_cls = RetrievalDataset
    eval_dataset_cls = RetrievalEvalDataset
    generate_config_cls = StillsConfig
    ensure = staticmethod(ensure_stills)

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "images.yaml")}


@registry.register_builder("shapes_retrieval")
class ShapesClipsBuilder(ShapesBuilder):
    """Captioned clips of a coloured shape, visible for a few frames."""

    train_dataset_cls = VideoRetrievalDataset
    eval_dataset_cls = VideoRetrievalEvalDataset
    generate_config_cls = ClipsConfig
    ensure = staticmethod(ensure_clips)

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "clips.yaml")}
