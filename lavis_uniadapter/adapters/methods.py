"""What trains: each value of ``model.tuning``, and the set of modules that it trains."""

from __future__ import annotations

from lavis_uniadapter.adapters.bank import AdapterSet
from lavis_uniadapter.adapters.bitfit import BitFitSet
from lavis_uniadapter.adapters.linear import LinearSet
from lavis_uniadapter.adapters.lora import LoraSet
from lavis_uniadapter.adapters.separate import SeparateAdapterSet
from lavis_uniadapter.adapters.uniadapter import UniAdapterSet

# Each set is trained beside a frozen backbone. It is built from copies of the model's heads, the
# method's configuration (``common.schema.methods.METHODS``) and a BackboneGeometry.
TUNING_METHODS: dict[str, type[AdapterSet] | None] = {
    # adapters shared by vision, text and fusion, and the heads
    "uniadapter": UniAdapterSet,
    # a bottleneck of its own for each modality, and the heads
    "adapter": SeparateAdapterSet,
    # low-rank changes of the backbone's matrices, and the heads
    "lora": LoraSet,
    # the backbone's biases, and the heads
    "bitfit": BitFitSet,
    # the heads, on a frozen backbone
    "linear": LinearSet,
    # every parameter of BLIP
    "full": None,
}
