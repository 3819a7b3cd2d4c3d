"""Animated GIF and WebP images as clips."""

import json

import numpy as np
import pytest
import torch
from lavis.datasets.datasets.retrieval_datasets import VideoRetrievalEvalDataset
from lavis.processors.alpro_processors import AlproVideoEvalProcessor
from lavis.processors.base_processor import BaseProcessor
from PIL import Image

from lavis_uniadapter.datasets.preflight import unreadable_files
from lavis_uniadapter.processors.animations import is_animation
from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_frames, frames_problem
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor

GREYS = [0, 40, 80, 120, 160, 200]


@pytest.fixture(params=["gif", "webp"])
def animation(request, tmp_path):
    """Six frames, each of one grey below a transparent upper half, of different durations."""
    frames = []
    for grey in GREYS:
        frame = Image.new("RGBA", (48, 64), (0, 0, 0, 0))
        frame.paste((grey, grey, grey, 255), (0, 32, 48, 64))
        frames.append(frame)
    path = tmp_path / f"clip.{request.param}"
    # whole frames: Pillow writes changes of a WebP without their transparency
    webp = {"lossless": True, "kmin": 1, "kmax": 1}
    more = webp if request.param == "webp" else {"disposal": 2}
    durations = [100 * number for number in range(1, 7)]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **more
    )
    return path


@pytest.mark.parametrize("indices", [range(6), [3], [5, 0, 0, 2]])
def test_frames_are_those_asked_for_on_white(animation, indices):
    counts = []
    frames = decode_frames(animation, lambda count: counts.append(count) or indices, 32)
    assert counts == [6]
    assert frames.dtype == torch.uint8 and frames.shape == (len(indices), 32, 32, 3)
    assert (frames[:, :13] == 255).all()
    lower = frames[:, 19:].float().mean((1, 2, 3))
    assert lower.tolist() == pytest.approx([GREYS[index] for index in indices], abs=1)


def test_a_video_processor_takes_one(animation):
    processor = BlipVideoEvalProcessor(image_size=32, n_frms=3)
    clip = processor.denormalise(processor(str(animation)))
    middle_frames = torch.tensor([GREYS[index] for index in (1, 3, 5)]) / 255
    torch.testing.assert_close(clip[:, :, 20:].mean((0, 2, 3)), middle_frames, atol=0.01, rtol=0)


def test_a_still_image_has_one_frame(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "still.webp", lossless=True)
    processor = BlipVideoEvalProcessor(image_size=32, n_frms=4)
    assert processor(str(tmp_path / "still.webp")).shape == (3, 4, 32, 32)


@pytest.mark.parametrize("percent", [30, 60, 95])
def test_one_that_was_cut_is_named(animation, percent):
    content = animation.read_bytes()
    animation.write_bytes(content[: len(content) * percent // 100])
    assert is_animation(str(animation))
    assert "cannot be read as an image" in frames_problem(str(animation), lambda count: [0])
    with pytest.raises(VideoDecodeError, match=rf"{animation.name}'.*Download or re-encode"):
        decode_frames(animation, range, 32)


@pytest.mark.parametrize("processor", [BlipVideoEvalProcessor, AlproVideoEvalProcessor])
def test_lavis_processors_are_refused_before_training(animation, processor):
    annotations = animation.with_name("val.json")
    annotations.write_text(json.dumps([{"video": animation.name, "caption": ["a grey"]}]))
    data = VideoRetrievalEvalDataset(
        *(processor(image_size=32, n_frms=3), BaseProcessor()),
        *(str(animation.parent), [str(annotations)]),
    )
    problems = list(unreadable_files(data, "val").values())
    if processor is AlproVideoEvalProcessor:
        assert len(problems) == 1 and "set vis_processor to blip_video_train" in problems[0]
    else:
        assert problems == []
