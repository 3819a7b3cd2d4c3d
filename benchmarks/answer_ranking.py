"""Ranking of VQA's answers: ours beside LAVIS's, on the same model and questions.

``lavis``: LAVIS's own ``BlipVQA._rank_answers``, every candidate decoded whole and padded to the
longest; ``ours``: ``lavis_uniadapter.evaluation.answer_ranking``. Both with the adapters active and
with the questions encoded beforehand, so that ranking alone is timed.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from lavis.models.blip_models.blip_vqa import BlipVQA

from benchmarks import measuring
from benchmarks.arithmetic import Text
from benchmarks.models import WORDS, build, random_captions

VOCABULARY = 20000


def tokenizer_folder(folder: str) -> str:
    """A vocabulary as large as BERT's, of words of one token each."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*WORDS, *(f"word{i}" for i in range(VOCABULARY))]
    Path(folder, "vocab.txt").write_text("\n".join([*special, *words]) + "\n")
    return folder


def answer_list(number: int, longest: int, seed: int) -> list[str]:
    """Different answers of the lengths that VQAv2's list has, about: most of one token."""
    picker = random.Random(seed)
    words = iter(picker.sample(range(VOCABULARY), VOCABULARY))
    lengths = picker.choices((1, 2, 3, longest), (70, 20, 8, 2), k=number - 1)
    return [" ".join(f"word{next(words)}" for _ in range(n)) for n in (longest, *lengths)]


@torch.no_grad()
def run(args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_folder(folder)
        model = build(
            "blip_uniadapter_vqa", "vqav2", args.device, image_size=32, tokenizer=tokenizer
        ).eval()
    answers = answer_list(args.answers, args.longest, args.seed)
    samples = {
        "image": torch.randn(args.questions, 3, 32, 32, device=args.device),
        "text_input": random_captions(args.questions, args.seed),
    }
    encoded = model.forward_encoder(samples)
    model.forward_encoder = lambda samples: encoded  # given
    chosen = {}

    def rank(peer: str, method) -> float:
        def work() -> None:
            chosen[peer] = method(model, samples, answers, args.candidates)

        return measuring.seconds(work, args.device)

    methods = {"lavis": BlipVQA._rank_answers, "ours": type(model)._rank_answers}
    model._rank_answers(samples, answers, args.candidates)  # tokenises the list, once
    peers = {name: partial(rank, name, method) for name, method in methods.items()}
    with measuring.Limits(args.device) as limits:
        times = measuring.interleaved(peers, args.repeats)

    question_length = encoded[0].last_hidden_state.shape[1]
    lengths = [len(ids) for ids in model.tokenizer(answers).input_ids]
    flops = gflop(args, question_length, lengths)
    median = {peer: taken["median"] for peer, taken in times.items()}
    return {
        "machine": measuring.machine(args.device),
        "questions": args.questions,
        "question_tokens": question_length,
        "answers": args.answers,
        "candidates": args.candidates,
        "longest_answer_tokens": max(lengths),
        "mean_answer_tokens": statistics.mean(lengths),
        "seconds": times,
        "gflop": flops,
        **limits.rates,
        "share_of_limit": {p: limits.share(p, flops[p], median[p]) for p in peers},
        "faster": median["lavis"] / median["ours"],
        "same_answers": chosen["lavis"] == chosen["ours"],
    }


def gflop(args, question_length: int, answer_lengths: list[int]) -> dict[str, float]:
    """What each peer's shapes need."""
    text, pairs = Text(), args.questions * args.candidates
    project = text.keys_and_values(question_length)

    def decode(positions: float) -> float:
        words = text.words(1) * positions
        return text.attend(positions, question_length) + text.adapters(positions) + words

    first_token = args.questions * (project + decode(1))
    return {
        "lavis": first_token + pairs * (project + decode(max(answer_lengths))),
        "ours": first_token + pairs * decode(statistics.mean(answer_lengths) - 2),
    }


def report(result: dict) -> None:
    measuring.print_table(
        ("peer", "seconds", "GFLOP", "share of limit"),
        [
            (n, taken["median"], result["gflop"][n], f"{100 * result['share_of_limit'][n]:.0f}%")
            for n, taken in result["seconds"].items()
        ],
    )
    print(f"ours {result['faster']:.1f} times as fast; same answers: {result['same_answers']}")


def main() -> None:
    options = measuring.parser(__doc__)
    options.add_argument("--questions", type=int, default=8)
    options.add_argument("--answers", type=int, default=3129, help="of the list")
    options.add_argument("--candidates", type=int, default=128)
    options.add_argument("--longest", type=int, default=8, help="tokens of the longest answers")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    result = run(args)
    report(result)
    print("\nwritten:", measuring.save("answer_ranking", result, args.output))


if __name__ == "__main__":
    main()
