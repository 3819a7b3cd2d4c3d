"""The configuration: one pydantic model for each section, which owns its keys.

Nothing here imports torch or LAVIS, so a wrong configuration is refused in under a second.
"""

from lavis_uniadapter.common.schema.data import DatasetSection, read_dataset
from lavis_uniadapter.common.schema.model import MODELS, ModelSection
from lavis_uniadapter.common.schema.run import Evaluation, RunSection
from lavis_uniadapter.common.schema.section import Section

__all__ = [
    "MODELS",
    "DatasetSection",
    "Evaluation",
    "ModelSection",
    "RunSection",
    "Section",
    "read_dataset",
]
