"""Caption scores of COCO's evaluation (``pycocoevalcap``), against any dataset's references."""

from __future__ import annotations

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

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")

# COCO's tokenizer spells brackets out and keeps them: its list of punctuation has them in capitals.
DROPPED = {*PUNCTUATIONS, '"'}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
SUFFIX = r"'(?:s|m|d|re|ve|ll)\b"
WORD = re.compile(rf"n't|{SUFFIX}|\d+(?:[.,:]\d+)+|\w+(?:[-.]\w+)*|[^\w\s]")


def has_java() -> bool:
    """Whether COCO's tokenizer and METEOR can run; macOS has a stub that asks to install Java."""
    java = shutil.which("java")
    return (
        java is not None
        and not subprocess.run([java, "-version"], capture_output=True, check=False).returncode
    )


def caption_metrics(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, times 100.

    With Java they are those of COCO's evaluation server. Without it METEOR is left out, and words
    are split by rules close to those of the Penn Treebank.

    Args:
        references: at least one for each caption.

    Raises:
        RuntimeError: if Java is installed and COCO's tokenizer fails.
    """
    java = has_java()
    split = tokenise_by_java if java else tokenise
    if not java:
        logger.warning(
            "Java is not installed: METEOR is left out, and words are split by this package's "
            "rules instead of COCO's, which may change the other scores by a few tenths."
        )
    results = {i: [text] for i, text in enumerate(split(captions))}
    flat = iter(split([text for texts in references for text in texts]))
    truth = {i: [next(flat) for _ in texts] for i, texts in enumerate(references)}

    bleu, _ = Bleu(4).compute_score(truth, results, verbose=0)
    metrics = {f"bleu_{n}": value for n, value in enumerate(bleu, start=1)}
    scorers = {"meteor": Meteor} if java else {}
    for name, scorer in (scorers | {"rouge_l": Rouge, "cider": Cider}).items():
        metrics[name], _ = scorer().compute_score(truth, results)
    return {name: 100 * float(value) for name, value in metrics.items()}


def tokenise_by_java(texts: Sequence[str]) -> list[str]:
    """Words in lower case without punctuation, by COCO's tokenizer (Stanford's).

    ``pycocoevalcap``'s PTBTokenizer is not used: it writes into its own package folder.
    """
    # The tokenizer works line by line, so white space of any kind must not break a line.
    lines = [" ".join(text.split()) for text in texts]
    jar = Path(ptbtokenizer.__file__).with_name(STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    tokenised = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(tokenised) != len(lines):
        raise RuntimeError(
            f"COCO's tokenizer returned {len(tokenised)} lines for {len(lines)} captions. Check "
            f"that 'java -version' works. {done.stderr.decode(errors='replace')[-500:]}"
        )
    return [
        " ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in tokenised
    ]


def tokenise(texts: Sequence[str]) -> list[str]:
    """Words in lower case without punctuation, contractions split as in the Penn Treebank."""
    return [" ".join(_words(text.lower())) for text in texts]


def _words(text: str) -> list[str]:
    text = re.sub(rf"({SUFFIX})", r" \1", re.sub(r"n't\b", " n't", text))
    return [BRACKETS.get(word, word) for word in WORD.findall(text) if word not in DROPPED]
