"""What is predicted about a batch of images or clips."""

from __future__ import annotations

import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.models.base import TunedBlip
from lavis_uniadapter.models.caption import BlipUniAdapterCaption
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.models.vqa import BlipUniAdapterVQA
from lavis_uniadapter.runners.precision import autocast
from lavis_uniadapter.search.engine import (
    Engine,
    build_model,
    build_processors,
    load_recipe,
    normalise,
)
from lavis_uniadapter.tools import recipes
from lavis_uniadapter.tools.predict.lists import recipe_answers

logger = logging.getLogger("lavis_uniadapter")

Record = dict[str, Any]
# Of scores in the output; the rest is noise of the order in which numbers are added.
_DIGITS = 5


class Predictor(ABC):
    """A recipe for inference. Its model is loaded when it is first needed.

    Args:
        cfg: name or file of the recipe.
        options: ``section.key=value`` over it.
        adapter: folder of a trained adapter; None: BLIP as it is.

    Raises:
        ConfigError: naming the first thing that is wrong.
    """

    MODEL: type[TunedBlip]
    columns: Sequence[str]  # of the output

    def __init__(
        self,
        cfg: str | os.PathLike,
        options: Sequence[str] = (),
        adapter: str | os.PathLike | None = None,
    ):
        recipe = recipes.find(str(cfg), recipes.runs())
        self.config = load_recipe(self.MODEL, recipe, options, adapter)
        self.processor, self.text_processor = build_processors(self.config)
        run = self.config.run_cfg
        self.settings = Evaluation.pick(run, "run")
        self.amp, self.batch_size = run.amp, run.batch_size_eval

    @functools.cached_property
    def model(self) -> Any:
        """The model, in evaluation mode on its device."""
        return build_model(self.config)

    def identity(self) -> dict[str, Any]:
        """What decides the records, by names for messages."""
        # it reads the model and the processor alone
        parts = Engine.fingerprint(self)  # type: ignore[arg-type]
        return {**parts, "amp": self.amp, **self.given()}

    @abstractmethod
    def given(self) -> dict[str, Any]:
        """The part of ``identity`` that is not in every prediction."""

    def select(self, files: Iterable[str]) -> list[str]:
        """The files that there is something to predict about."""
        return list(files)

    @torch.inference_mode()
    def __call__(self, files: Sequence[str], clips: Tensor) -> list[list[Record]]:
        """The records of each file.

        Args:
            files: their names.
            clips: uint8 RGB (files, frames, image_size, image_size, 3).
        """
        video = normalise(self.processor, clips, self.model.device)
        with autocast(self.amp, self.model.device):
            return self._predict(files, video)

    @abstractmethod
    def _predict(self, files: Sequence[str], video: Tensor) -> list[list[Record]]:
        """``video`` is normalised (files, 3, frames, H, W)."""

    def finish(self, by_file: Mapping[str, Sequence[Record]]) -> list[Record]:
        """The output's records, made from those of all files."""
        return [
            {"file": file, **_rounded(record)}
            for file, records in by_file.items()
            for record in records
        ]


def _rounded(record: Record) -> Record:
    return {k: round(v, _DIGITS) if isinstance(v, float) else v for k, v in record.items()}


class Captioner(Predictor):
    """Captions by beam search, with their scores; see ``ScoredText``.

    Args:
        captions: for each file; the best ones of the search.
    """

    MODEL = BlipUniAdapterCaption
    columns = ("file", "caption", "score")

    def __init__(self, *recipe, captions: int = 1, **more):
        super().__init__(*recipe, **more)
        if not 1 <= captions <= self.settings.num_beams:
            raise ConfigError(
                f"--captions is {captions}, and run.num_beams {self.settings.num_beams}. Ask for 1 "
                "caption or more, and for no more than beams (--options run.num_beams=N)."
            )
        self._how = {
            "num_captions": captions,
            "num_beams": self.settings.num_beams,
            "max_length": self.settings.max_len,
            "min_length": self.settings.min_len,
        }

    def given(self):
        return self._how

    def _predict(self, files, video):
        scored = self.model.generate_with_scores({"video": video}, **self._how)
        records = [{"caption": text, "score": score} for text, score in scored]
        number = self._how["num_captions"]
        return [records[i : i + number] for i in range(0, len(records), number)]


