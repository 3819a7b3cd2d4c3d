"""``model.adapter`` and ``model.lora``: what each tuning method is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.section import Count, Dropout, Positive, Section, Size, option

Role = Literal["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]
Roles = Annotated[tuple[Role, ...], Field(strict=False, min_length=1)]
Init = Literal["released", "identity"]


class MethodConfig(Section):
    """A tuning method's configuration; methods without options use this class itself."""

    SECTION: ClassVar[str | None] = None
    """The section of ``model:`` that holds it."""
    TRAINING_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Fields that matter in training alone; all others decide what is computed."""


class BottleneckConfig(MethodConfig):
    """Bottlenecks beside the FFNs (``tuning: adapter``).

    It shares the section ``model.adapter`` with UniAdapter, so one line swaps the two.
    """

    SECTION: ClassVar[str] = "adapter"
    TRAINING_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "init")

    bottleneck: Size = option(128, "Width r of the down-projection.")
    scale: Positive = option(0.1, "Factor s on the output of every branch.")
    dropout: Dropout = option(0.0, "Probability of dropping a bottleneck unit in training.")
    init: Init = option("released", "`released`: near BLIP, as the authors; `identity`: as BLIP.")
    visual: bool = option(True, "Adapt the visual encoder.")
    textual: bool = option(True, "Adapt the text encoder.")
    cross_modal: bool = option(True, "Adapt the cross-modal encoder.")


class AdapterConfig(BottleneckConfig):
    """UniAdapter (arXiv 2302.06605, section 3), and what its ablations change."""

    share: Literal["none", "down", "up", "all"] = option("down", "What the encoders share.")
    reuse_textual_up: bool = option(True, "Add the textual up-projection to the cross-modal one.")
    query_residual: bool = option(True, "Add the textual branch beside the cross-modal one.")
    kv_bottleneck: Count = option(64, "Width of the adapters of cross-attention's keys and values.")
    frame_aware: bool = option(False, "Frame-aware attention over a video (PFA). Retrieval only.")


class LoraConfig(MethodConfig):
    """Low-rank matrices beside those of all layers, cross-attention included (``tuning: lora``)."""

    SECTION: ClassVar[str] = "lora"
    TRAINING_FIELDS: ClassVar[tuple[str, ...]] = ("dropout",)

    rank: Size = option(8, "Rank r; the change of a matrix is `alpha / r · up · down`.")
    alpha: Positive = option(16.0, "Numerator of the scale.")
    dropout: Dropout = option(0.0, "Probability of dropping an input in training.")
    targets: Roles = option(("query", "value"), "The matrices to change.")

    @field_validator("targets")
    @classmethod
    def _in_order(cls, targets: tuple[Role, ...]) -> tuple[Role, ...]:
        return tuple(role for role in get_args(Role) if role in targets)


METHODS: dict[str, type[MethodConfig]] = {
    "uniadapter": AdapterConfig,
    "adapter": BottleneckConfig,
    "lora": LoraConfig,
    "bitfit": MethodConfig,
    "linear": MethodConfig,
    "full": MethodConfig,
}


def reject_unread_keys(given: Mapping[str, Any], tuning: str) -> None:
    """Raise ConfigError for a key of a user's ``model:`` section that another method reads.

    It takes what the user wrote, as the defaults of a model type have the sections of all methods.
    """
    config = METHODS[tuning]
    for name in filter(None, dict.fromkeys(method.SECTION for method in METHODS.values())):
        own = list(config.model_fields) if name == config.SECTION else []
        for key in given.get(name) or {}:
            if key not in own:
                raise ConfigError(
                    f"model.{name}.{key} is given, and model.tuning '{tuning}' does not read it. "
                    f"It reads {', '.join(own) or f'nothing of model.{name}'}. Remove the key, or "
                    "choose another model.tuning."
                )
