"""What trains: each value of ``model.tuning``, and the parameters it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavis_uniadapter.adapters.bank import AdapterSet
from lavis_uniadapter.adapters.bitfit import BitFitSet
from lavis_uniadapter.adapters.config import AdapterConfig, BottleneckConfig, MethodConfig
from lavis_uniadapter.adapters.linear import LinearSet
from lavis_uniadapter.adapters.lora import LoraConfig, LoraSet
from lavis_uniadapter.adapters.separate import SeparateAdapterSet
from lavis_uniadapter.adapters.uniadapter import UniAdapterSet
from lavis_uniadapter.common.errors import ConfigError, nearest


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune a model.

    Attributes:
        set_cls: the set of modules that is trained beside a frozen backbone, built from copies of
            the model's heads, a ``config_cls`` and a BackboneGeometry. None: no such set, the
            whole model is trained.
        config_cls: reads the method's section of ``model:``.
    """

    set_cls: type[AdapterSet] | None
    config_cls: type[MethodConfig] = MethodConfig

    def configure(self, model_cfg: Mapping[str, Any]) -> MethodConfig:
        """The method's configuration from a ``model:`` section in plain containers."""
        section = self.config_cls.SECTION
        return self.config_cls.from_mapping(model_cfg.get(section) if section else None)


TUNING_METHODS = {
    # adapters shared by vision, text and fusion, and the heads
    "uniadapter": TuningMethod(UniAdapterSet, AdapterConfig),
    # a bottleneck of its own for each modality, and the heads
    "adapter": TuningMethod(SeparateAdapterSet, BottleneckConfig),
    # low-rank changes of the backbone's matrices, and the heads
    "lora": TuningMethod(LoraSet, LoraConfig),
    # the backbone's biases, and the heads
    "bitfit": TuningMethod(BitFitSet),
    # the heads, on a frozen backbone
    "linear": TuningMethod(LinearSet),
    # every parameter of BLIP
    "full": TuningMethod(None),
}
# Sections of ``model:`` that some method reads; those of others than the chosen one are ignored.
SECTIONS = tuple(
    dict.fromkeys(m.config_cls.SECTION for m in TUNING_METHODS.values() if m.config_cls.SECTION)
)


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


def check_sections(model_cfg: Mapping[str, Any]) -> None:
    """Refuse what is wrong in any method's section, whichever method is chosen.

    Raises:
        ConfigError: unknown key, value out of range.
    """
    for method in TUNING_METHODS.values():
        method.configure(model_cfg)
