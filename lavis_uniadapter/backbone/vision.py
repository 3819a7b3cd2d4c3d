"""LAVIS's ViT blocks with the visual adapter."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from lavis.models.vit import Attention, Block, VisionTransformerEncoder
from torch import Tensor


def encode_frames(visual_encoder: VisionTransformerEncoder, visual: Tensor) -> Tensor:
    """Encode (batch, 3, H, W) images or (batch, 3, frames, H, W) videos, frame by frame.

    Returns:
        (batch, frames, tokens, width); an image is a video of one frame.

    Raises:
        ValueError: for another image size than the encoder's.
    """
    frames = visual.unsqueeze(2) if visual.ndim == 4 else visual
    batch, channels, number, height, width = frames.shape
    patches = visual_encoder.patch_embed
    if (height, width) != patches.img_size:
        raise ValueError(
            f"The model takes images of {patches.img_size[0]} x {patches.img_size[1]} pixels; got "
            f"{height} x {width}. Set image_size of the visual processor, or of the model."
        )
    frames = frames.transpose(1, 2).reshape(batch * number, channels, height, width)
    frames = frames.to(patches.proj.weight.dtype)
    embeds = visual_encoder.forward_features(frames)
    return embeds.view(batch, number, *embeds.shape[1:])


class SdpaAttention(Attention):
    """``lavis.models.vit.Attention`` by scaled_dot_product_attention.

    Attention maps (LAVIS's gradcam hook) take LAVIS's own path, which materialises them.
    """

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        if register_hook:
            return super().forward(x, register_hook=True)
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class AdaptedBlock(Block):
    """``lavis.models.vit.Block`` with the visual adapter parallel to its FFN.

    The adapter sees ``x`` before ``norm2``: it has a norm of its own.
    """

    adapter: Callable[..., Tensor | int]  # the active one of this layer, see AdapterBank.layer

    def forward(self, x: Tensor, register_hook: bool = False) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), register_hook=register_hook))
        return x + self.drop_path(self.mlp(self.norm2(x))) + self.adapter("visual", x)
