"""BLIP base for benchmarks: random weights, the same in this package's model and in LAVIS's."""

from __future__ import annotations

import contextlib
import random

import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip import BlipBase
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from omegaconf import OmegaConf

import lavis_uniadapter  # noqa: F401
from lavis_uniadapter.backbone.build import build_text_encoder, build_visual_encoder
from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.common.paths import find
from lavis_uniadapter.models import TunedBlip

TOKENIZER = "configs/tokenizers/shapes"
WORDS = "red green blue yellow circle square star cross on the left right top small large".split()


def random_captions(number: int, seed: int) -> list[str]:
    """Captions of about 12 tokens, as MSR-VTT's are, a token a word."""
    picker = random.Random(seed)
    return [" ".join(picker.choices(WORDS, k=picker.randint(6, 14))) for _ in range(number)]


def config_of(arch: str, model_type: str, **overrides):
    """The real configuration of a type, without weights and with the bundled tokenizer."""
    path = registry.get_model_class(arch).default_config_path(model_type)
    given = {"pretrained": None, "tokenizer": TOKENIZER, **overrides}
    return OmegaConf.merge(OmegaConf.load(path).model, given)


def build(arch: str, model_type: str, device: str, **overrides):
    """This package's model, BLIP base, adapters moved off their start at zero."""
    torch.manual_seed(0)
    config = config_of(arch, model_type, **overrides)
    model = registry.get_model_class(arch).from_config(config).to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator).to(device))
    model.reset_momentum()
    return model


def our_retrieval(image_size: int, *, frame_aware: bool, device: str, queue_size: int = 4096):
    """This package's retrieval model with adapters."""
    return build(
        "blip_uniadapter_retrieval",
        "msrvtt",
        device,
        image_size=image_size,
        queue_size=queue_size,
        adapter={"frame_aware": frame_aware},
    ).eval()


def lavis_retrieval(image_size: int, *, device: str, queue_size: int = 4096):
    """LAVIS's own retrieval model."""
    tokenizer = TunedBlip.build_tokenizer(TOKENIZER, 30524)
    torch.manual_seed(0)
    with use_tokenizer(tokenizer):
        model = BlipRetrieval(
            build_visual_encoder("base", image_size),
            build_text_encoder(str(find("configs/models/med_config.json")), 768),
            queue_size=queue_size,
        )
    return model.to(device).eval()


def same_blip(ours, theirs) -> None:
    """Give LAVIS's model the weights of the BLIP under ours."""
    theirs.load_state_dict(base_state_dict(ours), strict=False)
    theirs.copy_params()


@contextlib.contextmanager
def use_tokenizer(tokenizer):
    """LAVIS's models, built inside, take this tokenizer instead of asking the hub for one."""
    original = BlipBase.__dict__["init_tokenizer"]
    BlipBase.init_tokenizer = classmethod(lambda cls: tokenizer)
    try:
        yield
    finally:
        BlipBase.init_tokenizer = original
