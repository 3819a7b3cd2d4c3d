"""Tuning methods in plain torch, a file each; nothing here knows LAVIS."""

from lavis_uniadapter.adapters.bank import (
    AdapterBank,
    AdapterSet,
    AdapterSlot,
    DeltaSlot,
    KeyValueSlot,
)
from lavis_uniadapter.adapters.bitfit import BitFitSet
from lavis_uniadapter.adapters.geometry import BackboneGeometry, BiasSite, LinearSite
from lavis_uniadapter.adapters.linear import LinearSet
from lavis_uniadapter.adapters.lora import LoraSet
from lavis_uniadapter.adapters.separate import SeparateAdapterSet
from lavis_uniadapter.adapters.uniadapter import KeyValueAdapter, UniAdapter, UniAdapterSet
from lavis_uniadapter.common.schema.methods import (
    AdapterConfig,
    BottleneckConfig,
    LoraConfig,
    MethodConfig,
)

__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "AdapterSet",
    "AdapterSlot",
    "BackboneGeometry",
    "BiasSite",
    "BitFitSet",
    "BottleneckConfig",
    "DeltaSlot",
    "KeyValueAdapter",
    "KeyValueSlot",
    "LinearSet",
    "LinearSite",
    "LoraConfig",
    "LoraSet",
    "MethodConfig",
    "SeparateAdapterSet",
    "UniAdapter",
    "UniAdapterSet",
]
