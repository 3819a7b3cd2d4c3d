"""Turn LAVIS's encoders, in place, into encoders that have adapters.

The class of each block is swapped for a subclass that overrides one ``forward``. No module is
added or renamed, so state-dict keys stay LAVIS's and any BLIP checkpoint loads before or after.
"""

from __future__ import annotations

from lavis.models.med import BertEncoder, BertLayer, BertSelfAttention, XBertEncoder
from lavis.models.vit import Attention, Block, VisionTransformer
from torch import nn

from lavis_uniadapter.adapters import AdapterBank, AdapterSlot, BackboneGeometry, KeyValueSlot
from lavis_uniadapter.backbone.text import (
    AdaptedBertEncoder,
    AdaptedBertLayer,
    AdaptedXBertEncoder,
    SdpaCrossAttention,
    SdpaSelfAttention,
)
from lavis_uniadapter.backbone.vision import AdaptedBlock, SdpaAttention


def geometry_of(
    visual_encoder: VisionTransformer, text_encoders: dict[str, XBertEncoder]
) -> BackboneGeometry:
    """Sizes that adapters for these encoders must have.

    Args:
        text_encoders: by their names in the model; those that share adapters are equally deep.
    """
    configs = {name: encoder.config for name, encoder in text_encoders.items()}
    first = next(iter(configs.values()))
    return BackboneGeometry(
        visual_width=visual_encoder.embed_dim,
        visual_depth=len(visual_encoder.blocks),
        text_width=first.hidden_size,
        text_depth=first.num_hidden_layers,
        memory_widths={name: config.encoder_width for name, config in configs.items()},
    )


def attach_adapters(
    bank: AdapterBank,
    visual_encoder: VisionTransformer,
    text_encoders: dict[str, XBertEncoder],
    *,
    visual_checkpointing_layers: int = 0,
    textual_checkpointing_layers: int = 0,
) -> None:
    """Give every layer its way to the active adapter of the bank.

    Args:
        text_encoders: by the names under which the key/value adapters are kept.
        visual_checkpointing_layers: recompute activations in the last so many ViT blocks.
        textual_checkpointing_layers: likewise for BERT layers.

    Raises:
        TypeError: if a module is not the LAVIS class expected, e.g. when attached twice.
    """
    depth = len(visual_encoder.blocks)
    for index, block in enumerate(visual_encoder.blocks):
        _swap_class(block, Block, AdaptedBlock)
        _swap_class(block.attn, Attention, SdpaAttention)
        block.adapter_slot = AdapterSlot(bank, "visual", index)
        block.activation_checkpointing = index >= depth - visual_checkpointing_layers

    for name, text_encoder in text_encoders.items():
        if type(text_encoder) is XBertEncoder:
            text_encoder.__class__ = AdaptedXBertEncoder
        encoder = text_encoder.encoder
        _swap_class(encoder, BertEncoder, AdaptedBertEncoder)
        encoder.key_value_slot = KeyValueSlot(bank, name)
        depth = len(encoder.layer)
        for index, layer in enumerate(encoder.layer):
            _swap_class(layer, BertLayer, AdaptedBertLayer)
            _swap_class(layer.attention.self, BertSelfAttention, SdpaSelfAttention)
            if hasattr(layer, "crossattention"):
                _swap_class(layer.crossattention.self, BertSelfAttention, SdpaCrossAttention)
            layer.adapter_slot = AdapterSlot(bank, "text", index)
            layer.activation_checkpointing = index >= depth - textual_checkpointing_layers


def _swap_class(module: nn.Module, expected: type, adapted: type) -> None:
    if type(module) is not expected:
        raise TypeError(
            f"Expected LAVIS's {expected.__name__}, found {type(module).__name__}. Adapters are "
            "attached once, to encoders that LAVIS built."
        )
    module.__class__ = adapted
