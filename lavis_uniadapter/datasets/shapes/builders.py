"""LAVIS dataset builders of the "shapes" data set, which generate instead of downloading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.image_qa import ImageQADataset
from lavis_uniadapter.datasets.shapes.generation import (
    ANNOTATIONS,
    CAPTION_FILES,
    LABELS_FILE,
    QUESTION_FILES,
    RETRIEVAL_FILES,
    ensure_generated,
)

_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "datasets" / "shapes"
_QA_FILES = {**QUESTION_FILES, "ans2label": LABELS_FILE}


class ShapesBuilder(BaseDatasetBuilder):
    """A builder that generates its files, on first use and from a seed.

    The builders of all tasks read one folder of stills and one of clips; the first one that is
    used generates all of it.
    """

    options_cls: type[Stills]
    annotation_files: Mapping[str, str]  # by their names in build_info.annotations

    def prepare(self) -> None:
        """Generate the data set that the `generate` block describes, unless it exists.

        Raises:
            ConfigError: the `generate` block or a storage path is not as the generator needs it.
            FileExistsError: the storage folder holds something else.
        """
        options = self.options_cls.read(self.config.get("generate"), "generate")
        ensure_generated(options, self._storage_folder())

    def _download_data(self) -> None:
        self.prepare()

    def _storage_folder(self) -> Path:
        """The one folder that all storage paths of the configuration lie in."""
        build_info, kind = self.config.build_info, self.data_type
        reject_unknown_keys(build_info.annotations, self.annotation_files, "build_info.annotations")
        storages = {f"annotations.{name}": i.storage for name, i in build_info.annotations.items()}
        storages[kind] = build_info.get(kind).storage
        folder = Path(get_cache_path(storages[kind])).parent
        for name, storage in storages.items():
            file = self.annotation_files.get(name.removeprefix("annotations."))
            path = folder / kind if name == kind else folder / ANNOTATIONS / file
            if Path(get_cache_path(storage)) != path:
                raise ConfigError(
                    f"build_info.{name}.storage is {storage}, but the generator would write "
                    f"{path}; keep all storage paths of the data set in one folder."
                )
        return folder


@registry.register_builder("shapes_image_retrieval")
class ShapesStillsBuilder(ShapesBuilder):
    """Captioned stills of one coloured shape."""

    options_cls = Stills
    train_dataset_cls, eval_dataset_cls = RetrievalDataset, RetrievalEvalDataset
    annotation_files = RETRIEVAL_FILES
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "images.yaml")}


@registry.register_builder("shapes_retrieval")
class ShapesClipsBuilder(ShapesBuilder):
    """Captioned clips of a coloured shape, visible for a few frames."""

    options_cls = Clips
    train_dataset_cls, eval_dataset_cls = VideoRetrievalDataset, VideoRetrievalEvalDataset
    annotation_files = RETRIEVAL_FILES
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "clips.yaml")}


@registry.register_builder("shapes_image_qa")
class ShapesStillsQABuilder(ShapesBuilder, VideoQABuilder):
    """Questions about the one coloured shape of a still."""

    options_cls = Stills
    train_dataset_cls = eval_dataset_cls = ImageQADataset
    annotation_files = _QA_FILES
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "images_qa.yaml")}


@registry.register_builder("shapes_qa")
class ShapesClipsQABuilder(ShapesBuilder, VideoQABuilder):
    """Questions about the coloured shape of a clip."""

    options_cls = Clips
    annotation_files = _QA_FILES
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "clips_qa.yaml")}


@registry.register_builder("shapes_image_caption")
class ShapesStillsCaptionBuilder(ShapesBuilder):
    """Stills to caption; in evaluation a list of all right captions."""

    options_cls = Stills
    train_dataset_cls, eval_dataset_cls = CaptionDataset, CaptionEvalDataset
    annotation_files = CAPTION_FILES
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "images_caption.yaml")}


@registry.register_builder("shapes_caption")
class ShapesClipsCaptionBuilder(ShapesBuilder):
    """Clips to caption; in evaluation a list of all right captions."""

    options_cls = Clips
    train_dataset_cls, eval_dataset_cls = VideoCaptionDataset, VideoCaptionEvalDataset
    annotation_files = CAPTION_FILES
    DATASET_CONFIG_DICT = {"default": str(_CONFIGS / "clips_caption.yaml")}
