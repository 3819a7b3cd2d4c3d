"""Video processors for BLIP: a path goes in, a CLIP-normalised clip (3, T, H, W) comes out.

They keep the recipe of LAVIS's processors for ALPRO without their faults: fewer than `n_frms`
frames of a short clip, another direction of a geometric augmentation in every frame, and bicubic
overshoot that wraps around in the conversion to uint8.
"""

from __future__ import annotations

import torch
from lavis.common.registry import registry
from lavis.processors import functional_video
from lavis.processors.base_processor import BaseProcessor
from torch import Tensor

from lavis_uniadapter.common.schema.processors import VideoEval, VideoTrain
from lavis_uniadapter.processors.decoding import decode_frames
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.processors.transforms import randaugment_clip, random_resized_crop_clip


@registry.register_processor("blip_video_eval")
class BlipVideoEvalProcessor(BaseProcessor):
    """Path to a clip, float (3, n_frms, image_size, image_size), the same on every call.

    The middle frame of each of `n_frms` equal segments, resized without a crop as in LAVIS's
    `BlipImageEvalProcessor`.

    Raises:
        ConfigError: an option is unknown or out of its range.
        VideoDecodeError: on call, the file cannot be decoded.
    """

    OPTIONS: type[VideoEval] = VideoEval

    def __init__(self, **options):
        super().__init__()
        self.options = self.OPTIONS.read(options, "vis_processor")
        self.n_frms = self.options.n_frms  # as LAVIS's video processors have it

    @classmethod
    def from_config(cls, cfg=None):
        """Build the processor from a config node, whose keys are the options."""
        return cls(**(cfg or {}))

    def __call__(self, path):
        return self.normalise(self._decode(path, positions=0.5))

    def _decode(self, path, positions: Tensor | float) -> Tensor:
        """One frame per segment, uint8 (T, 3, H, W)."""

        def choose(num_frames: int) -> list[int]:
            return sample_frame_indices(num_frames, self.n_frms, positions)

        return decode_frames(path, choose, self.options.image_size).permute(0, 3, 1, 2)

    def normalise(self, frames: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) to normalised float (3, T, H, W)."""
        clip = functional_video.to_tensor(frames.permute(0, 2, 3, 1))
        return functional_video.normalize(clip, self.options.mean, self.options.std)

    def denormalise(self, clip: Tensor) -> Tensor:
        """A normalised clip (3, T, H, W) as colours in [0, 1]."""
        statistics = (self.options.mean, self.options.std)
        mean, std = (torch.tensor(values)[:, None, None, None] for values in statistics)
        return (clip * std + mean).clamp(0, 1)


@registry.register_processor("blip_video_train")
class BlipVideoTrainProcessor(BlipVideoEvalProcessor):
    """Path to a randomly sampled and augmented clip, float (3, n_frms, image_size, image_size).

    A random frame of each of `n_frms` equal segments is decoded at the output size, as
    `alpro_video_train` does. Crop, flip and RandAugment are the same for all frames of a clip.
    All randomness is torch's, which DataLoader seeds differently in each worker.
    """

    OPTIONS = VideoTrain

    def __call__(self, path):
        options = self.options
        frames = self._decode(path, positions=torch.rand(self.n_frms, dtype=torch.float64))
        frames = random_resized_crop_clip(
            frames, options.image_size, options.min_scale, options.max_scale
        )
        if torch.rand(()) < options.flip_prob:
            frames = frames.flip(-1)
        frames = randaugment_clip(frames, options.randaug_ops, options.randaug_magnitude)
        return self.normalise(frames)
