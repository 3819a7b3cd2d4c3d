"""Configuration of the tuning methods: their sections of a YAML file's ``model:``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lavis_uniadapter.common.errors import ConfigError, reject_unknown_keys

INITS = ("released", "identity")
SHARES = ("none", "down", "up", "all")


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

    @classmethod
    def reject_unread_keys(cls, section: str, given: Mapping[str, Any], tuning: str) -> None:
        """Refuse keys that a user gives to a section and this method does not read.

        Raises:
            ConfigError: naming the first such key.
        """
        own = [f.name for f in dataclasses.fields(cls)] if section == cls.SECTION else []
        for key in given:
            if key not in own:
                reads = ", ".join(own) if own else f"nothing of model.{section}"
                raise ConfigError(
                    f"model.{section}.{key} is given, and model.tuning '{tuning}' does not read "
                    f"it. It reads {reads}. Remove the key, or choose another model.tuning."
                )

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

    def _require_one_of(self, key: str, values: tuple[str, ...]) -> None:
        self._require(getattr(self, key) in values, key, f"one of {', '.join(values)}")

    def _require_bool(self, *keys: str) -> None:
        for key in keys:
            self._require(isinstance(getattr(self, key), bool), key, "True or False")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    """Bottlenecks beside the FFNs (``tuning: adapter``).

    It shares the section ``model.adapter`` with UniAdapter, so that one line swaps the two.

    Attributes:
        bottleneck: width r of the down-projection.
        scale: factor s on every branch's output.
        dropout: probability of dropping a bottleneck unit in training.
        init: ``released`` draws what the authors' code starts from, which is near BLIP and not
            BLIP; ``identity`` starts with every branch at zero, so a fresh model computes what
            BLIP computes. A branch that is zero through its norm's gain grows slowly: the gain
            can reach about the sum of the learning rates of a run.
        visual, textual, cross_modal: which branches exist.

    Raises:
        ConfigError: if a value is out of its range.
    """

    SECTION: ClassVar[str] = "adapter"
    TRAINING_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "init")

    bottleneck: int = 128
    scale: float = 0.1
    dropout: float = 0.0
    init: str = "released"
    visual: bool = True
    textual: bool = True
    cross_modal: bool = True

    def __post_init__(self):
        self._require_whole("bottleneck", 1)
        self._require_positive("scale")
        self._require_probability("dropout")
        self._require_one_of("init", INITS)
        self._require_bool("visual", "textual", "cross_modal")

    @classmethod
    def section_keys(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(AdapterConfig)]


@dataclass(frozen=True)
class AdapterConfig(BottleneckConfig):
    """UniAdapter (arXiv 2302.06605, section 3), and what its ablations change.

    Attributes:
        share: what vision, text and fusion share in a layer: the ``down``-projection (with the
            norm before it), the ``up``-projection, ``all`` of the bottleneck, or ``none`` of it.
        reuse_textual_up: the cross-modal branch adds the textual up-projection to its own. Where
            the up-projection is shared they are the same one, and it is applied once.
        query_residual: add the textual branch beside the cross-modal one.
        kv_bottleneck: width of the key and value adapters of the cross-attention; 0 for none.
        frame_aware: parameter-free frame-aware attention (PFA) over the frames of a video.

    Raises:
        ConfigError: if a value is out of its range.
    """

    share: str = "down"
    reuse_textual_up: bool = True
    query_residual: bool = True
    kv_bottleneck: int = 64
    frame_aware: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._require_whole("kv_bottleneck", 0, " (0: no key/value adapter)")
        self._require_one_of("share", SHARES)
        self._require_bool("reuse_textual_up", "query_residual", "frame_aware")
