"""Where the training on stills starts: MiniLM's text encoder in a BLIP of its width."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import set_seed

from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.model import RetrievalModel
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.tools.prepare.emoji.packages import WEIGHTS

CHECKPOINT = "start.pth"
# MiniLM's first two layers and its last two. After its first four alone, the state of [CLS], which
# BLIP reads, is the same for all texts.
LAYERS = (0, 1, 4, 5)


def write(package: Path, folder: Path, seed: int) -> None:
    """Write ``vocab.txt`` and a checkpoint: ``LAYERS`` of MiniLM in the text encoder.

    Its cross-attention, the visual encoder and the heads are random.

    Raises:
        ConfigError: the package's weights are of other sizes than the model type ``emoji``.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(package / "model/vocab.txt", folder / "vocab.txt")
    set_seed(seed)
    defaults: Any = OmegaConf.to_container(OmegaConf.load(RetrievalModel.files()["emoji"]))
    section = {**defaults["model"], "tokenizer": str(folder)}
    model = BlipUniAdapterRetrieval.from_config(section)
    state = base_state_dict(model)
    weights = text_weights(package / WEIGHTS)
    for name in weights.keys() & {key.removeprefix("text_encoder.") for key in state}:
        own, value = state[f"text_encoder.{name}"], weights[name]
        if own.shape[1:] != value.shape[1:]:
            raise ConfigError(
                f"{package / WEIGHTS}: {name} is {tuple(value.shape)}, and the model type emoji "
                f"has {tuple(own.shape)}."
            )
        own[: len(value)] = value  # BLIP's vocabulary has two tokens more
    torch.save({"model": state}, folder / CHECKPOINT)


def text_weights(path: Path) -> dict[str, Tensor]:
    """A BERT's tensors by their names in LAVIS's text encoder (MED), with ``LAYERS`` alone.

    MED has no token types, so type 0 is added to the positions; it has no pooler either.
    """
    state = safetensors.torch.load_file(path)
    types = state.pop("embeddings.token_type_embeddings.weight")
    state["embeddings.position_embeddings.weight"] += types[0]
    weights = {}
    for name, value in state.items():
        if name.startswith("encoder.layer."):
            number, _, rest = name.removeprefix("encoder.layer.").partition(".")
            if int(number) in LAYERS:
                weights[f"encoder.layer.{LAYERS.index(int(number))}.{rest}"] = value
        elif not name.startswith("pooler.") and not name.endswith("position_ids"):
            weights[name] = value
    return weights
