"""Video processors for BLIP: a path goes in, a CLIP-normalised clip (3, T, H, W) comes out.

LAVIS has video processors for ALPRO only (`lavis.processors.alpro_processors`). Those return fewer
than `n_frms` frames for a short clip, redraw the direction of a geometric augmentation for every
frame, and let bicubic overshoot wrap around in the conversion to uint8. The ones here keep their
recipe (crop, flip, RandAugment, normalise) without these faults.
"""

import inspect

import torch
from lavis.common.registry import registry
from lavis.processors import functional_video
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf
from torch import Tensor

from lavis_uniadapter.common.errors import ConfigError, reject_unknown_keys
from lavis_uniadapter.processors.decoding import decode_frames
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.processors.transforms import (
    MAX_RANDAUG_MAGNITUDE,
    RANDAUG_OPS,
    randaugment_clip,
    random_resized_crop_clip,
)

# The values of lavis.processors.blip_processors.BlipImageBaseProcessor.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class BlipVideoBaseProcessor(BaseProcessor):
    """What the train and the eval processor share: options, decoding and normalisation.

    Args:
        image_size: Height and width of the frames, in pixels.
        n_frms: Number of frames T per clip.
        mean: RGB mean on the scale [0, 1]; None for CLIP's.
        std: RGB standard deviation on the scale [0, 1]; None for CLIP's.

    Raises:
        ConfigError: If an option is out of its range.
    """

    def __init__(self, image_size=224, n_frms=8, mean=None, std=None):
        super().__init__()
        _require_count("image_size", image_size, minimum=1)
        _require_count("n_frms", n_frms, minimum=1)
        self.image_size = image_size
        self.n_frms = n_frms
        self.mean = CLIP_MEAN if mean is None else tuple(mean)
        self.std = CLIP_STD if std is None else tuple(std)

    @classmethod
    def from_config(cls, cfg=None):
        """Build the processor from a config node, whose keys are the constructor's arguments.

        Raises:
            ConfigError: If the node has a key that the processor does not know.
        """
        options = OmegaConf.to_container(OmegaConf.create({} if cfg is None else cfg), resolve=True)
        options.pop("name", None)  # LAVIS keeps the processor's own name in the node.
        reject_unknown_keys(options, inspect.signature(cls).parameters, "vis_processor")
        return cls(**options)

    def _normalise(self, frames: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) to normalised float (3, T, H, W)."""
        clip = functional_video.to_tensor(frames.permute(0, 2, 3, 1))
        return functional_video.normalize(clip, self.mean, self.std)

    def denormalise(self, clip: Tensor) -> Tensor:
        """A normalised clip (3, T, H, W) as colours in [0, 1]."""
        mean, std = (torch.tensor(v)[:, None, None, None] for v in (self.mean, self.std))
        return (clip * std + mean).clamp(0, 1)

    def _decode(self, path, positions: Tensor | float) -> Tensor:
        """Decode one frame per segment as uint8 (T, 3, H, W)."""
        frames = decode_frames(
            path,
            lambda num_frames: sample_frame_indices(num_frames, self.n_frms, positions),
            self.image_size,
        )
        return frames.permute(0, 3, 1, 2)


@registry.register_processor("blip_video_train")
class BlipVideoTrainProcessor(BlipVideoBaseProcessor):
    """Path to a randomly sampled and augmented clip, float (3, n_frms, image_size, image_size).

    A random frame of each of `n_frms` equal segments is decoded at the output size, as
    `alpro_video_train` does. Crop, flip and RandAugment are the same for all frames of a clip.
    All randomness is torch's, which DataLoader seeds differently in each worker.

    Args:
        image_size, n_frms, mean, std: See `BlipVideoBaseProcessor`.
        min_scale: Smallest area of the random crop, as a share of the frame's, in (0, 1].
        max_scale: Largest area of the random crop, in [min_scale, 1].
        flip_prob: Probability of a horizontal flip.
        randaug_ops: Number of RandAugment operations, 0 (none) to 10.
        randaug_magnitude: Strength of the operations, 0 to 10.

    With min_scale = max_scale = 1, flip_prob = 0 and randaug_ops = 0 the decoded frames are
    only normalised.

    Raises:
        ConfigError: If an option is out of its range.
        VideoDecodeError: On call, if the file cannot be decoded.
    """

    def __init__(
        self,
        image_size=224,
        n_frms=8,
        mean=None,
        std=None,
        min_scale=0.5,
        max_scale=1.0,
        flip_prob=0.5,
        randaug_ops=2,
        randaug_magnitude=5,
    ):
        super().__init__(image_size=image_size, n_frms=n_frms, mean=mean, std=std)
        if not 0 < min_scale <= max_scale <= 1:
            raise ConfigError(
                "The crop's scales must satisfy 0 < min_scale <= max_scale <= 1, "
                f"got min_scale={min_scale}, max_scale={max_scale}."
            )
        if not 0 <= flip_prob <= 1:
            raise ConfigError(f"flip_prob must lie in [0, 1], got {flip_prob}.")
        _require_count("randaug_ops", randaug_ops, minimum=0, maximum=len(RANDAUG_OPS))
        if not 0 <= randaug_magnitude <= MAX_RANDAUG_MAGNITUDE:
            raise ConfigError(
                f"randaug_magnitude must lie in [0, {MAX_RANDAUG_MAGNITUDE}], "
                f"got {randaug_magnitude}."
            )
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.flip_prob = flip_prob
        self.randaug_ops = randaug_ops
        self.randaug_magnitude = randaug_magnitude

    def __call__(self, path):
        frames = self._decode(path, positions=torch.rand(self.n_frms, dtype=torch.float64))
        frames = random_resized_crop_clip(frames, self.image_size, self.min_scale, self.max_scale)
        if torch.rand(()) < self.flip_prob:
            frames = frames.flip(-1)
        frames = randaugment_clip(frames, self.randaug_ops, self.randaug_magnitude)
        return self._normalise(frames)


@registry.register_processor("blip_video_eval")
class BlipVideoEvalProcessor(BlipVideoBaseProcessor):
    """Path to a clip, float (3, n_frms, image_size, image_size), the same on every call.

    The middle frame of each of `n_frms` equal segments, resized without a crop as in LAVIS's
    `BlipImageEvalProcessor`.

    Args:
        image_size, n_frms, mean, std: See `BlipVideoBaseProcessor`.

    Raises:
        ConfigError: If an option is out of its range.
        VideoDecodeError: On call, if the file cannot be decoded.
    """

    def __call__(self, path):
        return self._normalise(self._decode(path, positions=0.5))


def _require_count(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    in_range = isinstance(value, int) and value >= minimum and (maximum is None or value <= maximum)
    if not in_range:
        upper = "" if maximum is None else f" and at most {maximum}"
        raise ConfigError(
            f"{name} must be a whole number of at least {minimum}{upper}, got {value}."
        )
