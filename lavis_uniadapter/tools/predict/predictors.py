"""What is predicted about a batch of images or clips."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.evaluation.answer_ranking import tokenise_answers
from lavis_uniadapter.models.caption import BlipUniAdapterCaption
from lavis_uniadapter.models.vqa import BlipUniAdapterVQA
from lavis_uniadapter.search.engine import Engine, Recipe
from lavis_uniadapter.tools.predict.lists import recipe_answers

logger = logging.getLogger("lavis_uniadapter")

Record = dict[str, Any]
DIGITS = 5  # of scores in the output; further ones depend on the batch


@dataclass
class Predictor(Recipe, ABC):
    """What is predicted with a recipe.

    Attributes:
        columns: of the output.
        given: what decides the records, beside model and processor.
        independent: whether a file's records say nothing of other files.
    """

    columns: ClassVar[Sequence[str]]
    independent: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.given: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """What decides the records, by names for messages."""
        return {**self.fingerprint(), "amp": self.amp, **self.given}

    def select(self, files: Iterable[str]) -> list[str]:
        """The files that there is something to predict about."""
        return list(files)

    def prepare(self) -> None:
        """What every rank does before the first file of a folder: load the model."""
        self.model.eval()

    def __call__(self, files: Sequence[str], clips: Tensor) -> list[list[Record]]:
        """The records of each file.

        Args:
            files: their names.
            clips: uint8 RGB (files, frames, image_size, image_size, 3).

        Raises:
            FloatingPointError: if a score is not finite.
        """
        with self.computing():
            records = self._predict(files, self.normalise(clips))
        values = (v for each in records for r in each for v in r.values() if isinstance(v, float))
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                "Scores are not finite: the model's weights are spoiled, or they overflow in "
                "run.amp. Use another adapter, or --options run.amp=null."
            )
        return records

    @abstractmethod
    def _predict(self, files: Sequence[str], video: Tensor) -> list[list[Record]]:
        """``video`` is normalised (files, 3, frames, H, W)."""

    def finish(self, by_file: Mapping[str, Sequence[Record]]) -> list[Record]:
        """The output's records, made from those of all files."""
        every = ((file, record) for file, records in by_file.items() for record in records)
        return [{"file": file, **_rounded(record)} for file, record in every]


def _rounded(record: Record) -> Record:
    return {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in record.items()}


@dataclass
class Captioner(Predictor):
    """Captions by beam search, with their scores; see ``ScoredText``.

    Args:
        captions: for each file; the best ones of the search.
    """

    captions: int = field(default=1, kw_only=True)

    MODEL = BlipUniAdapterCaption
    columns = ("file", "caption", "score")

    def __post_init__(self):
        super().__post_init__()
        beams = self.settings.num_beams
        if not 1 <= self.captions <= beams:
            raise ConfigError(
                f"--captions is {self.captions}, and run.num_beams {beams}. Ask for 1 caption or "
                "more, and for no more than beams (--options run.num_beams=N)."
            )
        used = self.settings.model_dump(include={"num_beams", "max_len", "min_len"})
        self.given = {"captions": self.captions, **used}

    def _predict(self, files, video):
        scored = self.model.generate_with_scores(
            {"video": video},
            num_captions=self.captions,
            num_beams=self.settings.num_beams,
            max_length=self.settings.max_len,
            min_length=self.settings.min_len,
        )
        records = [{"caption": text, "score": score} for text, score in scored]
        return [records[i : i + self.captions] for i in range(0, len(records), self.captions)]


