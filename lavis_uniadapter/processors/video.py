"""Video processors for BLIP: a path goes in, a CLIP-normalised clip (3, T, H, W) comes out.

LAVIS has video processors for ALPRO only (`lavis.processors.alpro_processors`). Those return fewer
than `n_frms` frames for a short clip, redraw the direction of a geometric augmentation for every
frame, and let bicubic overshoot wrap around in the conversion to uint8. The ones here keep their
recipe (crop, flip, RandAugment, normalise) without these faults.
"""

import math
import os
import threading
from collections.abc import Callable, Sequence

import torch
from decord import DECORDError, VideoReader
from lavis.common.registry import registry
from lavis.processors import functional_video
from lavis.processors.base_processor import BaseProcessor
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from lavis_uniadapter.common.schema.processors import VideoEval, VideoTrain
from lavis_uniadapter.processors.extracted_frames import (
    EXTRACTED_SUFFIX,
    clip_file,
    read_extracted_frames,
)

# The FFmpeg inside decord builds a codec's tables when it is first opened, and ends the process if
# two threads do so at once.
_OPENING = threading.Lock()

CROP_ASPECT_RATIOS = (3 / 4, 4 / 3)


class VideoDecodeError(RuntimeError):
    """A video file that yields no frames. The message names the file, the reason and the mend.

    Attributes:
        reason: by itself.
    """

    reason = ""


def sample_frame_indices(
    num_frames: int, n_frms: int, positions: Tensor | float = 0.5
) -> list[int]:
    """Choose one frame from each of `n_frms` equal segments of a clip.

    Args:
        num_frames: Number of frames in the clip, at least 1.
        n_frms: Number of segments, hence of frames chosen, at least 1.
        positions: Where in its segment each frame lies, in [0, 1): one number for all segments
            (0.5 takes the middle frames) or a float tensor (n_frms,), one number per segment.

    Returns:
        `n_frms` indices in [0, num_frames), ascending; all different if num_frames >= n_frms. A
        shorter clip is padded by repeating its frames evenly.

    Raises:
        ValueError: If `num_frames` or `n_frms` is below 1.
    """
    if num_frames < 1 or n_frms < 1:
        raise ValueError(
            f"num_frames and n_frms must be at least 1, got num_frames={num_frames}, "
            f"n_frms={n_frms}."
        )
    bounds = torch.arange(n_frms + 1) * num_frames // n_frms
    starts = bounds[:-1]
    lengths = (bounds[1:] - starts).clamp(min=1)
    # Rounding may take position * length up to length itself.
    offsets = torch.minimum((lengths * positions).long(), lengths - 1)
    return (starts + offsets).tolist()


def decode_frames(
    path: str | os.PathLike, choose_indices: Callable[[int], Sequence[int]], image_size: int
) -> Tensor:
    """Decode chosen frames of a video, scaled while decoding (decord's bicubic).

    Args:
        path: Video file; where there is none, the frames that were extracted from it, beside it or
            in its place (`clip_file`).
        choose_indices: Given the number of frames in the clip, returns the indices to decode.
        image_size: Height and width of the decoded frames, in pixels.

    Returns:
        uint8 RGB tensor (number of indices, image_size, image_size, 3).

    Raises:
        VideoDecodeError: If the file is missing, empty, not a video, without a video stream, or
            cut off or damaged before one of the frames.

    A frame that is not damaged but without output, decord fills in from a neighbour. That is
    left on (`fault_tol`): a clip cut without re-encoding begins with such hidden frames.
    """
    path = clip_file(path)
    if not os.path.isfile(path):
        raise _decode_error(path, "there is no such file")
    if os.path.getsize(path) == 0:
        raise _decode_error(path, "the file is empty")
    if path.endswith(EXTRACTED_SUFFIX):
        try:
            return read_extracted_frames(path, choose_indices, image_size)
        except (OSError, ValueError) as error:
            raise _decode_error(path, f"it is no archive of frames ({error})") from error
    return decode_video(path, choose_indices, image_size)


