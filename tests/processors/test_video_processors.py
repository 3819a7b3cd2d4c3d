"""Clips as the processors give them: which frames, in which colours, augmented how."""

import pickle
import random

import numpy as np
import pytest
import torch
from clips import noise_frames, write_frames
from decord import VideoReader
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.processors import VideoEval
from lavis_uniadapter.processors import transforms
from lavis_uniadapter.processors.decoding import VideoDecodeError
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.processors.transforms import randaugment_clip, random_resized_crop_clip
from lavis_uniadapter.processors.video import (
    BlipVideoEvalProcessor,
    BlipVideoTrainProcessor,
)

CLIP_MEAN, CLIP_STD = VideoEval().mean, VideoEval().std
SIZE = 32
PLAIN = {"min_scale": 1.0, "max_scale": 1.0, "flip_prob": 0.0, "randaug_ops": 0}


def grey_frames(num_frames):
    """Frame i has brightness 6 * i, so a decoded frame tells its index."""
    return [np.full((48, 64, 3), 6 * index, dtype=np.uint8) for index in range(num_frames)]


def pixels_of(clip):
    """Undo the normalisation: (3, T, H, W) on the scale 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (clip * std + mean) * 255


def decoded_pixels(path, indices):
    """uint8 (T, H, W, 3) by decord alone."""
    frames = VideoReader(path, width=SIZE, height=SIZE, num_threads=1).get_batch(indices)
    return frames if isinstance(frames, torch.Tensor) else torch.from_numpy(frames.asnumpy())


clip_lengths = st.integers(1, 500)
frame_counts = st.integers(1, 40)


@settings(deadline=None)
@given(clip_lengths, frame_counts)
def test_eval_takes_the_middle_frame_of_each_segment(num_frames, n_frms):
    indices = sample_frame_indices(num_frames, n_frms)
    middles = [(segment + 0.5) * num_frames / n_frms for segment in range(n_frms)]
    assert len(indices) == n_frms
    # Segments end at whole frames, which moves their middles by less than one frame.
    assert all(abs(i + 0.5 - m) <= 1 for i, m in zip(indices, middles, strict=True))


@settings(deadline=None)
@given(clip_lengths, frame_counts, st.data())
def test_random_frames_stay_in_their_segments(num_frames, n_frms, data):
    position = st.floats(0, 1, exclude_max=True)
    positions = data.draw(st.lists(position, min_size=n_frms, max_size=n_frms))
    indices = sample_frame_indices(num_frames, n_frms, torch.tensor(positions, dtype=torch.float64))
    assert len(indices) == n_frms
    for segment, index in enumerate(indices):
        assert 0 <= index < num_frames
        assert segment * num_frames // n_frms <= index
        assert index * n_frms < (segment + 1) * num_frames
    if num_frames >= n_frms:
        assert all(a < b for a, b in zip(indices, indices[1:], strict=False))
    else:
        assert indices == sorted(indices)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_short_clips_are_padded_evenly(num_frames, n_frms):
    indices = sample_frame_indices(num_frames, n_frms)
    if n_frms >= num_frames:
        counts = np.bincount(indices, minlength=num_frames)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


def test_random_positions_reach_every_frame():
    torch.manual_seed(0)
    drawn = set()
    for _ in range(200):
        drawn.update(sample_frame_indices(19, 4, torch.rand(4, dtype=torch.float64)))
    assert drawn == set(range(19))


@pytest.mark.parametrize(("num_frames", "n_frms"), [(0, 8), (8, 0)])
def test_impossible_frame_counts_are_refused(num_frames, n_frms):
    with pytest.raises(ValueError, match="num_frames=.*n_frms="):
        sample_frame_indices(num_frames, n_frms)


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 17, 40])
def test_clips_of_any_length_give_exactly_t_frames(tmp_path, num_frames):
    path = write_frames(tmp_path / "clip.mp4", grey_frames(num_frames))
    for processor in (BlipVideoTrainProcessor, BlipVideoEvalProcessor):
        clip = processor(image_size=SIZE)(path)
        assert clip.shape == (3, 8, SIZE, SIZE)
        assert clip.dtype == torch.float32


def test_eval_clip_equals_decords_frames_normalised(noise_clip):
    frames = decoded_pixels(noise_clip, [2, 7, 12, 17]).double() / 255
    expected = (frames - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    clip = BlipVideoEvalProcessor(image_size=SIZE, n_frms=4)(noise_clip)
    torch.testing.assert_close(clip, expected.permute(3, 0, 1, 2).float(), rtol=0, atol=1e-5)


def test_eval_is_the_same_every_time_and_touches_no_generator(noise_clip):
    processor = BlipVideoEvalProcessor(image_size=SIZE)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(processor(noise_clip), processor(noise_clip))
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_and_std_can_be_set(noise_clip):
    processor = BlipVideoEvalProcessor(
        image_size=SIZE, n_frms=2, mean=[0.0, 0.0, 0.5], std=[1.0, 2.0, 1.0]
    )
    frames = decoded_pixels(noise_clip, [5, 15]).float() / 255
    expected = torch.stack([frames[..., 0], frames[..., 1] / 2, frames[..., 2] - 0.5])
    torch.testing.assert_close(processor(noise_clip), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bgr", "channel"), [((0, 0, 255), 0), ((0, 255, 0), 1), ((255, 0, 0), 2)])
@pytest.mark.parametrize("build", [BlipVideoEvalProcessor, BlipVideoTrainProcessor])
def test_channels_are_rgb(tmp_path, bgr, channel, build):
    path = write_frames(tmp_path / "colour.mp4", [np.full((48, 64, 3), bgr, np.uint8)] * 4)
    options = PLAIN if build is BlipVideoTrainProcessor else {}
    means = pixels_of(build(image_size=SIZE, n_frms=2, **options)(path)).mean(dim=(1, 2, 3))
    assert means[channel] > 200
    assert all(means[other] < 60 for other in range(3) if other != channel)


def test_frames_come_in_the_order_of_time(tmp_path):
    path = write_frames(tmp_path / "grey.mp4", grey_frames(40))
    brightness = pixels_of(BlipVideoEvalProcessor(image_size=SIZE, n_frms=4)(path)).mean(
        dim=(0, 2, 3)
    )
    torch.testing.assert_close(brightness / 6, torch.tensor([5.0, 15, 25, 35]), rtol=0, atol=0.5)


def test_train_without_augmentation_is_the_resized_frames(noise_clip):
    # With one segment per frame there is nothing to sample either.
    train = BlipVideoTrainProcessor(image_size=SIZE, n_frms=20, **PLAIN)
    evaluate = BlipVideoEvalProcessor(image_size=SIZE, n_frms=20)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(train(noise_clip), evaluate(noise_clip))


def test_flip_mirrors_every_frame(noise_clip):
    flipped = BlipVideoTrainProcessor(image_size=SIZE, n_frms=20, **{**PLAIN, "flip_prob": 1.0})(
        noise_clip
    )
    assert torch.equal(
        flipped.flip(-1), BlipVideoEvalProcessor(image_size=SIZE, n_frms=20)(noise_clip)
    )


def test_crop_cuts_the_same_box_from_every_frame():
    """On a ramp the crop shows its position; it must differ between calls, not between frames."""
    ramp = torch.arange(SIZE, dtype=torch.float32).mul(7).to(torch.uint8)
    frames = ramp.expand(5, 3, SIZE, SIZE)
    torch.manual_seed(0)
    crops = [random_resized_crop_clip(frames, SIZE, 0.3, 0.5) for _ in range(4)]
    for crop in crops:
        assert crop.shape == frames.shape
        assert (crop == crop[:1]).all()
        assert not torch.equal(crop, frames)
    assert any(not torch.equal(crops[0], other) for other in crops[1:])


def test_crop_does_not_wrap_around_at_edges():
    """Bicubic overshoots beside an edge; cast unclamped, white would turn into black."""
    frames = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    frames[..., SIZE // 2 :] = 255
    torch.manual_seed(0)
    for _ in range(10):
        row = random_resized_crop_clip(frames, SIZE, 0.3, 0.9)[0, 0, 0].int()
        assert (row.diff() >= 0).all()


@pytest.mark.parametrize("magnitude", [0, 5, 10])
def test_randaugment_treats_all_frames_alike(magnitude):
    frame = torch.from_numpy(noise_frames(1)).permute(0, 3, 1, 2)
    for seed in range(20):
        torch.manual_seed(seed)
        augmented = randaugment_clip(frame.repeat(4, 1, 1, 1), 2, magnitude)
        assert augmented.dtype == torch.uint8
        assert (augmented == augmented[:1]).all()


def test_randaugment_uses_every_operation_in_both_directions():
    torch.manual_seed(0)
    frame = torch.from_numpy(noise_frames(1)[:, :32, :32] // 2 + 20).permute(0, 3, 1, 2)
    outcomes = {randaugment_clip(frame, 1, 8).numpy().tobytes() for _ in range(200)}
    # Five operations without a direction and five with two each.
    assert len(outcomes) == 5 + 2 * 5


def test_no_randaugment_operations_change_nothing():
    frame = torch.from_numpy(noise_frames(1)).permute(0, 3, 1, 2)
    assert randaugment_clip(frame, 0, 10).equal(frame)


@pytest.mark.parametrize(("magnitude", "brightness"), [(0, 10), (5, 100), (8, 154)])
def test_magnitude_sets_the_strength(monkeypatch, magnitude, brightness):
    monkeypatch.setattr(transforms, "RANDAUG_OPS", transforms.RANDAUG_OPS[3:4])  # brightness
    frame = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    assert randaugment_clip(frame, 1, magnitude).unique().tolist() == [brightness]


class OneClip(Dataset):
    def __init__(self, path, n_frms=4, **options):
        self.path = path
        self.processor = BlipVideoTrainProcessor(image_size=SIZE, n_frms=n_frms, **options)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.processor(self.path)


@pytest.mark.parametrize(
    "randomness",
    [{}, {"min_scale": 0.3}, {"flip_prob": 0.5}, {"randaug_ops": 2}],
    ids=["sampling", "crop", "flip", "randaug"],
)
def test_two_workers_draw_differently(noise_clip, randomness):
    dataset = OneClip(noise_clip, **{**PLAIN, **randomness})
    if randomness:  # one segment per frame leaves nothing to sample
        dataset = OneClip(noise_clip, n_frms=20, **{**PLAIN, **randomness})
    torch.manual_seed(0)
    items = list(DataLoader(dataset, batch_size=None, num_workers=2))
    first, second = torch.stack(items[0::2]), torch.stack(items[1::2])
    assert not torch.equal(first, second)


def test_torchs_seed_alone_fixes_the_training_clips(noise_clip):
    processor = BlipVideoTrainProcessor(image_size=SIZE)

    def draw(other_seed):
        torch.manual_seed(3)
        np.random.seed(other_seed)
        random.seed(other_seed)
        return torch.stack([processor(noise_clip) for _ in range(8)])

    clips = draw(other_seed=1)
    assert torch.equal(clips, draw(other_seed=2))
    assert len({clip.numpy().tobytes() for clip in clips}) == 8


def test_decode_error_crosses_the_worker_boundary(tmp_path):
    try:
        BlipVideoEvalProcessor()(str(tmp_path / "missing.mp4"))
    except VideoDecodeError:
        wrapper = pickle.loads(pickle.dumps(ExceptionWrapper(where="in a worker")))
    with pytest.raises(VideoDecodeError, match="missing.mp4"):
        wrapper.reraise()


def test_processors_are_registered_and_built_from_config():
    node = OmegaConf.create(
        """
        name: blip_video_train
        image_size: 64
        n_frms: 3
        std: [0.5, 0.5, 0.5]
        min_scale: 0.7
        max_scale: 0.9
        flip_prob: 0.1
        randaug_ops: 1
        randaug_magnitude: 7
        """
    )
    train = registry.get_processor_class("blip_video_train").from_config(node)
    assert isinstance(train, BlipVideoTrainProcessor)
    assert train.options.mean == CLIP_MEAN
    assert train.options.std == (0.5, 0.5, 0.5)
    for key in ("image_size", "n_frms", "min_scale", "max_scale", "flip_prob", "randaug_ops"):
        assert getattr(train.options, key) == node[key]
    assert train.options.randaug_magnitude == 7

    evaluate = registry.get_processor_class("blip_video_eval").from_config()
    assert isinstance(evaluate, BlipVideoEvalProcessor)
    assert (evaluate.options.image_size, evaluate.options.n_frms) == (224, 8)


@pytest.mark.parametrize("processor", [BlipVideoTrainProcessor, BlipVideoEvalProcessor])
def test_unknown_options_are_named(processor):
    with pytest.raises(ConfigError, match="n_frames.*n_frms"):
        processor.from_config(OmegaConf.create({"n_frames": 4}))


def test_eval_knows_no_augmentation():
    with pytest.raises(ConfigError, match="flip_prob"):
        BlipVideoEvalProcessor.from_config({"flip_prob": 0.5})


@pytest.mark.parametrize(
    "option",
    [
        {"image_size": 0},
        {"n_frms": 0},
        {"n_frms": 2.5},
        {"min_scale": 0.0},
        {"min_scale": 0.9, "max_scale": 0.8},
        {"max_scale": 1.5},
        {"flip_prob": 1.5},
        {"randaug_ops": -1},
        {"randaug_ops": 11},
        {"randaug_magnitude": 10.5},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        BlipVideoTrainProcessor.from_config(option)
