"""Models, registered with LAVIS."""

from lavis_uniadapter.models.base import TunedBlip
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval

__all__ = ["BlipUniAdapterRetrieval", "TunedBlip"]
