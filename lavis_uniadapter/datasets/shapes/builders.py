"""LAVIS dataset builders of the "shapes" data set, which generate instead of downloading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.builders.video_qa_builder import VideoQABuilder
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

from lavis_uniadapter.common.errors import ConfigError, reject_unknown_keys
from lavis_uniadapter.datasets.image_qa import ImageQADataset
from lavis_uniadapter.datasets.shapes.shapes import (
    ANNOTATIONS,
    CAPTION_FILES,
    LABELS_FILE,
    QUESTION_FILES,
    RETRIEVAL_FILES,
    ClipsConfig,
    ShapesConfig,
    StillsConfig,
    ensure_clips,
    ensure_stills,
)

_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "datasets" / "shapes"
_QUESTION_ANSWERING_FILES = {**QUESTION_FILES, "ans2label": LABELS_FILE}


class ShapesBuilder(BaseDatasetBuilder):
    """A builder that generates its files, on first use and from a seed.

    The builders of all tasks read one folder of stills and one of clips, which whichever comes
    first generates whole.
    """

    generate_config_cls: type[ShapesConfig]
    ensure: Callable[[Any, Path], None]
    annotation_files: Mapping[str, str]  # by their names in build_info.annotations

    def _download_data(self) -> None:
        """Generate the data set that the `generate` block describes, unless it is there.

        Raises:
            ConfigError: the `generate` block or a storage path is not as the generator needs it.
            FileExistsError: the storage folder holds something else.
        """
        generate = self.generate_config_cls.read(self.config.get("generate"), "generate")
        self.ensure(generate, self._storage_folder(generate))

    def _storage_folder(self, generate: ShapesConfig) -> Path:
        """The one folder in which all the storage paths of the configuration lie."""
        build_info = self.config.build_info
        reject_unknown_keys(build_info.annotations, self.annotation_files, "build_info.annotations")
        folder = Path(get_cache_path(build_info.get(self.data_type).storage)).parent
        expected = {f"{self.data_type}.storage": folder / generate.visual_folder}
        given = {f"{self.data_type}.storage": build_info.get(self.data_type).storage}
        for name, info in build_info.annotations.items():
            file = folder / ANNOTATIONS / self.annotation_files[name]
            expected[f"annotations.{name}.storage"] = file
            given[f"annotations.{name}.storage"] = info.storage
        for name, path in expected.items():
            if Path(get_cache_path(given[name])) != path:
                raise ConfigError(
                    f"build_info.{name} is {given[name]}, but the generator would write "
                    f"{path}; keep all the storage paths of the data set in one folder."
                )
        return folder


class StillsBuilder(ShapesBuilder):
    """Builder of the stills, for any task."""

    generate_config_cls = StillsConfig
    ensure = staticmethod(ensure_stills)


class ClipsBuilder(ShapesBuilder):
    """Builder of the clips, for any task."""

    generate_config_cls = ClipsConfig
    ensure = staticmethod(ensure_clips)


@registry.register_builder("shapes_image_retrieval")
class ShapesStillsBuilder(StillsBuilder):
    """Captioned stills of one coloured shape."""

    train_dataset_cls = RetrievalDataset
    eval_dataset_cls = RetrievalEvalDataset
    annotation_files = RETRIEVAL_FILES

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "images.yaml")}


@registry.register_builder("shapes_retrieval")
class ShapesClipsBuilder(ClipsBuilder):
    """Captioned clips of a coloured shape, visible for a few frames."""

    train_dataset_cls = VideoRetrievalDataset
    eval_dataset_cls = VideoRetrievalEvalDataset
    annotation_files = RETRIEVAL_FILES

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "clips.yaml")}


@registry.register_builder("shapes_image_qa")
class ShapesStillsQABuilder(StillsBuilder, VideoQABuilder):
    """Questions about the one coloured shape of a still."""

    train_dataset_cls = ImageQADataset
    eval_dataset_cls = ImageQADataset
    annotation_files = _QUESTION_ANSWERING_FILES

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "images_qa.yaml")}


@registry.register_builder("shapes_qa")
class ShapesClipsQABuilder(ClipsBuilder, VideoQABuilder):
    """Questions about the coloured shape of a clip."""

    annotation_files = _QUESTION_ANSWERING_FILES

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "clips_qa.yaml")}


@registry.register_builder("shapes_image_caption")
class ShapesStillsCaptionBuilder(StillsBuilder):
    """Stills to caption; in evaluation a list of all right captions."""

    train_dataset_cls = CaptionDataset
    eval_dataset_cls = CaptionEvalDataset
    annotation_files = CAPTION_FILES

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "images_caption.yaml")}


@registry.register_builder("shapes_caption")
class ShapesClipsCaptionBuilder(ClipsBuilder):
    """Clips to caption; in evaluation a list of all right captions."""

    train_dataset_cls = VideoCaptionDataset
    eval_dataset_cls = VideoCaptionEvalDataset
    annotation_files = CAPTION_FILES

    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "clips_caption.yaml")}
