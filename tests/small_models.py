"""Small models of every kind: their inputs, what they compute, and changes to them."""

from __future__ import annotations

import torch
from lavis.models import vit
from lavis.models.med import XBertLMHeadDecoder
from torch import nn
from transformers import GenerationMixin

RETRIEVAL, VQA, CAPTION = MODELS = (
    "blip_uniadapter_retrieval",
    "blip_uniadapter_vqa",
    "blip_uniadapter_caption",
)
TYPES = {
    RETRIEVAL: ("coco", "flickr", "msrvtt", "didemo", "shapes"),
    VQA: ("vqav2", "msrvtt_qa", "msvd_qa", "shapes"),
    CAPTION: ("coco", "msrvtt", "msvd", "shapes"),
}
VIT = {"width": 32, "depth": 2, "num_heads": 4, "patch_size": 16, "mlp_ratio": 2}
WORDS = ["a red circle", "a blue star on the left"]


SMALL = {
    "image_size": 32,
    "vit_type": "custom",
    "vit": {"width": 32, "depth": 2, "num_heads": 4, "patch_size": 16, "mlp_ratio": 2},
    "embed_dim": 16,
    "queue_size": 12,
    "adapter": {"bottleneck": 8, "kv_bottleneck": 4, "frame_aware": True},
}
CAPTIONS = [
    "a red circle on the left",
    "a blue square at the bottom and then a green star",
    "yellow",
    "a cyan cross appears at the top",
]


class LavisDecoder(XBertLMHeadDecoder, GenerationMixin):
    """LAVIS's decoder, which has lost ``generate`` to transformers 4.50, generating as it did."""

    _supports_default_dynamic_cache = classmethod(lambda cls: False)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        for key in ("encoder_hidden_states", "encoder_attention_mask"):
            # LAVIS repeats them for beams, and transformers has begun to as well
            inputs[key] = inputs[key][:: len(inputs[key]) // len(input_ids)]
        return inputs


def perturb(module, seed=1, by=0.1):
    """Move every parameter off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * by)


def build_selective(build_model, **overrides):
    """A model whose attention is far from uniform, so that what it looks at matters."""
    model = build_model(**overrides)
    perturb(model.adapters)
    for layer in model.text_encoder.encoder.layer:
        perturb(layer.crossattention, by=0.5)
    return model


def skip_init(monkeypatch) -> None:
    """Leave weights as memory happens to be: drawing those of BLIP base takes seconds."""
    for module, name in ((vit, "trunc_normal_"), (nn.init, "trunc_normal_"), (nn.init, "normal_")):
        monkeypatch.setattr(module, name, lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: tensor)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *_, **__: tensor)


def batch(arch: str, image_size: int = 32) -> dict:
    """Two videos of two frames with all that the model's training step reads."""
    generator = torch.Generator().manual_seed(5)
    samples = {
        "video": torch.randn(2, 3, 2, image_size, image_size, generator=generator),
        "text_input": list(WORDS),
    }
    if arch == RETRIEVAL:
        progress = {"epoch": 1, "iters": 0, "num_iters_per_epoch": 2}
        samples.update(image_id=torch.arange(2), **progress)
    elif arch == VQA:
        samples.update(answer=["red", "left", "a star"], n_answers=torch.tensor([2, 1]))
        samples.update(weight=torch.tensor([0.5, 0.5, 1.0]))
    return samples


def four_videos() -> dict:
    """What ``outputs`` of a retrieval model is computed from."""
    video = torch.randn(4, 3, 2, 32, 32, generator=torch.Generator().manual_seed(6))
    return {"video": video, "text_input": [*WORDS, "yellow", "a green square"]}


@torch.no_grad()
def outputs(model, samples) -> dict[str, torch.Tensor]:
    """All that a retrieval model computes for a batch, in evaluation mode."""
    model.eval()
    visuals = model.encode_visual(samples)
    texts = model.encode_text(samples["text_input"])
    return {
        "visual embeds": visuals.embeds,
        "visual feat": visuals.feat,
        "text embeds": texts.embeds,
        "text feat": texts.feat,
        "matching logits": model.match(texts, visuals, torch.tensor([1, 2, 3, 0])),
    }


@torch.no_grad()
def behaviour(model) -> dict[str, torch.Tensor]:
    """What a model of any kind computes in evaluation mode, apart from queue and averages."""
    if hasattr(model, "encode_visual"):
        return outputs(model, four_videos())
    return {"loss": model.eval()(batch(VQA)).loss}


def train_steps(model, samples, number: int = 3) -> dict[str, torch.Tensor | None]:
    """Take some steps; returns the first step's gradients."""
    model.train()
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-2, weight_decay=0)
    first = None
    for _ in range(number):
        model(dict(samples)).loss.backward()
        if first is None:
            first = {
                name: None if p.grad is None else p.grad.clone()
                for name, p in model.trainable_parameters().items()
            }
        optimizer.step()
        optimizer.zero_grad()
    return first


def assert_same(one, other):
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_close(one, other, **tolerance):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance)


def assert_differ(one, other, but=()):
    for name, value in one.items():
        if name not in but:
            assert not torch.allclose(value, other[name], atol=1e-4), name
