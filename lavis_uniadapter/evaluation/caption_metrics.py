"""Caption scores of COCO's evaluation (``pycocoevalcap``), against any data set's references."""

from __future__ import annotations

import functools
import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

logger = logging.getLogger(__name__)

# COCO's tokenizer spells brackets out, and keeps them: it drops them in capitals alone.
DROPPED = {*PUNCTUATIONS, '"'}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")


def has_java() -> bool:
    """Whether COCO's tokenizer and METEOR can run."""
    return _runs(shutil.which("java"))


@functools.cache
def _runs(java: str | None) -> bool:
    # a stub may be all there is: macOS has one that asks to install Java
    return (
        java is not None and not subprocess.run([java, "-version"], capture_output=True).returncode
    )


def caption_metrics(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, times 100.

    With Java they are those of COCO's evaluation server. Without, METEOR is left out, and texts
    are split into words by rules close to those of the Penn Treebank; the log says so.

    Args:
        captions: one an item, at least one.
        references: at least one for each item.

    Raises:
        RuntimeError: if Java is there and its tokenizer fails.
    """
    java = has_java()
    split = tokenise_by_java if java else tokenise
    if not java:
        logger.warning(
            "Java is not installed: METEOR is left out, and words are split by this package's "
            "rules instead of COCO's, which may move the other scores by a few tenths."
        )
    hypotheses = [[text] for text in split(captions)]
    flat = iter(split([text for texts in references for text in texts]))
    truths = [[next(flat) for _ in texts] for texts in references]
    results, truth = dict(enumerate(hypotheses)), dict(enumerate(truths))

    bleu, _ = Bleu(4).compute_score(truth, results, verbose=0)
    metrics = {f"bleu_{n}": value for n, value in enumerate(bleu, start=1)}
    if java:
        metrics["meteor"], _ = Meteor().compute_score(truth, results)
    metrics["rouge_l"], _ = Rouge().compute_score(truth, results)
    metrics["cider"], _ = Cider().compute_score(truth, results)
    return {name: 100 * float(value) for name, value in metrics.items()}


def tokenise_by_java(texts: Sequence[str]) -> list[str]:
    """Words by COCO's tokenizer, which is Stanford's, in lower case without punctuation.

    Run here and not by ``pycocoevalcap``'s PTBTokenizer, which writes into its own package folder.

    Raises:
        RuntimeError: if it fails or does not give a line a text.
    """
    # It works line by line, so white space of any kind must not break one.
    lines = [" ".join(text.split()) for text in texts]
    done = subprocess.run(
        [
            *(
                "java",
                "-cp",
                str(Path(ptbtokenizer.__file__).with_name(STANFORD_CORENLP_3_4_1_JAR)),
            ),
            *("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"),
            *("-encoding", "utf-8"),
        ],
        input="".join(f"{line}\n" for line in lines).encode(),
        capture_output=True,
    )
    tokenised = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(tokenised) != len(lines):
        raise RuntimeError(
            f"COCO's tokenizer gave {len(tokenised)} lines for {len(lines)} captions. Check that "
            f"'java -version' works. {done.stderr.decode(errors='replace')[-500:]}"
        )
    return [
        " ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in tokenised
    ]


def tokenise(texts: Sequence[str]) -> list[str]:
    """Words in lower case without punctuation, contractions split as in the Penn Treebank."""
    return [" ".join(_words(text.lower())) for text in texts]


def _words(text: str) -> list[str]:
    text = re.sub(r"n't\b", " n't", text)
    text = re.sub(r"('(?:s|m|d|re|ve|ll))\b", r" \1", text)
    tokens = re.findall(r"n't|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:]\d+)+|\w+(?:[-.]\w+)*|[^\w\s]", text)
    return [BRACKETS.get(token, token) for token in tokens if token not in DROPPED]
