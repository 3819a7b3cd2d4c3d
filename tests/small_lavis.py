"""LAVIS's own models with small encoders and without the hub.

Their code stays LAVIS's. Only sizes that it fixes are changed, and where BERT's tokenizer is from.
As a script: the command ``uniadapter`` with them, in two processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from forked_ranks import in_ranks
from lavis.common.registry import registry
from lavis.common.utils import get_abs_path
from lavis.models import albef_models, alpro_models
from lavis.models.alpro_models.alpro_retrieval import AlproRetrieval
from lavis.models.base_model import BaseModel
from lavis.models.blip_models import blip
from lavis.models.clip_models import model as clip
from lavis.models.timesformer import vit as timesformer
from lavis.models.vit import VisionTransformerEncoder
from omegaconf import OmegaConf
from transformers import BertTokenizer

from lavis_uniadapter.common.paths import PACKAGE_ROOT
from uniadapter_cli.main import main

WIDTH = 32
SIZE = {"embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
IMAGE_SIZE = 32
FRAMES = 2
CLIP_PATCH = 14  # of the model that LAVIS's project files name


class LocalTokenizer:
    """In place of ``BertTokenizer``, where LAVIS asks the hub for BERT's."""

    @staticmethod
    def from_pretrained(name: str) -> BertTokenizer:
        assert name == "bert-base-uncased"
        return BertTokenizer.from_pretrained(PACKAGE_ROOT / "configs/tokenizers/shapes")


def small_vit(cls, cfg, from_pretrained=False):
    """``VisionTransformerEncoder.from_config``."""
    encoder = cls(
        img_size=cfg.get("image_size", 384),
        patch_size=16,
        use_grad_checkpointing=cfg.get("vit_grad_ckpt", False),
        ckpt_layer=1,
        **SIZE,
    )
    encoder.vision_width = WIDTH
    return encoder


class SmallTimeSformer(timesformer.VisionTransformer):
    def __init__(self, **sizes):
        super().__init__(**{**sizes, **SIZE})


def shrink(replace: Callable = setattr) -> None:
    """Make LAVIS's classes build small models; ``replace`` as ``monkeypatch.setattr``."""
    for module in (blip, albef_models, alpro_models):
        replace(module, "BertTokenizer", LocalTokenizer)
    replace(VisionTransformerEncoder, "from_config", classmethod(small_vit))
    replace(timesformer, "VisionTransformer", SmallTimeSformer)
    # vision_width, text_width, embed_dim, max_txt_len, temp
    replace(AlproRetrieval.__init__, "__defaults__", (WIDTH, WIDTH, 16, 35, 0.07))
    tower = {"layers": 1, "width": 64}
    small_clip = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 2 * CLIP_PATCH, "patch_size": CLIP_PATCH, **tower},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 1, **tower},
    }
    replace(clip, "_MODEL_CONFIGS", {"ViT-L-14-336": small_clip})


def small_options(path: Path, folder: Path) -> list[str]:
    """Options that make the configuration of a baseline small; files go to ``folder``."""
    config = OmegaConf.load(path)
    arch, side = config.model.arch, IMAGE_SIZE
    cls = registry.get_model_class(arch)
    defaults = OmegaConf.load(cls.default_config_path(config.model.model_type)).model
    if arch == "clip":
        side = 2 * CLIP_PATCH
        options = ["model.pretrained=''"]
    else:
        med = json.loads(Path(get_abs_path(defaults.med_config_path)).read_text())
        med.update(hidden_size=WIDTH, intermediate_size=64, num_attention_heads=4)
        med.update(num_hidden_layers=2, encoder_width=WIDTH, vocab_size=168)
        med.update(max_position_embeddings=64)
        if "fusion_layer" in med:
            med["fusion_layer"] = 1
        med_path = folder / f"med_{path.stem}.json"
        med_path.write_text(json.dumps(med))
        options = [f"model.med_config_path={med_path}"]
    if "image_size" in defaults:
        options.append(f"model.image_size={side}")
    if "queue_size" in defaults:
        options += ["model.queue_size=12", "model.embed_dim=16"]
    if "timesformer" in defaults:
        options += [f"model.timesformer.image_size={side}", f"model.timesformer.n_frms={FRAMES}"]
    if arch == "alpro_qa":
        options += [f"model.hidden_size={WIDTH}", "model.num_classes=5"]
    for name, section in config.datasets.items():
        for mode, processor in section.vis_processor.items():
            where = f"datasets.{name}.vis_processor.{mode}"
            options.append(f"{where}.image_size={side}")
            if "n_frms" in processor:
                options.append(f"{where}.n_frms={FRAMES}")
    return options


def write_weights(path: Path, options: list[str], weights: Path) -> None:
    """Write random weights of a small baseline, in the form of LAVIS's pretrained files."""
    model_options = [o.removeprefix("model.") for o in options if o.startswith("model.")]
    given = OmegaConf.load(path).model
    cls = registry.get_model_class(given.arch)
    defaults = OmegaConf.load(cls.default_config_path(given.model_type)).model
    cfg = OmegaConf.merge(defaults, given, OmegaConf.from_dotlist(model_options))
    torch.manual_seed(0)
    load = BaseModel.load_checkpoint_from_config
    BaseModel.load_checkpoint_from_config = lambda self, cfg, **kwargs: None
    try:
        model = cls.from_config(cfg)
    finally:
        BaseModel.load_checkpoint_from_config = load
    torch.save({"model": model.state_dict()}, weights)


def command() -> None:
    """Run the command; a rank that fails ends in it."""
    if main():
        raise RuntimeError("the run failed")


if __name__ == "__main__":
    torch.set_num_threads(1)  # nothing but this thread, when processes are forked
    shrink()
    in_ranks(2, command, Path.cwd())
