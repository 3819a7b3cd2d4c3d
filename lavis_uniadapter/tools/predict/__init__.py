"""Captions, answers and matches for folders of images and clips, with their scores."""

from lavis_uniadapter.tools.predict.predictors import Captioner, Matcher, QuestionAnswerer
from lavis_uniadapter.tools.predict.running import Summary, predict

__all__ = ["Captioner", "Matcher", "QuestionAnswerer", "Summary", "predict"]
