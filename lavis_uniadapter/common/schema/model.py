"""``model:``, a class for each architecture of this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from lavis_uniadapter.common.schema.methods import METHODS, AdapterConfig, LoraConfig, MethodConfig
from lavis_uniadapter.common.schema.section import (
    Amount,
    Count,
    Dropout,
    Location,
    Positive,
    Section,
    Share,
    Size,
    option,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TextLength = Annotated[int, Field(ge=2, le=512)]


class VitSection(Section):
    """``model.vit``: the sizes of a visual encoder with ``vit_type: custom``."""

    width: Size = option(..., "Width of the hidden states.")
    depth: Size = option(..., "Number of blocks.")
    num_heads: Size = option(..., "Attention heads; their number divides `width`.")
    patch_size: Size = option(..., "Side of a patch in pixels; it divides `image_size`.")
    mlp_ratio: Positive = option(..., "Width of the FFN over `width`.")
    pos_embed_std: Positive | None = option(None, "Of the initial positions; null: LAVIS's 0.02.")


BASE = VitSection(width=768, depth=12, num_heads=12, patch_size=16, mlp_ratio=4.0)
LARGE = VitSection(width=1024, depth=24, num_heads=16, patch_size=16, mlp_ratio=4.0)


class ModelSection(Section):
    """What all architectures of this package have in common."""

    HAS_FRAME_FEATURES: ClassVar[bool] = False

    arch: str = option(..., "Name of the model in LAVIS's registry.")
    model_type: str = option(..., "Its default configuration; wins over the defaults given here.")
    pretrained: Location | None = option(
        None, "BLIP's weights, a path or URL; null: random weights."
    )
    load_finetuned: bool = option(False, "Load `finetuned`.")
    finetuned: Location | None = option(None, "A checkpoint of a run, loaded after `pretrained`.")
    adapter_ckpt: Location | None = option(None, "A folder written by `save_adapter`.")
    force: bool = option(False, "Use what was trained with another base, vocabulary or data.")
    tokenizer: Location = option("bert-base-uncased", "Folder with `vocab.txt`, or hub name.")
    vit_type: Literal["base", "large", "custom"] = option("base", "Size of the visual encoder.")
    vit: VitSection | None = option(None, "Its sizes, with `vit_type: custom`.")
    drop_path_rate: Dropout | None = option(None, "Stochastic depth; null: LAVIS's own.")
    vit_grad_ckpt: bool = option(False, "Checkpoint activations of the visual encoder.")
    vit_ckpt_layer: Count = option(0, "How many of its last blocks, with `vit_grad_ckpt`.")
    text_ckpt_layer: Count = option(0, "The same for the last layers of the text encoder.")
    med_config_path: Location = option("configs/models/med_config.json", "BERT configuration.")
    image_size: Size = option(384, "Side of images and frames in pixels; the processors' too.")
    max_txt_len: TextLength = option(35, "Maximum number of tokens of a text.")
    tuning: Literal[tuple(METHODS)] = option(  # type: ignore[valid-type]
        "uniadapter", "What trains; `linear`: the heads, `full`: everything."
    )
    adapter: AdapterConfig = option(AdapterConfig(), "Options of `uniadapter` and `adapter`.")
    lora: LoraConfig = option(LoraConfig(), "Read by `lora`.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.vit_type == "custom") != (self.vit is not None):
            raise ValueError("vit must be given with vit_type: custom, and only then.")
        patch_size = self.vit_sizes.patch_size
        if self.image_size % patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the patch size {patch_size}."
            )
        if self.vit is not None and self.vit.width % self.vit.num_heads:
            raise ValueError(
                f"vit.width {self.vit.width} is not a multiple of num_heads {self.vit.num_heads}."
            )
        if self.finetuned and not self.load_finetuned:
            raise ValueError(
                f"finetuned is {self.finetuned!r} and load_finetuned is False. Set "
                "load_finetuned=True to load it, or finetuned=null."
            )
        base = self.pretrained
        if base and "://" not in base and not os.path.isfile(base):
            raise ValueError(
                f"pretrained: No checkpoint at {base!r}. Give the path or URL of a BLIP .pth file, "
                "or null for random weights."
            )
        finetuned = self.finetuned or ""
        if self.load_finetuned and "://" not in finetuned and not os.path.isfile(finetuned):
            raise ValueError(f"finetuned is {self.finetuned!r}; load_finetuned needs a file there.")
        if self.adapter_ckpt is not None and not os.path.isdir(self.adapter_ckpt):
            raise ValueError(
                f"adapter_ckpt: {self.adapter_ckpt!r} is not an adapter folder. Give one that "
                "save_adapter or a run wrote, such as RUN/adapter_best, by --adapter or this key. "
                "For a run's checkpoint file set run.resume_ckpt_path."
            )
        if self.tuning == "uniadapter" and self.adapter.frame_aware and not self.HAS_FRAME_FEATURES:
            raise ValueError(
                "adapter.frame_aware is True, and frame-aware attention works in retrieval models "
                "alone. Set it to False."
            )
        return self

    @property
    def vit_sizes(self) -> VitSection:
        """The sizes of the visual encoder."""
        return self.vit or (LARGE if self.vit_type == "large" else BASE)

    @property
    def tokens(self) -> int:
        """Number of visual tokens of an image or a frame."""
        return (self.image_size // self.vit_sizes.patch_size) ** 2 + 1

    @property
    def method_config(self) -> MethodConfig:
        """The configuration of the chosen tuning method."""
        config = METHODS[self.tuning]
        section = getattr(self, config.SECTION) if config.SECTION else None
        return config(**{key: getattr(section, key) for key in config.model_fields})

    @classmethod
    def files(cls) -> dict[str, str]:
        """The default configurations of the model types, as LAVIS's models name them."""
        (arch,) = get_args(cls.model_fields["arch"].annotation)
        return {
            name: str(CONFIGS / f"models/{arch}_{name}.yaml")
            for name in get_args(cls.model_fields["model_type"].annotation)
        }


