"""Configuration of the tuning methods: their sections of a YAML file's ``model:``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lavis_uniadapter.errors import ConfigError, reject_unknown_keys

INITS = ("identity", "released")


@dataclass(frozen=True)
class MethodConfig:
    """What a tuning method is made of; a method without anything to configure uses this itself.

    Attributes:
        SECTION: the section of ``model:`` that holds it, or None.
        TRAINING_FIELDS: fields that matter in training alone; all others decide what is computed.
    """

    SECTION: ClassVar[str | None] = None
    TRAINING_FIELDS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def section_keys(cls) -> list[str]:
        """Keys that the section may have."""
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> MethodConfig:
        """Build from a YAML section.

        Raises:
            ConfigError: on a key that no field has, naming it and the nearest field, and on a
                value out of its range.
        """
        if not isinstance(mapping, Mapping | None):
            raise ConfigError(
                f"model.{cls.SECTION} is {mapping!r}; it must be a section, with its keys below."
            )
        mapping = dict(mapping or {})
        reject_unknown_keys(mapping, cls.section_keys(), f"model.{cls.SECTION}")
        own = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in mapping.items() if key in own})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def _require(self, holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise ConfigError(
                f"model.{self.SECTION}.{key} is {getattr(self, key)!r}; it must be {rule}."
            )

    def _require_whole(self, key: str, least: int, note: str = "") -> None:
        value = getattr(self, key)
        holds = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self._require(holds, key, f"a whole number >= {least}{note}")

    def _require_positive(self, key: str) -> None:
        value = getattr(self, key)
        self._require(_is_number(value) and value > 0, key, "a number > 0")

    def _require_probability(self, key: str) -> None:
        value = getattr(self, key)
        self._require(_is_number(value) and 0 <= value < 1, key, "a number in [0, 1)")

    def _require_bool(self, *keys: str) -> None:
        for key in keys:
            self._require(isinstance(getattr(self, key), bool), key, "True or False")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    """Bottlenecks beside the FFNs (``tuning: adapter``).

    It shares the section ``model.adapter`` with UniAdapter, so that one line swaps the two; what
    only UniAdapter has is not read.

    Attributes:
        bottleneck: width r of the down-projection.
        scale: factor s on every branch's output.
        dropout: probability of dropping a bottleneck unit in training.
        visual, textual, cross_modal: which branches exist.

    Raises:
        ConfigError: if a value is out of its range.
    """

    SECTION: ClassVar[str] = "adapter"
    TRAINING_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "init")

    bottleneck: int = 128
    scale: float = 0.1
    dropout: float = 0.0
    visual: bool = True
    textual: bool = True
    cross_modal: bool = True

    def __post_init__(self):
        self._require_whole("bottleneck", 1)
        self._require_positive("scale")
        self._require_probability("dropout")
        self._require_bool("visual", "textual", "cross_modal")

    @classmethod
    def section_keys(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(AdapterConfig)]


@dataclass(frozen=True)
class AdapterConfig(BottleneckConfig):
    """UniAdapter (arXiv 2302.06605, section 3), and what its ablations leave out.

    Attributes:
        init: ``identity`` starts with every branch at zero, so a fresh model computes what BLIP
            computes; ``released`` is the initialisation of the authors' code, which zeroes the
            textual up-projection alone.
        shared: one down-projection a layer for vision, text and fusion, whose cross-modal branch
            reuses the textual up-projection. False: each branch has its own, nothing is shared.
        query_residual: add the textual branch beside the cross-modal one.
        kv_bottleneck: width of the key and value adapters of the cross-attention; 0 for none.
        frame_aware: parameter-free frame-aware attention (PFA) over the frames of a video.

    Raises:
        ConfigError: if a value is out of its range.
    """

    init: str = "identity"
    shared: bool = True
    query_residual: bool = True
    kv_bottleneck: int = 64
    frame_aware: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._require_whole("kv_bottleneck", 0, " (0: no key/value adapter)")
        self._require(self.init in INITS, "init", f"one of {', '.join(INITS)}")
        self._require_bool("shared", "query_residual", "frame_aware")
