"""Answer questions about a segment with a question-answering model, loaded when it is needed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.models.vqa import BlipUniAdapterVQA
from lavis_uniadapter.search.engine import Recipe
from lavis_uniadapter.search.reading import read_segment
from lavis_uniadapter.search.segments import Segment

MAX_QUESTION = 500  # characters


class Answerer(Recipe):
    """A question-answering recipe."""

    MODEL = BlipUniAdapterVQA

    def __post_init__(self):
        super().__post_init__()
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
            model = self.model
            loaded = time.perf_counter()
            clip = read_segment(path, segment, self.processor.options)
            with self.computing():
                samples = {
                    "video": self.normalise(clip),
                    "text_input": self.prepare_texts([question]),
                }
                answer = model.predict_answers(samples, inference_method="generate")[0]
        return {
            "answer": answer,
            "loading": round(loaded - started, 1),
            "seconds": round(time.perf_counter() - loaded, 1),
        }
