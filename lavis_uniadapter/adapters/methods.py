"""What trains: each value of ``model.tuning``, and the parameters it trains."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_uniadapter.adapters.bank import AdapterSet
from lavis_uniadapter.adapters.bitfit import BitFitSet
from lavis_uniadapter.adapters.linear import LinearSet
from lavis_uniadapter.adapters.lora import LoraSet
from lavis_uniadapter.adapters.separate import SeparateAdapterSet
from lavis_uniadapter.adapters.uniadapter import UniAdapterSet
from lavis_uniadapter.common.errors import ConfigError, nearest


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune a model.

    Attributes:
        set_cls: the set of modules that is trained beside a frozen backbone, built from copies of
            the model's heads, the method's configuration and a BackboneGeometry. None: no such
            set, the whole model is trained.
    """

    set_cls: type[AdapterSet] | None


TUNING_METHODS = {
    # adapters shared by vision, text and fusion, and the heads
    "uniadapter": TuningMethod(UniAdapterSet),
    # a bottleneck of its own for each modality, and the heads
    "adapter": TuningMethod(SeparateAdapterSet),
    # low-rank changes of the backbone's matrices, and the heads
    "lora": TuningMethod(LoraSet),
    # the backbone's biases, and the heads
    "bitfit": TuningMethod(BitFitSet),
    # the heads, on a frozen backbone
    "linear": TuningMethod(LinearSet),
    # every parameter of BLIP
    "full": TuningMethod(None),
}


def tuning_method(name: str) -> TuningMethod:
    """Look up a method.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in list(TUNING_METHODS):
        raise ConfigError(
            f"model.tuning is {name!r}.{nearest(str(name), TUNING_METHODS)} "
            f"Known: {', '.join(TUNING_METHODS)}."
        )
    return TUNING_METHODS[name]
