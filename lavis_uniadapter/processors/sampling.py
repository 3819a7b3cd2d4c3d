"""Which frames of a clip are used."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_frame_indices(
    num_frames: int, n_frms: int, positions: Tensor | float = 0.5
) -> list[int]:
    """Choose one frame from each of `n_frms` equal segments of a clip.

    Args:
        num_frames: frames of the clip, at least 1.
        n_frms: segments, at least 1.
        positions: where in its segment each frame lies, in [0, 1): a number for all segments (0.5:
            the middle) or a float tensor (n_frms,).

    Returns:
        `n_frms` ascending indices in [0, num_frames), all different if num_frames >= n_frms. A
        shorter clip is padded by repeating its frames evenly.

    Raises:
        ValueError: `num_frames` or `n_frms` is below 1.
    """
    if num_frames < 1 or n_frms < 1:
        raise ValueError(f"num_frames={num_frames} and n_frms={n_frms} must be at least 1.")
    bounds = torch.arange(n_frms + 1) * num_frames // n_frms
    starts = bounds[:-1]
    lengths = (bounds[1:] - starts).clamp(min=1)
    # rounding may take position * length up to length itself
    offsets = torch.minimum((lengths * positions).long(), lengths - 1)
    return (starts + offsets).tolist()
