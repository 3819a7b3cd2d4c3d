"""What a tuning method may know of a backbone: its sizes, and where its matrices are."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class LinearSite:
    """A matrix of the backbone that a method may change.

    Attributes:
        module: path of the ``nn.Linear`` in the model.
        role: what it computes: query, key, value, attention_output, ffn_in or ffn_out.
        in_width: of its input.
        rows: the rows of its weight that compute this (LAVIS's ViT has query, key and value in
            one matrix).
    """

    module: str
    role: str
    in_width: int
    rows: range


@dataclass(frozen=True)
class BiasSite:
    """A bias of the backbone: path of its module, and its shape as added to the output."""

    module: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BackboneGeometry:
    """The sizes of a backbone that adapters must fit.

    Attributes:
        visual_width, visual_depth: of the visual encoder.
        text_width, text_depth: of the text encoder.
        memory_widths: for each encoder with cross-attention, by its name in the model, the width
            of the states that it attends to.
        text_mode: whether the model ever encodes text alone.
        linears, biases: of all encoders.
        output_layers: by path, the modules before the vocabulary of a model that answers in words.
    """

    visual_width: int
    visual_depth: int
    text_width: int
    text_depth: int
    memory_widths: dict[str, int] = field(default_factory=dict)
    text_mode: bool = True
    linears: tuple[LinearSite, ...] = ()
    biases: tuple[BiasSite, ...] = ()
    output_layers: dict[str, nn.Module] = field(default_factory=dict)
