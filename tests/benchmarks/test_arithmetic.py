"""The benchmarks' arithmetic against what PyTorch counts in a run of the model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arithmetic import Text, Vision
from lavis_uniadapter.backbone.vision import encode_frames

TEXT = Text(width=32, depth=2, mlp=64, vocabulary=168)
VISION = Vision(width=32, depth=2, patch=16)


def counted(work) -> float:
    """GFLOP of a call; attention by products that the counter knows."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops() / 1e9


@pytest.fixture
def model(build_model):
    return build_model(adapter={"frame_aware": False}, vit={"mlp_ratio": 4}).eval()


def test_encoding_a_frame(model):
    with model.disable_adapter():
        flops = counted(lambda: encode_frames(model.visual_encoder, torch.randn(3, 3, 32, 32)))
    assert flops == pytest.approx(3 * VISION.encode(32), rel=1e-6)


@pytest.mark.parametrize("length", [1, 7])
def test_a_pair(model, length):
    """Two texts beside one visual input: its keys and values once, the texts twice."""
    states = torch.randn(1, 5, 32)
    texts = torch.full((2, length), 5)

    def match():
        memory = model.text_encoder.encoder.project(states).pairs(torch.zeros(2, dtype=torch.long))
        model.text_encoder(
            texts,
            attention_mask=torch.ones_like(texts),
            encoder_hidden_states=memory,
            return_dict=True,
        )

    with model.disable_adapter():
        plain = counted(match)
    expected = TEXT.keys_and_values(5, memory_width=32) + 2 * TEXT.attend(length, 5)
    assert plain == pytest.approx(expected, rel=1e-6)
    added = TEXT.key_value_adapter(5, bottleneck=4) + 2 * TEXT.adapters(length, bottleneck=8)
    assert counted(match) - plain == pytest.approx(added, rel=1e-6)
