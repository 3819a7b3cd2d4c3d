"""Turn LAVIS's encoders, in place, into encoders that have adapters.

The class of each block is swapped for a subclass that overrides one ``forward``. No module is
added or renamed, so state-dict keys stay LAVIS's and any BLIP checkpoint loads before or after.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from lavis_uniadapter.adapters.bank import AdapterSet, BackboneGeometry
from lavis_uniadapter.backbone.text import AdaptedBertEncoder, AdaptedBertLayer, SdpaCrossAttention
from lavis_uniadapter.backbone.vision import AdaptedBlock, SdpaAttention

ENCODERS = ("visual_encoder.", "text_encoder.", "text_decoder.bert.")
# What modules compute, by the ends of their paths in vit.py and med.py.
ROLES = {
    "attn.qkv": ("query", "key", "value"),  # one matrix in LAVIS's ViT
    "attn.proj": ("attention_output",),
    "mlp.fc1": ("ffn_in",),
    "mlp.fc2": ("ffn_out",),
    "self.query": ("query",),
    "self.key": ("key",),
    "self.value": ("value",),
    "attention.output.dense": ("attention_output",),  # of cross-attention as well
    "intermediate.dense": ("ffn_in",),
    "output.dense": ("ffn_out",),
    "cls.predictions.transform": ("word_transform",),
}


def geometry_of(model: nn.Module) -> BackboneGeometry:
    """What a tuning method knows of a TunedBlip's encoders; its text encoders are equally deep."""
    configs = {name: encoder.config for name, encoder in model.text_encoders().items()}
    first = next(iter(configs.values()))
    modules = {}
    for path, module in model.named_modules():
        roles = next((roles for end, roles in ROLES.items() if path.endswith(end)), ())
        if path.startswith(ENCODERS) or roles == ("word_transform",):
            modules[path.replace(".", "/")] = (module, roles)
    return BackboneGeometry(
        visual_width=model.visual_encoder.embed_dim,
        visual_depth=len(model.visual_encoder.blocks),
        text_width=first.hidden_size,
        text_depth=first.num_hidden_layers,
        memory_widths={name: config.encoder_width for name, config in configs.items()},
        text_mode=model.TEXT_MODE,
        modules=modules,
    )


def attach_adapters(
    model: nn.Module, visual_checkpointing_layers: int, textual_checkpointing_layers: int
) -> None:
    """Let every layer of a TunedBlip look up the active adapter of its bank.

    The given numbers of last layers recompute their activations in the backward pass.
    """

    def attach(encoder: str, layers: nn.ModuleList, adapted: type, checkpointed: int) -> None:
        for index, layer in enumerate(layers):
            layer.__class__ = adapted
            layer.adapter = partial(model.adapters.layer, encoder, index)
            if index >= len(layers) - checkpointed:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    blocks = model.visual_encoder.blocks
    attach("visual", blocks, AdaptedBlock, visual_checkpointing_layers)
    for block in blocks:
        block.attn.__class__ = SdpaAttention
    for name, text_encoder in model.text_encoders().items():
        encoder = text_encoder.encoder
        encoder.__class__ = AdaptedBertEncoder
        encoder.key_value_adapters = partial(model.adapters.key_value, name)
        attach("text", encoder.layer, AdaptedBertLayer, textual_checkpointing_layers)
        for layer in encoder.layer:
            layer.crossattention.self.__class__ = SdpaCrossAttention


def attach_deltas(model: nn.Module, adapter_set: AdapterSet) -> None:
    """Let the active set change the modules that a set of this kind changes."""
    for path in adapter_set.deltas:
        hook = partial(model.adapters.delta, path)
        model.get_submodule(path.replace("/", ".")).register_forward_hook(hook)