def decode_video(
    path: str, choose_indices: Callable[[int], Sequence[int]], image_size: int
) -> Tensor:
    """As `decode_frames`, from the video itself, whether frames were extracted from it or not."""
    try:
        with _OPENING:
            reader = VideoReader(path, width=image_size, height=image_size, num_threads=1)
        frames = reader.get_batch(choose_indices(len(reader)))
    # decord asserts that there are frames; a DECORDError is no RuntimeError.
    except (RuntimeError, AssertionError, DECORDError) as error:
        raise _decode_error(path, f"decord says: {str(error).strip()}") from error
    # LAVIS sets decord's bridge to torch, but the bridge holds for the importing thread only.
    return frames if isinstance(frames, Tensor) else torch.from_numpy(frames.asnumpy())


def _decode_error(path: str, reason: str) -> VideoDecodeError:
    error = VideoDecodeError(
        f"Cannot decode video '{path}': {reason}. "
        "Download or re-encode the file, or take its records out of the annotations."
    )
    error.reason = reason
    return error


def _identity(frames: Tensor, level: float) -> Tensor:
    return frames


def _autocontrast(frames: Tensor, level: float) -> Tensor:
    return TF.autocontrast(frames)


def _equalize(frames: Tensor, level: float) -> Tensor:
    return TF.equalize(frames)


def _brightness(frames: Tensor, level: float) -> Tensor:
    return _enhance(TF.adjust_brightness, frames, level)


def _sharpness(frames: Tensor, level: float) -> Tensor:
    return _enhance(TF.adjust_sharpness, frames, level)


def _enhance(adjust: Callable[[Tensor, float], Tensor], frames: Tensor, level: float) -> Tensor:
    factor = 0.1 + 1.8 * level
    # Factor 1, the default strength, is the identity, and sharpening is slow.
    return frames if factor == 1 else adjust(frames, factor)


def _warp(
    frames: Tensor,
    angle: float = 0.0,
    translate: tuple[int, int] = (0, 0),
    slope: tuple[float, float] = (0.0, 0.0),
    center: list[int] | None = None,
) -> Tensor:
    return TF.affine(
        frames,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=[math.degrees(math.atan(s)) for s in slope],
        interpolation=TF.InterpolationMode.BILINEAR,
        fill=[128.0, 128.0, 128.0],
        center=center,
    )


def _shear_x(frames: Tensor, level: float) -> Tensor:
    return _warp(frames, slope=(0.3 * level, 0.0), center=[0, 0])


def _shear_y(frames: Tensor, level: float) -> Tensor:
    return _warp(frames, slope=(0.0, 0.3 * level), center=[0, 0])


def _translate_x(frames: Tensor, level: float) -> Tensor:
    return _warp(frames, translate=(round(10 * level), 0))


def _translate_y(frames: Tensor, level: float) -> Tensor:
    return _warp(frames, translate=(0, round(10 * level)))


def _rotate(frames: Tensor, level: float) -> Tensor:
    return _warp(frames, angle=30 * level)


# The operations and strengths of lavis.processors.randaugment as used by alpro_video_train, with
# level = magnitude / 10. They act on uint8 (T, 3, H, W), so all frames are treated alike.
_UNSIGNED_OPS = (_identity, _autocontrast, _equalize, _brightness, _sharpness)
_SIGNED_OPS = (_shear_x, _shear_y, _translate_x, _translate_y, _rotate)
_RANDAUG_OPS = _UNSIGNED_OPS + _SIGNED_OPS
MAX_RANDAUG_MAGNITUDE = 10


def randaugment_clip(frames: Tensor, num_ops: int, magnitude: float) -> Tensor:
    """Apply `num_ops` different random operations, each the same on all frames.

    RandAugment (Cubuk et al. 2020) with the operations of LAVIS's `VideoRandomAugment`, drawn from
    torch's global generator. As in LAVIS, brightness and sharpness do nothing at magnitude 5.

    Args:
        frames: uint8 RGB (T, 3, H, W).
        num_ops: Number of operations, 0 to 10.
        magnitude: Strength, 0 to 10.

    Returns:
        uint8 tensor of the same shape.
    """
    level = magnitude / MAX_RANDAUG_MAGNITUDE
    for op_index in torch.randperm(len(_RANDAUG_OPS))[:num_ops].tolist():
        operation = _RANDAUG_OPS[op_index]
        direction = 1
        if operation in _SIGNED_OPS and torch.rand(()) < 0.5:
            direction = -1
        frames = operation(frames, direction * level)
    return frames


