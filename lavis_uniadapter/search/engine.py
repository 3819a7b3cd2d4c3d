"""A retrieval model with its processors, as an index uses it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from torch import Tensor

from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.common.schema.processors import VideoEval
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.runners.precision import AMP_DTYPES

# Options of a visual processor that decide what the model sees.
_VISUAL_OPTIONS = ("image_size", "n_frms", "mean", "std")


@dataclass(frozen=True)
class Scores:
    """Of one text with several segments.

    Attributes:
        ranking: (segments,) what segments are ordered by, as in the retrieval task.
        probability: (segments,) that text and segment match.
    """

    ranking: Tensor
    probability: Tensor


class Engine:
    """Encodes segments and texts, and scores pairs of them.

    Args:
        model: in evaluation mode, on its device.
        visual: size, number and normalisation of frames.
        text_processor: of evaluation.
        settings: of the two stages (``run:``).
        amp: ``bf16``, ``fp16`` or None.
        batch_size: clips that are encoded together.
    """

    def __init__(
        self,
        model: BlipUniAdapterRetrieval,
        visual: VideoEval,
        text_processor: Any,
        settings: Evaluation,
        amp: str | None,
        batch_size: int,
    ):
        self.model = model
        self.visual = visual
        self.settings = settings
        self.batch_size = batch_size
        self._text_processor = text_processor
        self._amp = amp

    @classmethod
    def from_config(
        cls, cfg: str | Path, options: Sequence[str] = (), adapter: str | os.PathLike | None = None
    ) -> Engine:
        """Build what a retrieval recipe describes.

        Args:
            cfg: the recipe's file.
            options: ``section.key=value`` over it. Unless they say otherwise, bf16 is used where
                the hardware has it.
            adapter: folder of a trained adapter; None: BLIP as it is.

        Raises:
            ConfigError, CheckpointError: naming what is wrong.
        """
        config = load_recipe(cfg, options, adapter)
        model_cls = registry.get_model_class(config.model_cfg.arch)
        if not issubclass(model_cls, BlipUniAdapterRetrieval):
            raise ConfigError(
                f"Search needs a retrieval model, and model.arch is '{config.model_cfg.arch}'. Use "
                "a recipe such as msrvtt_retrieval."
            )
        require_weights(config)
        section = next(iter(config.datasets_cfg.values()))
        given = section.vis_processor.eval
        visual = VideoEval.read({k: given[k] for k in _VISUAL_OPTIONS if k in given}, "eval")
        text = section.text_processor.eval
        text_processor = registry.get_processor_class(text.name).from_config(text)
        run = config.run_cfg
        model = model_cls.from_config(config.model_cfg).to(run.device).eval()
        if config.model_cfg.adapter_ckpt is None:
            model.adapters.active = None  # an untrained adapter would only disturb
        settings = Evaluation.pick(run, "run")
        return cls(model, visual, text_processor, settings, run.amp, run.batch_size_eval)

    def fingerprint(self) -> dict[str, str]:
        """Hashes of all that decides what an encoded segment or text is, by part."""
        model = self.model
        active = model.adapters.active_set
        adapter = {} if active is None else active.state_dict()
        vocabulary = json.dumps(model.tokenizer.get_vocab(), sort_keys=True)
        return {
            "model": model.base_fingerprint,
            "adapter": _hash_tensors(adapter),
            "tokenizer": _hash(vocabulary.encode()),
            "frames": json.dumps(self.visual.model_dump(include=set(_VISUAL_OPTIONS))),
        }

    # --- encoding ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, clips: Tensor) -> VisualFeatures:
        """Encode clips.

        Args:
            clips: uint8 RGB (clips, frames, image_size, image_size, 3).
        """
        mean, std = (
            torch.tensor(value, device=self.model.device)[:, None, None, None]
            for value in (self.visual.mean, self.visual.std)
        )
        pixels = clips.to(self.model.device).permute(0, 4, 1, 2, 3).float().div_(255)
        with self._autocast():
            return self.model.encode_visual(pixels.sub_(mean).div_(std))

    @torch.inference_mode()
    def encode_text(self, text: str) -> TextFeatures:
        """Encode one text, prepared as in evaluation."""
        with self._autocast():
            return self.model.encode_text([self._text_processor(text)])

    @torch.inference_mode()
    def match(self, text: TextFeatures, visuals: VisualFeatures) -> Scores:
        """Score one text with each of several visual inputs by the matching head."""
        number = len(visuals.feat)
        texts = TextFeatures(
            text.input_ids.expand(number, -1),
            text.attention_mask.expand(number, -1),
            None,
            text.feat.expand(number, -1),
        )
        with self._autocast():
            logits = self.model.match(texts, visuals).float()
        similarity = (visuals.feat.float() @ text.feat.float().t())[:, 0]
        return Scores(
            ranking=(logits[:, 1] + self.settings.itc_weight * similarity).cpu(),
            probability=logits.softmax(dim=1)[:, 1].cpu(),
        )

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=AMP_DTYPES[self._amp])


def load_recipe(
    cfg: str | Path, options: Sequence[str] = (), adapter: str | os.PathLike | None = None
) -> Any:
    """The configuration of a recipe for inference, with the folder of an adapter.

    Raises:
        ConfigError: naming the first thing that is wrong.
    """
    if adapter and not os.path.isdir(adapter):
        raise ConfigError(f"There is no adapter folder '{adapter}'.")
    config = load_config(cfg, ["run.amp=auto", *options, "run.evaluate=True"])
    if adapter:  # an option would not keep every character of a path
        config.model_cfg.adapter_ckpt = str(adapter)
    return config


def require_weights(config: Any) -> None:
    """Refuse a model with random weights.

    Raises:
        ConfigError: if ``model.pretrained`` is null.
    """
    if config.model_cfg.pretrained is None:
        raise ConfigError(
            "model.pretrained is null, so the model would be random. Give BLIP's weights: "
            "model.pretrained=PATH."
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


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive parts of a sequence."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