@dataclass
class QuestionAnswerer(Predictor):
    """Answers to questions, with their probabilities among candidates, or scores.

    Args:
        questions: by the file that they are about; None: every file.
        answers: candidates, which are ranked; see ``RankedAnswer``. None: the recipe's, if it
            ranks (``run.inference_method``) and their file is there. Otherwise answers are
            generated, with scores; see ``ScoredText``.
        top: ranked answers to each question.
    """

    questions: Mapping[str | None, Sequence[str]] = field(kw_only=True)
    answers: Sequence[str] | None = field(default=None, kw_only=True)
    top: int = field(default=1, kw_only=True)

    MODEL = BlipUniAdapterVQA

    def __post_init__(self):
        super().__post_init__()
        if self.answers is None and self.settings.inference_method == "rank":
            self.answers = recipe_answers(self.config)
        ranked = self.answers is not None
        for each in self.questions.values():
            self.prepare_texts(each)  # one without words is refused before any file is read
        self._of_file = {file: each for file, each in self.questions.items() if file is not None}
        most = max(map(len, map(self._asked, [None, *self._of_file])))
        self.batch_size = max(1, self.batch_size // max(1, most))
        found = ("rank", "answer", "probability") if ranked else ("answer", "score")
        self.columns = ("file", "question", *found)
        asked = {"questions": list(self.questions.items()), "answers": self.answers}
        names = {"num_ans_candidates"} if ranked else {"num_beams", "max_len", "min_len"}
        self.given = {**asked, "top": self.top, **self.settings.model_dump(include=names)}

    def _asked(self, file: str | None) -> list[str]:
        return [*self.questions.get(None, ()), *self._of_file.get(file, ())]

    def select(self, files):
        files = list(files)
        if absent := self._of_file.keys() - set(files):
            raise ConfigError(
                f"There is a question about '{min(absent)}', and no such image or video. Write "
                "file names as they are below the folder."
            )
        return [file for file in files if self._asked(file)]

    def prepare(self):
        if self.answers is None:
            logger.info("answers are generated")
            return
        logger.info("answers are ranked among %d candidates", len(self.answers))
        try:
            tokenise_answers(self.answers, self.model.tokenizer)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _predict(self, files, video):
        asked = [(number, q) for number, file in enumerate(files) for q in self._asked(file)]
        samples = {
            "video": video,
            "text_input": self.prepare_texts([question for _, question in asked]),
            "visual_index": torch.tensor([number for number, _ in asked], device=video.device),
        }
        records = [[] for _ in files]
        for (number, question), found in zip(asked, self._answer(samples), strict=True):
            records[number] += [{"question": question, **answer} for answer in found]
        return records

    def _answer(self, samples: dict[str, Any]) -> list[list[Record]]:
        settings = self.settings
        if self.answers is None:
            how = settings.num_beams, settings.max_len, settings.min_len
            scored = self.model.generate_with_scores(samples, *how)
            return [[{"answer": text, "score": score}] for text, score in scored]
        ranked = self.model.rank_answers(samples, self.answers, settings.num_ans_candidates)
        return [
            [
                {"rank": rank, "answer": each.answer, "probability": each.probability}
                for rank, each in enumerate(best[: self.top], 1)
            ]
            for best in ranked
        ]


@dataclass
class Matcher(Predictor, Engine):
    """For each text the files that match it best, in two stages, as in evaluation.

    A file is read once. The matching head judges it for the texts to which it is among the most
    similar so far, which is so of every file that is among them in the end.

    Args:
        texts: what to look for.
        top: files for each text.
        rerank: how many files the matching head judges for each text; 0: none; None: the recipe's
            ``run.k_test``.
    """

    texts: Sequence[str] = field(kw_only=True)
    top: int = field(default=10, kw_only=True)
    rerank: int | None = field(default=None, kw_only=True)

    columns = ("text", "rank", "file", "probability", "similarity")
    independent = False

    def __post_init__(self):
        super().__post_init__()
        self.prepare_texts(self.texts)
        self._rerank = self.settings.k_test if self.rerank is None else self.rerank
        asked = {"texts": list(self.texts), "top": self.top, "rerank": self._rerank}
        self.given = {**asked, "itc_weight": self.settings.itc_weight}

    def prepare(self):
        self._encoded = self.encode_texts(self.texts)
        self._best = torch.empty(len(self.texts), 0)  # similarities of the best so far

    def _predict(self, files, video):
        visuals = self.model.encode_visual({"video": video})
        similarity = (self._encoded.feat.float() @ visuals.feat.float().t()).cpu()
        best = torch.cat([self._best, similarity], dim=1)
        self._best = best.topk(min(max(self.top, self._rerank), best.shape[1]), dim=1).values
        kept = {
            (text, visual): {"text": text, "similarity": float(similarity[text, visual])}
            for text, visual in self._among_best(similarity, self._best.shape[1])
        }
        if judged := self._among_best(similarity, min(self._rerank, self._best.shape[1])):
            scores = self.match(self._encoded, visuals, torch.tensor(judged))
            values = scores.ranking.tolist(), scores.probability.tolist()
            for pair, ranking, probability in zip(judged, *values, strict=True):
                kept[pair].update(ranking=ranking, probability=probability)
        records = [[] for _ in files]
        for (_, visual), record in kept.items():
            records[visual].append(record)
        return records

    def _among_best(self, similarity: Tensor, number: int) -> list[tuple[int, int]]:
        """(text, visual input) pairs that are among so many best ones of the text so far."""
        if not number:
            return []
        least = self._best[:, number - 1 : number]
        # a similarity that is not a number is kept, and then refused
        return [(t, v) for t, v in (~(similarity < least)).nonzero().tolist()]

    def finish(self, by_file):
        found = [[] for _ in self.texts]
        for file, records in by_file.items():
            for record in records:
                found[record["text"]].append({**record, "file": file})
        rows = []
        for text, candidates in zip(self.texts, found, strict=True):
            candidates.sort(key=lambda record: -record["similarity"])
            judged = sorted(candidates[: self._rerank], key=lambda record: -record["ranking"])
            # the matching head also judged files that more similar ones displaced
            rest = [{**record, "probability": None} for record in candidates[self._rerank :]]
            for rank, best in enumerate([*judged, *rest][: self.top], 1):
                scores = {key: best[key] for key in ("probability", "similarity")}
                rows.append({"text": text, "rank": rank, "file": best["file"], **_rounded(scores)})
        return rows
