"""Adapters in plain torch; nothing here knows LAVIS."""

from lavis_uniadapter.adapters.bank import (
    AdapterBank,
    AdapterSet,
    AdapterSlot,
    BackboneGeometry,
    KeyValueSlot,
    UniAdapterSet,
)
from lavis_uniadapter.adapters.config import AdapterConfig
from lavis_uniadapter.adapters.uniadapter import KeyValueAdapter, UniAdapter

__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "AdapterSet",
    "AdapterSlot",
    "BackboneGeometry",
    "KeyValueAdapter",
    "KeyValueSlot",
    "UniAdapter",
    "UniAdapterSet",
]
