"""Configuration of the adapters: the ``model.adapter`` section of a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavis_uniadapter.errors import ConfigError, reject_unknown_keys

INITS = ("identity", "released")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is made of. See UniAdapter (arXiv 2302.06605), section 3.

    Attributes:
        bottleneck: width r of the shared down-projection.
        scale: factor s on every branch's output.
        dropout: probability of dropping a bottleneck unit in training.
        init: ``identity`` starts with every branch at zero, so a fresh model computes what BLIP
            computes; ``released`` is the initialisation of the authors' code, which zeroes the
            textual up-projection alone.
        visual, textual, cross_modal: which branches exist.
        kv_bottleneck: width of the key and value adapters of the cross-attention; 0 for none.
        frame_aware: parameter-free frame-aware attention (PFA) over the frames of a video.

    Raises:
        ConfigError: if a value is out of its range.
    """

    bottleneck: int = 128
    scale: float = 0.1
    dropout: float = 0.0
    init: str = "identity"
    visual: bool = True
    textual: bool = True
    cross_modal: bool = True
    kv_bottleneck: int = 64
    frame_aware: bool = False

    def __post_init__(self):
        def require(holds: bool, key: str, rule: str) -> None:
            if not holds:
                raise ConfigError(
                    f"model.adapter.{key} is {getattr(self, key)!r}; it must be {rule}."
                )

        def is_whole(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_number(value: Any) -> bool:
            return is_whole(value) or isinstance(value, float)

        require(
            is_whole(self.bottleneck) and self.bottleneck >= 1, "bottleneck", "a whole number >= 1"
        )
        require(
            is_whole(self.kv_bottleneck) and self.kv_bottleneck >= 0,
            "kv_bottleneck",
            "a whole number >= 0 (0: no key/value adapter)",
        )
        require(is_number(self.scale) and self.scale > 0, "scale", "a number > 0")
        require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "a number in [0, 1)")
        require(self.init in INITS, "init", f"one of {', '.join(INITS)}")
        for key in ("visual", "textual", "cross_modal", "frame_aware"):
            require(isinstance(getattr(self, key), bool), key, "True or False")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> AdapterConfig:
        """Build from a YAML section.

        Raises:
            ConfigError: on a key that is not a field, naming it and the nearest field.
        """
        mapping = dict(mapping or {})
        reject_unknown_keys(mapping, [f.name for f in dataclasses.fields(cls)], "model.adapter")
        return cls(**mapping)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
