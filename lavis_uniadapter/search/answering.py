"""Answer questions about a segment with a question-answering model, loaded when it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.models.vqa import BlipUniAdapterVQA
from lavis_uniadapter.runners.precision import autocast
from lavis_uniadapter.search.engine import build_model, build_processors, load_recipe, normalise
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
        self._config = load_recipe(BlipUniAdapterVQA, cfg, options, adapter)
        self._processor, self._text_processor = build_processors(self._config)
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
                self._model = build_model(self._config)
            loaded = time.perf_counter()
            answer = self._answer(self._model, path, segment, question)
        return {
            "answer": answer,
            "loading": round(loaded - started, 1),
            "seconds": round(time.perf_counter() - loaded, 1),
        }

    @torch.inference_mode()
    def _answer(self, model: BlipUniAdapterVQA, path: Path, segment: Segment, question: str) -> str:
        clip = read_segment(path, segment, self._processor.options)
        samples = {
            "video": normalise(self._processor, clip, model.device),
            "text_input": [self._text_processor(question)],
        }
        with autocast(self._config.run_cfg.amp, model.device):
            return model.predict_answers(samples, inference_method="generate")[0]
