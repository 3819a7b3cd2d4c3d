"""What LAVIS sees after ``import lavis_uniadapter``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from lavis.common.registry import registry
from lavis.models import load_model_and_preprocess, model_zoo

TYPES = ("coco", "flickr", "msrvtt", "didemo", "shapes")


def test_model_zoo_lists_the_types():
    assert dict(model_zoo)["blip_uniadapter_retrieval"] == list(TYPES)
    assert dict(model_zoo)["blip_uniadapter_vqa"] == ["vqav2", "msrvtt_qa", "msvd_qa"]
    assert "blip_uniadapter_retrieval" in str(model_zoo)


def test_everything_is_registered():
    assert "runner_uniadapter" in registry.list_runners()
    assert {"uniadapter_retrieval"} <= set(registry.list_tasks())
    assert {"blip_video_train", "blip_video_eval"} <= set(registry.list_processors())
    assert {"shapes_retrieval", "shapes_image_retrieval"} <= set(registry.list_datasets())


def test_load_model_and_preprocess_on_a_clip(tmp_path):
    import cv2
    import numpy as np

    writer = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64)
    )
    for value in range(0, 200, 20):
        writer.write(np.full((64, 64, 3), value, np.uint8))
    writer.release()
    model, vis, txt = load_model_and_preprocess("blip_uniadapter_retrieval", "shapes", is_eval=True)
    video = vis["eval"](str(tmp_path / "clip.mp4"))
    assert video.shape == (3, 8, 64, 64)
    with torch.no_grad():
        visuals = model.encode_visual({"video": video[None]})
        texts = model.encode_text([txt["eval"]("A red circle.")])
        assert model.match(texts, visuals).shape == (1, 2)
    assert not model.training


@pytest.mark.parametrize("name", [t for t in TYPES if t != "shapes"])
def test_real_model_types_build_without_weights(name):
    """The real configuration, but for the weights and the hub's tokenizer."""
    from omegaconf import OmegaConf

    cls = registry.get_model_class("blip_uniadapter_retrieval")
    config = OmegaConf.load(cls.default_config_path(name))
    assert str(config.model.pretrained).startswith("https://")
    config.model.update(pretrained=None, tokenizer="configs/tokenizers/shapes", queue_size=16)
    model = cls.from_config(config.model)
    assert model.parameter_counts()["adapters"] == 4_784_640
    video = name in ("msrvtt", "didemo")
    assert model.adapter_config.frame_aware == video
    assert config.preprocess.vis_processor.eval.image_size == (224 if video else 384)
    for kind in ("train", "eval"):
        section = config.preprocess.vis_processor[kind]
        assert registry.get_processor_class(section.name).from_config(section) is not None


@pytest.mark.parametrize("samples", [{}, {"image": torch.zeros(2, 4, 8, 8)}, torch.zeros(3, 8, 8)])
def test_wrong_visual_input_is_named(build_model, samples):
    with pytest.raises(ValueError, match="batch, 3"):
        build_model().encode_visual(samples)


def test_local_files_need_no_network():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import socket\n"
            "def refuse(*args): raise AssertionError('network')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "import lavis_uniadapter, lavis_uniadapter.launch\n"
            "from lavis.models import load_model\n"
            "load_model('blip_uniadapter_retrieval', 'shapes')\n",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
