"""The only code that knows the insides of LAVIS's ``vit.py`` and ``med.py``."""

from lavis_uniadapter.backbone.build import (
    build_text_decoder,
    build_text_encoder,
    build_visual_encoder,
)
from lavis_uniadapter.backbone.vision import encode_frames
from lavis_uniadapter.backbone.visual_memory import VisualMemory

__all__ = [
    "VisualMemory",
    "build_text_decoder",
    "build_text_encoder",
    "build_visual_encoder",
    "encode_frames",
]
