"""What trains: each value of ``model.tuning``, and the parameters it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lavis_uniadapter.adapters import AdapterConfig, AdapterSet, BackboneGeometry, UniAdapterSet
from lavis_uniadapter.errors import ConfigError, nearest

BuildSet = Callable[[Mapping[str, nn.Module], AdapterConfig, BackboneGeometry], AdapterSet]


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune a model.

    Attributes:
        build_set: makes the set of modules that is trained beside a frozen backbone, given copies
            of the model's heads. None: no such set, the whole model is trained.
        has_adapters: whether ``model.adapter`` decides anything for it.
    """

    build_set: BuildSet | None
    has_adapters: bool


TUNING_METHODS = {
    # adapters shared by vision, text and fusion, and the heads
    "uniadapter": TuningMethod(UniAdapterSet, has_adapters=True),
    # the heads, on a frozen backbone
    "linear": TuningMethod(lambda heads, config, geometry: AdapterSet(heads), has_adapters=False),
    # every parameter of BLIP
    "full": TuningMethod(None, has_adapters=False),
}


def tuning_method(name: str) -> TuningMethod:
    """Look up a method.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in TUNING_METHODS:
        raise ConfigError(
            f"model.tuning is {name!r}.{nearest(str(name), TUNING_METHODS)} "
            f"Known: {', '.join(TUNING_METHODS)}."
        )
    return TUNING_METHODS[name]


def freeze_all_but(model: nn.Module, trained: nn.Module) -> None:
    """Let gradients reach the parameters of ``trained`` alone (the model itself: all of them)."""
    model.requires_grad_(False)
    trained.requires_grad_(True)
