"""What LAVIS sees after ``import lavis_uniadapter``."""

from __future__ import annotations

import socket

import torch
from lavis.common.registry import registry
from lavis.models import load_model, load_model_and_preprocess, model_zoo

from lavis_uniadapter.common.schema import MODELS


def test_model_zoo_lists_the_types():
    for arch, section in MODELS.items():
        assert dict(model_zoo)[arch] == list(section.files())
    assert "blip_uniadapter_retrieval" in str(model_zoo)


def test_everything_is_registered():
    assert "runner_uniadapter" in registry.list_runners()
    tasks = {"uniadapter_retrieval", "video_qa", "uniadapter_captioning"}
    assert tasks <= set(registry.list_tasks())
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


def test_local_files_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_model("blip_uniadapter_retrieval", "shapes")