def random_resized_crop_clip(
    frames: Tensor, image_size: int, min_scale: float, max_scale: float
) -> Tensor:
    """Cut one random box from all frames and resize it (bicubic) to a square.

    Box as in torchvision's RandomResizedCrop, drawn from torch's global generator.

    Args:
        frames: uint8 (T, 3, H, W).
        image_size: Height and width of the result, in pixels.
        min_scale: Smallest area of the box, as a share of the frame's.
        max_scale: Largest area of the box, as a share of the frame's.

    Returns:
        uint8 (T, 3, image_size, image_size).
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


class BlipVideoBaseProcessor(BaseProcessor):
    """What the train and the eval processor share: options, decoding and normalisation.

    Raises:
        ConfigError: If an option is unknown or out of its range.
    """

    OPTIONS: type[VideoEval] = VideoEval

    def __init__(self, **options):
        super().__init__()
        self.options = self.OPTIONS.read(options, "vis_processor")

    @classmethod
    def from_config(cls, cfg=None):
        """Build the processor from a config node, whose keys are the options."""
        return cls(**cls.OPTIONS.read(cfg, "vis_processor").model_dump())

    def _normalise(self, frames: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) to normalised float (3, T, H, W)."""
        clip = functional_video.to_tensor(frames.permute(0, 2, 3, 1))
        return functional_video.normalize(clip, self.options.mean, self.options.std)

    def denormalise(self, clip: Tensor) -> Tensor:
        """A normalised clip (3, T, H, W) as colours in [0, 1]."""
        mean, std = (
            torch.tensor(v)[:, None, None, None] for v in (self.options.mean, self.options.std)
        )
        return (clip * std + mean).clamp(0, 1)

    def _decode(self, path, positions: Tensor | float) -> Tensor:
        """Decode one frame per segment as uint8 (T, 3, H, W)."""
        frames = decode_frames(
            path,
            lambda num_frames: sample_frame_indices(num_frames, self.options.n_frms, positions),
            self.options.image_size,
        )
        return frames.permute(0, 3, 1, 2)


@registry.register_processor("blip_video_train")
class BlipVideoTrainProcessor(BlipVideoBaseProcessor):
    """Path to a randomly sampled and augmented clip, float (3, n_frms, image_size, image_size).

    A random frame of each of `n_frms` equal segments is decoded at the output size, as
    `alpro_video_train` does. Crop, flip and RandAugment are the same for all frames of a clip.
    All randomness is torch's, which DataLoader seeds differently in each worker.

    With min_scale = max_scale = 1, flip_prob = 0 and randaug_ops = 0 the decoded frames are
    only normalised.

    Args:
        options: See `VideoTrain`.

    Raises:
        ConfigError: If an option is unknown or out of its range.
        VideoDecodeError: On call, if the file cannot be decoded.
    """

    OPTIONS = VideoTrain

    def __call__(self, path):
        frames = self._decode(path, positions=torch.rand(self.options.n_frms, dtype=torch.float64))
        frames = random_resized_crop_clip(
            frames, self.options.image_size, self.options.min_scale, self.options.max_scale
        )
        if torch.rand(()) < self.options.flip_prob:
            frames = frames.flip(-1)
        frames = randaugment_clip(frames, self.options.randaug_ops, self.options.randaug_magnitude)
        return self._normalise(frames)


@registry.register_processor("blip_video_eval")
class BlipVideoEvalProcessor(BlipVideoBaseProcessor):
    """Path to a clip, float (3, n_frms, image_size, image_size), the same on every call.

    The middle frame of each of `n_frms` equal segments, resized without a crop as in LAVIS's
    `BlipImageEvalProcessor`.

    Args:
        options: See `VideoEval`.

    Raises:
        ConfigError: If an option is unknown or out of its range.
        VideoDecodeError: On call, if the file cannot be decoded.
    """

    def __call__(self, path):
        return self._normalise(self._decode(path, positions=0.5))