class QuestionAnswerer(Predictor):
    """Answers to questions, with their probabilities among candidates, or scores.

    Args:
        questions: (file, question) pairs; a question without a file is about every file.
        answers: candidates, which are ranked; see ``RankedAnswer``. None: the recipe's, if it
            ranks (``run.inference_method``) and their file is there. Otherwise answers are
            generated, with scores; see ``ScoredText``.
        top: ranked answers to each question.
    """

    MODEL = BlipUniAdapterVQA

    def __init__(
        self,
        *recipe,
        questions: Sequence[tuple[str | None, str]],
        answers: Sequence[str] | None = None,
        top: int = 1,
        **more,
    ):
        super().__init__(*recipe, **more)
        if answers is None and self.settings.inference_method == "rank":
            answers = recipe_answers(self.config)
        how = f"ranked among {len(answers)} candidates" if answers else "generated"
        logger.info("answers are %s", how)
        self._questions, self._answers, self._top = list(questions), answers, top
        self._for_all = [question for file, question in questions if file is None]
        self._of_file: dict[str, list[str]] = {}
        for file, question in questions:
            if file is not None:
                self._of_file.setdefault(file, []).append(question)
        most = len(self._for_all) + max(map(len, self._of_file.values()), default=0)
        self.batch_size = max(1, self.batch_size // max(1, most))
        ranked = ("rank", "answer", "probability")
        self.columns = ("file", "question", *(ranked if answers else ("answer", "score")))

    def given(self):
        names = ("num_ans_candidates",) if self._answers else ("num_beams", "max_len", "min_len")
        settings = {name: getattr(self.settings, name) for name in names}
        lists = {"questions": self._questions, "answers": self._answers, "top": self._top}
        return {**lists, **settings}

    def select(self, files):
        files = list(files)
        if absent := self._of_file.keys() - set(files):
            raise ConfigError(
                f"There is a question about '{min(absent)}', and no such image or video. Write "
                "file names as they are below the folder."
            )
        return [file for file in files if self._for_all or file in self._of_file]

    def _predict(self, files, video):
        asked = [self._for_all + self._of_file.get(file, []) for file in files]
        numbers = [number for number, questions in enumerate(asked) for _ in questions]
        flat = [question for questions in asked for question in questions]
        samples = {
            "video": video,
            "text_input": [self.text_processor(question) for question in flat],
            "visual_index": torch.tensor(numbers, device=video.device),
        }
        records: list[list[Record]] = [[] for _ in files]
        for number, question, found in zip(numbers, flat, self._answer(samples), strict=True):
            records[number] += [{"question": question, **record} for record in found]
        return records

    def _answer(self, samples: dict[str, Any]) -> list[list[Record]]:
        settings = self.settings
        if self._answers is None:
            scored = self.model.generate_with_scores(
                samples, settings.num_beams, settings.max_len, settings.min_len
            )
            return [[{"answer": text, "score": score}] for text, score in scored]
        candidates = settings.num_ans_candidates
        return [
            [
                {"rank": rank, "answer": best.answer, "probability": best.probability}
                for rank, best in enumerate(ranked[: self._top], 1)
            ]
            for ranked in self.model.rank_answers(samples, self._answers, candidates)
        ]


class Matcher(Predictor):
    """For each text the files that match it best, in two stages, as in evaluation.

    A file is read once. The matching head judges it for the texts to which it is among the most
    similar so far, which is so of every file that is among them in the end.

    Args:
        texts: what to look for.
        top: files for each text.
        rerank: how many files the matching head judges for each text; 0: none; None: the recipe's
            ``run.k_test``.
    """

    MODEL = BlipUniAdapterRetrieval
    columns = ("text", "rank", "file", "probability", "similarity")

    def __init__(
        self, *recipe, texts: Sequence[str], top: int = 10, rerank: int | None = None, **more
    ):
        super().__init__(*recipe, **more)
        self._texts, self._top = list(texts), top
        self._rerank = self.settings.k_test if rerank is None else rerank
        self._best = torch.empty(len(self._texts), 0)  # similarities so far

    def given(self):
        lists = {"texts": self._texts, "top": self._top, "rerank": self._rerank}
        return {**lists, "itc_weight": self.settings.itc_weight}

    @functools.cached_property
    def _engine(self) -> Engine:
        parts = self.model, self.processor, self.text_processor, self.settings
        return Engine(*parts, self.amp, self.batch_size)

    @functools.cached_property
    def _encoded(self):
        return self._engine.encode_texts(self._texts)

    def _predict(self, files, video):
        visuals = self.model.encode_visual({"video": video})
        similarity = (self._encoded.feat.float() @ visuals.feat.float().t()).cpu()
        best = torch.cat([self._best, similarity], dim=1)
        self._best = best.topk(min(max(self._top, self._rerank), best.shape[1]), dim=1).values
        records: list[list[Record]] = [[] for _ in files]
        kept = {
            (text, visual): {"text": text, "similarity": float(similarity[text, visual])}
            for text, visual in (similarity >= self._best[:, -1:]).nonzero().tolist()
        }
        for pair, scores in self._judge(similarity, visuals).items():
            kept[pair].update(scores)
        for (_, visual), record in kept.items():
            records[visual].append(record)
        return records

    def _judge(self, similarity: Tensor, visuals) -> dict[tuple[int, int], dict[str, float]]:
        """What the matching head makes of the most similar pairs, by text and visual input."""
        if self._rerank == 0:
            return {}
        least = self._best[:, min(self._rerank, self._best.shape[1]) - 1]
        pairs = (similarity >= least[:, None]).nonzero()
        if not len(pairs):
            return {}
        scores = self._engine.match(self._encoded, visuals, pairs)
        values = pairs.tolist(), scores.ranking.tolist(), scores.probability.tolist()
        return {
            tuple(pair): {"ranking": ranking, "probability": probability}
            for pair, ranking, probability in zip(*values, strict=True)
        }

    def finish(self, by_file):
        found: list[list[Record]] = [[] for _ in self._texts]
        for file, records in by_file.items():
            for record in records:
                found[record["text"]].append({**record, "file": file})
        rows = []
        for text, candidates in zip(self._texts, found, strict=True):
            candidates.sort(key=lambda record: -record["similarity"])
            judged = sorted(candidates[: self._rerank], key=lambda record: -record["ranking"])
            # the matching head also judged files that more similar ones displaced
            rest = [{**record, "probability": None} for record in candidates[self._rerank :]]
            for rank, record in enumerate([*judged, *rest][: self._top], 1):
                scores = {key: record[key] for key in ("probability", "similarity")}
                rows.append(
                    {"text": text, "rank": rank, "file": record["file"], **_rounded(scores)}
                )
        return rows
