"""Models, registered with LAVIS."""

from lavis_uniadapter.models.base import TunedBlip
from lavis_uniadapter.models.caption import BlipUniAdapterCaption
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.models.vqa import BlipUniAdapterVQA

__all__ = ["BlipUniAdapterCaption", "BlipUniAdapterRetrieval", "BlipUniAdapterVQA", "TunedBlip"]
