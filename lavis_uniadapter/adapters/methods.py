"""What trains: each value of ``model.tuning``, and the set of modules that it trains."""

from __future__ import annotations

from lavis_uniadapter.adapters.bank import AdapterSet
from lavis_uniadapter.adapters.bitfit import BitFitSet
from lavis_uniadapter.adapters.linear import LinearSet
from lavis_uniadapter.adapters.lora import LoraSet
from lavis_uniadapter.adapters.uniadapter import SeparateAdapterSet, UniAdapterSet

# All but "full" train a set beside a frozen backbone, and the set's copies of the model's heads.
TUNING_METHODS: dict[str, type[AdapterSet] | None] = {
    "uniadapter": UniAdapterSet,
    "adapter": SeparateAdapterSet,
    "lora": LoraSet,
    "bitfit": BitFitSet,
    "linear": LinearSet,
    "full": None,
}
