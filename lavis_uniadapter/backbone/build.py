"""Build LAVIS's own encoders from a model configuration, at any size."""

from __future__ import annotations

from pathlib import Path

from lavis.models.med import XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from torch import nn
from transformers.models.bert.configuration_bert import BertConfig

from lavis_uniadapter.backbone.text import AdaptedLMHeadDecoder
from lavis_uniadapter.common.errors import ConfigError

# LAVIS applies stochastic depth to its large ViT alone (lavis.models.vit).
BASE = {"width": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "mlp_ratio": 4}
LARGE = {**BASE, "width": 1024, "depth": 24, "num_heads": 16, "drop_path_rate": 0.1}


def build_visual_encoder(
    vit_type: str, image_size: int, vit: dict | None = None, drop_path_rate: float | None = None
) -> VisionTransformerEncoder:
    """LAVIS's ViT, by the options of the section ``model:``."""
    sizes = dict({"base": BASE, "large": LARGE}.get(vit_type, vit), img_size=image_size)
    width, pos_embed_std = sizes.pop("width"), sizes.pop("pos_embed_std", None)
    if drop_path_rate is not None:
        sizes["drop_path_rate"] = drop_path_rate
    encoder = VisionTransformerEncoder(embed_dim=width, **sizes)
    if pos_embed_std is not None:
        nn.init.trunc_normal_(encoder.pos_embed, std=pos_embed_std)
    encoder.vision_width = width
    return encoder


def build_text_encoder(med_config: str, encoder_width: int) -> XBertEncoder:
    """LAVIS's text encoder (MED) by BERT's JSON file, attending to states of a width."""
    config = _read_med_config(med_config, encoder_width)
    return XBertEncoder(config=config, add_pooling_layer=False)


def build_text_decoder(med_config: str, encoder_width: int | None = None) -> AdaptedLMHeadDecoder:
    """LAVIS's text decoder; by default it attends to states as wide as its own."""
    return AdaptedLMHeadDecoder(config=_read_med_config(med_config, encoder_width))


def _read_med_config(med_config: str, encoder_width: int | None) -> BertConfig:
    if not Path(med_config).is_file():
        raise ConfigError(f"model.med_config_path: no file '{med_config}'.")
    config = BertConfig.from_json_file(med_config)
    config.encoder_width = encoder_width or config.hidden_size
    config.add_cross_attention = True
    if not hasattr(config, "add_type_embeddings"):
        config.add_type_embeddings = False
    return config
