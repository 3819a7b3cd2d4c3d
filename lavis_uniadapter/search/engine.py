"""A model with its processors, as an index and predictions use it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from torch import Tensor

from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures
from lavis_uniadapter.checkpoints import identity
from lavis_uniadapter.checkpoints.blip_files import hash_tensors
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.evaluation.two_stage import encode_texts
from lavis_uniadapter.models.base import TunedBlip
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor
from lavis_uniadapter.runners.precision import autocast
from lavis_uniadapter.tools import recipes


@dataclass(frozen=True)
class Scores:
    """Of pairs of a text and a visual input.

    Attributes:
        ranking: (pairs,) what candidates are ordered by, as in the retrieval task.
        probability: (pairs,) that both match.
    """

    ranking: Tensor
    probability: Tensor


@dataclass
class Recipe:
    """A recipe for inference. Its model is loaded when it is first needed.

    Args:
        cfg: name or file of the recipe.
        options: ``section.key=value`` over it. Unless they say otherwise, bf16 is used where the
            hardware has it.
        adapter: folder of a trained adapter; None: BLIP as it is.

    Attributes:
        settings: of evaluation (``run:``).
        processor, text_processor: those of evaluation, the recipes' for images included.

    Raises:
        ConfigError: naming the first thing that is wrong, also that the weights would be random.
    """

    cfg: str | os.PathLike
    options: Sequence[str] = ()
    adapter: str | os.PathLike | None = None

    MODEL: ClassVar[type[TunedBlip]] = TunedBlip  # that the recipe must have

    def __post_init__(self):
        self.config = self._read()
        run = self.config.run_cfg
        self.settings = Evaluation.pick(run, "run")
        self.amp, self.batch_size = run.amp, run.batch_size_eval
        section = next(iter(self.config.datasets_cfg.values()))
        given, text = section.vis_processor.eval, section.text_processor.eval
        options = {key: given[key] for key in identity.VISUAL_OPTIONS if key in given}
        self.processor = BlipVideoEvalProcessor(**options)
        self.text_processor = registry.get_processor_class(text.name).from_config(text)

    def _read(self) -> Any:
        if self.adapter and not os.path.isdir(self.adapter):
            raise ConfigError(f"There is no adapter folder '{self.adapter}'.")
        path = recipes.find(str(self.cfg), recipes.runs())
        config = load_config(path, ["run.amp=auto", *self.options, "run.evaluate=True"])
        model = config.model_cfg
        if not issubclass(registry.get_model_class(model.arch), self.MODEL):
            names = registry.mapping["model_name_mapping"].items()
            wanted = next(name for name, known in names if known is self.MODEL)
            raise ConfigError(
                f"model.arch of '{self.cfg}' is '{model.arch}'; it must be '{wanted}' here."
            )
        if model.pretrained is None:
            raise ConfigError(
                "model.pretrained is null, so the model would be random. Give BLIP's weights: "
                "--options model.pretrained=PATH."
            )
        if self.adapter:  # an option would not keep every character of a path
            model.adapter_ckpt = str(self.adapter)
        return config

    def prepare_texts(self, texts: Sequence[str]) -> list[str]:
        """Texts as in evaluation; ConfigError for one that has no words."""
        for text in texts:
            if not any(map(str.isalnum, text)):
                raise ConfigError(f"{text!r} has no words that the model reads.")
        return [self.text_processor(text) for text in texts]

    @functools.cached_property
    def model(self) -> Any:
        """The model, in evaluation mode on its device.

        Raises:
            ConfigError: if heads would be random, as the base weights lack them and so no adapter.
        """
        section = self.config.model_cfg
        model = registry.get_model_class(section.arch).from_config(section)
        if section.adapter_ckpt is None:
            model.adapters.active = None  # an untrained adapter would only disturb
            heads = [h for h in model.HEADS if f"{h}.weight" in model.randomly_initialised]
            if heads:
                raise ConfigError(
                    f"'{section.pretrained}' has no {', '.join(heads)}, so results would be "
                    "random. Use BLIP's weights of pre-training or retrieval, or a trained "
                    "--adapter."
                )
        return model.to(self.config.run_cfg.device).eval()

    def fingerprint(self) -> dict[str, str]:
        """Hashes of what decides how images and clips are encoded, and of the vocabulary."""
        active = self.model.adapters.active_set
        return {
            "model": self.model.base_fingerprint,
            "adapter": hash_tensors({} if active is None else active.state_dict()),
            "tokenizer": identity.of_tokenizer(self.model.tokenizer).fingerprint,
            "frames": self.processor.options.model_dump_json(),
        }

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """No gradients, and the precision of the recipe."""
        with torch.inference_mode(), autocast(self.amp, self.model.device):
            yield

    def normalise(self, clips: Tensor) -> Tensor:
        """uint8 clips (clips, frames, H, W, 3) as float (clips, 3, frames, H, W) for the model."""
        frames = clips.to(self.model.device).permute(0, 1, 4, 2, 3)
        return torch.stack([self.processor.normalise(clip) for clip in frames])


class Engine(Recipe):
    """Encodes segments and texts with a retrieval recipe, and scores pairs of them."""

    MODEL = BlipUniAdapterRetrieval

    def encode(self, clips: Tensor) -> VisualFeatures:
        """Encode clips.

        Args:
            clips: uint8 RGB (clips, frames, image_size, image_size, 3).
        """
        with self.computing():
            return self.model.encode_visual(self.normalise(clips))

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Encode texts, prepared as in evaluation. Every rank must call it."""
        with self.computing():
            return encode_texts(self.model, self.prepare_texts(texts))[0]

    def match(self, texts: TextFeatures, visuals: VisualFeatures, pairs: Tensor) -> Scores:
        """Score pairs of a text and a visual input by the matching head.

        Args:
            pairs: (pairs, 2) positions in ``texts`` and in ``visuals``.
        """
        pairs = pairs.to(self.model.device)
        with self.computing():
            match = self.model.matcher(visuals)
            logits = []
            for some in pairs.split(self.settings.rerank_batch):
                chosen = texts[some[:, 0]]
                longest = int(chosen.attention_mask.sum(dim=1).max())
                logits.append(match(chosen.cut(longest), some[:, 1]).float())
        scores = torch.cat(logits)
        similarity = (visuals.feat[pairs[:, 1]].float() * texts.feat[pairs[:, 0]].float()).sum(1)
        return Scores(
            ranking=(scores[:, 1] + self.settings.itc_weight * similarity).cpu(),
            probability=scores.softmax(dim=1)[:, 1].cpu(),
        )


class TokenCache:
    """Visual tokens of the segments that were matched last, in float16.

    Args:
        gigabytes: of memory at most.
    """

    def __init__(self, gigabytes: float):
        self._limit = gigabytes * 1e9
        self._bytes = 0
        self._tokens: OrderedDict[int, VisualFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> VisualFeatures | None:
        """The tokens of a segment, by its id, as a batch of one."""
        with self._lock:
            if number in self._tokens:
                self._tokens.move_to_end(number)
            return self._tokens.get(number)

    def put(self, number: int, features: VisualFeatures) -> None:
        """Keep the tokens of a segment; those that were used least recently make room."""
        kept = VisualFeatures(
            *(t.half().cpu() for t in (features.embeds, features.feat, features.frame_feat))
        )
        with self._lock:
            if number not in self._tokens:
                self._bytes += _size(kept)
            self._tokens[number] = kept
            while self._bytes > self._limit and self._tokens:
                _, dropped = self._tokens.popitem(last=False)
                self._bytes -= _size(dropped)


def _size(features: VisualFeatures) -> int:
    return features.embeds.nbytes + features.feat.nbytes + features.frame_feat.nbytes


def batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive parts of a sequence."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
