"""Augmentations of a clip, uint8 (T, 3, H, W); every frame gets the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from lavis.processors import functional_video
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

CROP_ASPECT_RATIOS = (3 / 4, 4 / 3)


def _enhance(frames: Tensor, level: float, adjust: Callable[[Tensor, float], Tensor]) -> Tensor:
    factor = 0.1 + 1.8 * level
    # Factor 1, the default strength, is the identity, and sharpening is slow.
    return frames if factor == 1 else adjust(frames, factor)


def _affine(frames: Tensor, **changes) -> Tensor:
    options = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **changes}
    bilinear = TF.InterpolationMode.BILINEAR
    return TF.affine(frames, **options, interpolation=bilinear, fill=[128.0, 128.0, 128.0])


def _shear_angle(level: float) -> float:
    return math.degrees(math.atan(0.3 * level))


# The operations and strengths of lavis.processors.randaugment as used by alpro_video_train, with
# level = magnitude / 10. Those with a direction are applied with level or -level.
_UNDIRECTED: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda frames, level: frames,
    lambda frames, level: TF.autocontrast(frames),
    lambda frames, level: TF.equalize(frames),
    partial(_enhance, adjust=TF.adjust_brightness),
    partial(_enhance, adjust=TF.adjust_sharpness),
)
_DIRECTED: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda frames, level: _affine(frames, shear=[_shear_angle(level), 0.0], center=[0, 0]),
    lambda frames, level: _affine(frames, shear=[0.0, _shear_angle(level)], center=[0, 0]),
    lambda frames, level: _affine(frames, translate=[round(10 * level), 0]),
    lambda frames, level: _affine(frames, translate=[0, round(10 * level)]),
    lambda frames, level: _affine(frames, angle=30 * level),
)
RANDAUG_OPS = _UNDIRECTED + _DIRECTED


def randaugment_clip(frames: Tensor, num_ops: int, magnitude: float) -> Tensor:
    """Apply `num_ops` different random operations, each the same on all frames.

    RandAugment (Cubuk et al. 2020) with the operations of LAVIS's `VideoRandomAugment`, drawn from
    torch's global generator. As in LAVIS, brightness and sharpness do nothing at magnitude 5.

    Args:
        frames: uint8 RGB (T, 3, H, W).
        num_ops: 0 to 10.
        magnitude: 0 to 10.
    """
    for index in torch.randperm(len(RANDAUG_OPS))[:num_ops].tolist():
        reverse = index >= len(_UNDIRECTED) and torch.rand(()) < 0.5
        frames = RANDAUG_OPS[index](frames, (-magnitude if reverse else magnitude) / 10)
    return frames


def random_resized_crop_clip(
    frames: Tensor, image_size: int, min_scale: float, max_scale: float
) -> Tensor:
    """Cut one random box from all frames and resize it (bicubic) to a square.

    Box as in torchvision's RandomResizedCrop, drawn from torch's global generator.

    Args:
        frames: uint8 (T, 3, H, W).
        image_size: height and width of the result, in pixels.
        min_scale, max_scale: area of the box, as a share of the frame's.
    """
    top, left, height, width = RandomResizedCrop.get_params(
        frames, scale=[min_scale, max_scale], ratio=list(CROP_ASPECT_RATIOS)
    )
    if (height, width) == frames.shape[-2:] == (image_size, image_size):
        return frames  # resizing would return the same values
    crop = functional_video.resized_crop(
        frames.float(), top, left, height, width, (image_size, image_size), "bicubic"
    )
    # Bicubic interpolation overshoots at edges, and uint8 would wrap around.
    return crop.round().clamp(0, 255).to(torch.uint8)