class LavisModel(Section):
    """A model of LAVIS's own, which has further keys."""

    model_config = ConfigDict(extra="allow")

    pretrained: Any = option(None, "Weights.")
    finetuned: Any = option(None, "Weights.")

    @field_validator("pretrained", "finetuned")
    @classmethod
    def _expand_user(cls, value: Any) -> Any:
        return os.path.expanduser(value) if isinstance(value, str) else value


class RetrievalModel(ModelSection):
    """Retrieval."""

    HAS_FRAME_FEATURES: ClassVar[bool] = True

    arch: Literal["blip_uniadapter_retrieval"]
    model_type: Literal["coco", "flickr", "msrvtt", "didemo", "emoji", "shapes"]
    embed_dim: Size = option(256, "Width of the contrastive features.")
    queue_size: Count = option(57600, "Earlier features that contrastive learning compares with.")
    alpha: Share = option(0.4, "Weight of the momentum encoders' soft targets.")
    alpha_rampup_epochs: Amount = option(2.0, "Epochs over which `alpha` grows from 0.")
    momentum: Share = option(0.995, "Decay of the moving averages of encoders and heads.")
    adapter_momentum: Share = option(0.990025, "Decay of the moving averages of adapters.")
    hard_negatives: bool = option(
        True, "Draw negatives by similarity; False: at random, for an untrained matching head."
    )
    negative_all_rank: bool = option(True, "Draw negatives from the batches of all processes.")


class VqaModel(ModelSection):
    """Question answering."""

    arch: Literal["blip_uniadapter_vqa"]
    model_type: Literal["vqav2", "msrvtt_qa", "msvd_qa", "shapes"]


class CaptionModel(ModelSection):
    """Captioning."""

    arch: Literal["blip_uniadapter_caption"]
    model_type: Literal["coco", "msrvtt", "msvd", "shapes"]
    max_txt_len: TextLength = option(40, "Maximum number of tokens of a caption.")
    prompt: str = option("", "What captions begin with; the text processor puts it there.")


MODELS: dict[str, type[ModelSection]] = {
    "blip_uniadapter_retrieval": RetrievalModel,
    "blip_uniadapter_vqa": VqaModel,
    "blip_uniadapter_caption": CaptionModel,
}
