"""What a tuning method knows of a backbone: its sizes, and where its matrices and biases are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class LinearSite(NamedTuple):
    """A matrix of the backbone that a method may change.

    Attributes:
        path: of the ``nn.Linear`` in the model.
        role: query, key, value, attention_output, ffn_in or ffn_out.
        in_width: of its input.
        rows: the rows of its weight that compute this role (LAVIS's ViT has query, key and value
            in one matrix).
    """

    path: str
    role: str
    in_width: int
    rows: range


@dataclass(frozen=True)
class BackboneGeometry:
    """The sizes of a backbone that adapters must fit.

    Attributes:
        visual_width, visual_depth: of the visual encoder.
        text_width, text_depth: of the text encoder.
        memory_widths: width of the states that each encoder with cross-attention attends to, by
            the encoder's name in the model.
        text_mode: whether the model ever encodes text alone.
        linears: the matrices of all layers.
        biases: shape of each bias as it is added to its module's output, by the module's path.
        output_layers: the modules before the vocabulary of a model that generates, by path.
    """

    visual_width: int
    visual_depth: int
    text_width: int
    text_depth: int
    memory_widths: dict[str, int] = field(default_factory=dict)
    text_mode: bool = True
    linears: tuple[LinearSite, ...] = ()
    biases: dict[str, tuple[int, ...]] = field(default_factory=dict)
    output_layers: dict[str, nn.Module] = field(default_factory=dict)
