"""Build LAVIS's own encoders from a model configuration, at any size."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lavis.models.med import XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from torch import nn
from transformers.models.bert.configuration_bert import BertConfig

from lavis_uniadapter.backbone.text import AdaptedLMHeadDecoder
from lavis_uniadapter.common.errors import ConfigError

# LAVIS applies stochastic depth to its large ViT alone (lavis.models.vit).
VIT_SIZES = {
    "base": dict(width=768, depth=12, num_heads=12, patch_size=16, mlp_ratio=4),
    "large": dict(
        width=1024, depth=24, num_heads=16, patch_size=16, mlp_ratio=4, drop_path_rate=0.1
    ),
}


def build_visual_encoder(
    vit_type: str, image_size: int, vit: dict | None = None, drop_path_rate: float | None = None
) -> VisionTransformerEncoder:
    """LAVIS's ViT.

    Args:
        vit_type: ``base``, ``large`` or ``custom``.
        image_size: side of a frame, pixels.
        vit: the section ``model.vit``, for ``custom``. A small ViT trained from scratch may need a
            larger ``pos_embed_std`` than LAVIS's 0.02 to tell places apart.
        drop_path_rate: stochastic depth; None for what LAVIS uses at this size.
    """
    size = VIT_SIZES.get(vit_type, vit)
    default_rate = size.get("drop_path_rate", 0.0)
    encoder = VisionTransformerEncoder(
        img_size=image_size,
        patch_size=size["patch_size"],
        embed_dim=size["width"],
        depth=size["depth"],
        num_heads=size["num_heads"],
        mlp_ratio=size["mlp_ratio"],
        drop_path_rate=default_rate if drop_path_rate is None else drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    if size.get("pos_embed_std") is not None:
        nn.init.trunc_normal_(encoder.pos_embed, std=size["pos_embed_std"])
    encoder.vision_width = size["width"]
    return encoder


def build_text_encoder(med_config: dict | str | Path, encoder_width: int) -> XBertEncoder:
    """LAVIS's text encoder with cross-attention (MED).

    Args:
        med_config: BERT configuration, as a dict or a JSON file.
        encoder_width: width of the visual tokens that it attends to.

    Raises:
        ConfigError: if the file does not exist.
    """
    config = _read_med_config(med_config, encoder_width)
    return XBertEncoder(config=config, add_pooling_layer=False)


def build_text_decoder(
    med_config: dict | str | Path, encoder_width: int | None = None
) -> AdaptedLMHeadDecoder:
    """LAVIS's text decoder; see ``build_text_encoder``.

    Args:
        encoder_width: by default the decoder attends to states as wide as its own.
    """
    return AdaptedLMHeadDecoder(config=_read_med_config(med_config, encoder_width))


def _read_med_config(med_config: dict | str | Path, encoder_width: int | None) -> BertConfig:
    if isinstance(med_config, dict):
        config = BertConfig.from_dict(med_config)
    elif Path(med_config).is_file():
        config = BertConfig.from_json_file(med_config)
    else:
        raise ConfigError(f"model.med_config_path: no file '{med_config}'.")
    config.encoder_width = encoder_width or config.hidden_size
    config.add_cross_attention = True
    if not hasattr(config, "add_type_embeddings"):
        config.add_type_embeddings = False
    return config
