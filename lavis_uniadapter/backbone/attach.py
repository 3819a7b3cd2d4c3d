"""Turn LAVIS's encoders, in place, into encoders that have adapters.

The class of each block is swapped for a subclass that overrides one ``forward``. No module is
added or renamed, so state-dict keys stay LAVIS's and any BLIP checkpoint loads before or after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lavis.models.med import BertEncoder, BertLayer, BertSelfAttention, XBertEncoder
from lavis.models.vit import Attention, Block, VisionTransformer
from torch import nn

from lavis_uniadapter.adapters import (
    AdapterBank,
    AdapterSet,
    AdapterSlot,
    BackboneGeometry,
    BiasSite,
    DeltaSlot,
    KeyValueSlot,
    LinearSite,
)
from lavis_uniadapter.backbone.text import (
    AdaptedBertEncoder,
    AdaptedBertLayer,
    AdaptedXBertEncoder,
    SdpaCrossAttention,
    SdpaSelfAttention,
)
from lavis_uniadapter.backbone.vision import AdaptedBlock, SdpaAttention


def geometry_of(
    model: nn.Module,
    visual_encoder: VisionTransformer,
    text_encoders: dict[str, XBertEncoder],
    *,
    text_mode: bool,
    output_layers: Iterable[str] = (),
) -> BackboneGeometry:
    """What a tuning method may know of these encoders, to which adapters are attached.

    Args:
        model: of which the encoders are part; paths are within it.
        text_encoders: by their names in the model; those that share adapters are equally deep.
        text_mode: whether the model ever encodes text alone.
        output_layers: paths of the modules before the vocabulary.
    """
    configs = {name: encoder.config for name, encoder in text_encoders.items()}
    first = next(iter(configs.values()))
    paths = {module: path for path, module in model.named_modules()}
    encoders = [visual_encoder, *text_encoders.values()]
    return BackboneGeometry(
        visual_width=visual_encoder.embed_dim,
        visual_depth=len(visual_encoder.blocks),
        text_width=first.hidden_size,
        text_depth=first.num_hidden_layers,
        memory_widths={name: config.encoder_width for name, config in configs.items()},
        text_mode=text_mode,
        linears=tuple(
            site
            for encoder in encoders
            for module in encoder.modules()
            for site in _linear_sites(module, paths)
        ),
        biases=tuple(
            BiasSite(paths[module], (len(module.bias), *(1,) * _trailing_axes(module)))
            for encoder in encoders
            for module in _biased_modules(encoder)
        ),
        output_layers={path: model.get_submodule(path) for path in output_layers},
    )


def _linear_sites(module: nn.Module, paths: Mapping[nn.Module, str]) -> Iterator[LinearSite]:
    """The matrices of one ViT block or BERT layer; of another module none."""

    def site(linear: nn.Linear, role: str, rows: range | None = None) -> LinearSite:
        rows = range(linear.out_features) if rows is None else rows
        return LinearSite(paths[linear], role, linear.in_features, rows)

    if isinstance(module, AdaptedBlock):
        width = module.attn.proj.out_features
        for i, role in enumerate(("query", "key", "value")):  # one matrix in LAVIS's ViT
            yield site(module.attn.qkv, role, range(i * width, (i + 1) * width))
        yield site(module.attn.proj, "attention_output")
        yield site(module.mlp.fc1, "ffn_in")
        yield site(module.mlp.fc2, "ffn_out")
    elif isinstance(module, AdaptedBertLayer):
        for name in ("attention", "crossattention"):
            if hasattr(module, name):
                attention = getattr(module, name)
                for role in ("query", "key", "value"):
                    yield site(getattr(attention.self, role), role)
                yield site(attention.output.dense, "attention_output")
        yield site(module.intermediate.dense, "ffn_in")
        yield site(module.output.dense, "ffn_out")


def _biased_modules(encoder: nn.Module) -> Iterator[nn.Module]:
    """Modules whose bias matters: that of keys adds the same to all logits of a query."""
    keys = {m.key for m in encoder.modules() if isinstance(m, BertSelfAttention)}
    for module in encoder.modules():
        if getattr(module, "bias", None) is not None and module not in keys:
            yield module


def _trailing_axes(module: nn.Module) -> int:
    """Axes of a module's output after the one that its bias is along."""
    return 2 if isinstance(module, nn.Conv2d) else 0


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


def attach_deltas(bank: AdapterBank, model: nn.Module, adapter_set: AdapterSet) -> None:
    """Let the active set change the modules that a set of this kind changes."""
    for key in adapter_set.deltas:
        path = key.replace("/", ".")
        model.get_submodule(path).register_forward_hook(DeltaSlot(bank, path))


def _swap_class(module: nn.Module, expected: type, adapted: type) -> None:
    if type(module) is not expected:
        raise TypeError(
            f"Expected LAVIS's {expected.__name__}, found {type(module).__name__}. Adapters are "
            "attached once, to encoders that LAVIS built."
        )
    module.__class__ = adapted
