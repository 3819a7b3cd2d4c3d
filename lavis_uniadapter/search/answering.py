"""Answer questions about a segment with a question-answering model, loaded when it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.processors import VideoEval
from lavis_uniadapter.models.vqa import BlipUniAdapterVQA
from lavis_uniadapter.search.engine import load_recipe, require_weights
from lavis_uniadapter.search.reading import read_segment
from lavis_uniadapter.search.segments import Segment

MAX_QUESTION = 500  # characters


class Answerer:
    """A question-answering recipe.

    Args:
        cfg, options: the recipe's file, and values over it.
        adapter: folder of a trained adapter; None: BLIP as it is.
    """

    def __init__(
        self, cfg: str | Path, options: Sequence[str] = (), adapter: str | Path | None = None
    ):
        self._config = load_recipe(cfg, options, adapter)
        self._model_cls = registry.get_model_class(self._config.model_cfg.arch)
        if not issubclass(self._model_cls, BlipUniAdapterVQA):
            raise ConfigError(
                f"Questions need a question-answering recipe such as msrvtt_qa, and model.arch is "
                f"'{self._config.model_cfg.arch}'."
            )
        require_weights(self._config)
        self._model: BlipUniAdapterVQA | None = None
        self._lock = threading.Lock()

    def answer(self, path: Path, segment: Segment, question: str) -> dict[str, Any]:
        """Answer by beam search.

        Returns:
            ``answer``; seconds that loading the model took (0 if it was loaded) and the answer.

        Raises:
            ConfigError: for an empty or very long question.
        """
        if not question.strip() or len(question) > MAX_QUESTION:
            raise ConfigError(f"Ask a question of 1 to {MAX_QUESTION} characters.")
        with self._lock:
            started = time.perf_counter()
            if self._model is None:
                model = self._model_cls.from_config(self._config.model_cfg)
                if self._config.model_cfg.adapter_ckpt is None:
                    model.adapters.active = None
                self._model = model.to(self._config.run_cfg.device).eval()
            loaded = time.perf_counter()
            answer = self._answer(self._model, path, segment, question)
        return {
            "answer": answer,
            "loading": round(loaded - started, 1),
            "seconds": round(time.perf_counter() - loaded, 1),
        }

    @torch.inference_mode()
    def _answer(self, model: BlipUniAdapterVQA, path: Path, segment: Segment, question: str) -> str:
        section = next(iter(self._config.datasets_cfg.values()))
        given = section.vis_processor.eval
        options = ("image_size", "n_frms", "mean", "std")
        visual = VideoEval.read({k: given[k] for k in options if k in given}, "eval")
        text = section.text_processor.eval
        prepare = registry.get_processor_class(text.name).from_config(text)
        clip = read_segment(path, segment, visual).to(model.device)
        pixels = clip.permute(0, 4, 1, 2, 3).float().div_(255)
        mean, std = (
            torch.tensor(v, device=model.device)[:, None, None, None]
            for v in (visual.mean, visual.std)
        )
        samples = {"video": pixels.sub_(mean).div_(std), "text_input": [prepare(question)]}
        return model.predict_answers(samples, inference_method="generate")[0]
