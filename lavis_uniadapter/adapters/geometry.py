"""What a tuning method knows of a backbone: its sizes and its modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class Site(NamedTuple):
    """A module of the backbone that a method may change.

    Attributes:
        roles: what equal parts of its output are (LAVIS's ViT has query, key and value in one):
            query, key, value, attention_output, ffn_in, ffn_out or word_transform.
    """

    module: nn.Module
    roles: tuple[str, ...]


@dataclass(frozen=True)
class BackboneGeometry:
    """The backbone that adapters must fit.

    Attributes:
        memory_widths: width of what each encoder with cross-attention attends to, by its name.
        text_mode: whether the model ever encodes text alone.
        sites: the modules of all encoders, and the transform before the vocabulary, by path.
    """

    visual_width: int
    visual_depth: int
    text_width: int
    text_depth: int
    memory_widths: dict[str, int] = field(default_factory=dict)
    text_mode: bool = True
    sites: dict[str, Site] = field(default_factory=dict)
