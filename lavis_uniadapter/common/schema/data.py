"""``datasets:``, a section for each dataset."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from lavis_uniadapter.common.schema.processors import PROCESSORS
from lavis_uniadapter.common.schema.section import (
    Location,
    Locations,
    Section,
    Text,
    Texts,
    option,
)
from lavis_uniadapter.common.schema.shapes import GENERATED

DataType = Literal["images", "videos", "features"]


class Source(Section):
    """Files of annotations, or a folder of images, videos or features."""

    storage: Location | Locations | None = option(
        None, "Path below `run.cache_root`; for `custom_…`, below the current folder."
    )
    url: Location | Locations | None = option(None, "Where LAVIS downloads it from.")
    md5: Text | Texts | None = option(None, "Its checksum.")


class BuildInfo(Section):
    """Where a dataset lies."""

    annotations: dict[str, Source | None] | None = option(None, "By split; null removes a split.")
    images: Source | None = option(None, "Folder of the images.")
    videos: Source | None = option(None, "Folder of the videos.")
    features: Source | None = option(None, "Folder of features, in some of LAVIS's datasets.")


class ProcessorSection(Section):
    """A processor and its options."""

    model_config = ConfigDict(extra="allow")

    name: str = option(..., "Name of the processor in LAVIS's registry.")


class Processors(Section):
    """A processor for each mode."""

    train: ProcessorSection | None = option(None, "In training.")
    eval: ProcessorSection | None = option(None, "In evaluation.")


class DatasetSection(Section):
    """A dataset, by the name of its builder."""

    type: str = option("default", "Which of the builder's configurations to take.")
    data_type: DataType | None = option(None, "What a record shows; needed by `custom_…`.")
    build_info: BuildInfo | None = option(None, "Where it lies; over the builder's own values.")
    vis_processor: Processors | None = option(None, "What is done with images or videos.")
    text_processor: Processors | None = option(None, "What is done with texts.")
    skip_missing: bool = option(False, "Leave out training records without a readable file.")
    allow_missing: bool = option(False, "Score evaluation items without a readable file as wrong.")
    generate: dict[str, Any] | None = option(None, "Contents of the embedded example.")


def read_dataset(name: str, values: Any) -> dict[str, Any]:
    """Validate a dataset's section, its processors' options and its ``generate`` section.

    Adds the defaults of this package's processors. Does not check options of LAVIS's.

    Raises:
        ConfigError: naming what is wrong.
    """
    where = f"datasets.{name}"
    section = DatasetSection.read(values, where).model_dump(mode="json", exclude_unset=True)
    for kind in ("vis_processor", "text_processor"):
        for mode, options in (section.get(kind) or {}).items():
            if options and options["name"] in PROCESSORS:
                processor = PROCESSORS[options["name"]].read(options, f"{where}.{kind}.{mode}")
                section[kind][mode] = processor.model_dump(mode="json")
    if name in GENERATED:
        GENERATED[name].read(section.get("generate"), f"{where}.generate")
    return section
