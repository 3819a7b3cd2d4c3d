"""Ranking of VQA's answers: ours beside LAVIS's, on the same model and questions.

``lavis``: LAVIS's own ``BlipVQA._rank_answers``, every candidate decoded whole and padded to the
longest; ``ours``: ``lavis_uniadapter.evaluation.answer_ranking``. Both with the adapters active and
with the questions encoded beforehand, so that ranking alone is timed.
"""

from __future__ import annotations

import random
import tempfile
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

    seen = {}

    def rank(method):
        def once() -> float:
            return measuring.seconds(
                lambda: seen.update({method: method(model, samples, answers, args.candidates)}),
                args.device,
            )

        return once

    peers = {"lavis": BlipVQA._rank_answers, "ours": type(model)._rank_answers}
    model._rank_answers(samples, answers, args.candidates)  # tokenises the list, once
    rate = measuring.matmul_rate(args.device)
    times = measuring.interleaved({n: rank(m) for n, m in peers.items()}, args.repeats)
    rate = (rate + measuring.matmul_rate(args.device)) / 2

    text = Text()
    question_length = encoded[0].last_hidden_state.shape[1]
    lengths = [len(ids) for ids in model.tokenizer(answers).input_ids]
    padded, mean = max(lengths), sum(lengths) / len(lengths)
    pairs = args.questions * args.candidates
    project = text.keys_and_values(question_length)

    def decode(positions: float) -> float:
        words = text.words(1) * positions
        return text.attend(positions, question_length) + text.adapters(positions) + words

    gflop = {
        "lavis": args.questions * (project + decode(1)) + pairs * (project + decode(padded)),
        "ours": args.questions * (project + decode(1)) + pairs * decode(mean - 2),
    }
    result = {
        "machine": measuring.machine(args.device),
        "questions": args.questions,
        "question_tokens": question_length,
        "answers": args.answers,
        "candidates": args.candidates,
        "longest_answer_tokens": padded,
        "mean_answer_tokens": mean,
        "seconds": times,
        "gflop": gflop,
        "matmul_gflop_per_s": rate,
        "share_of_limit": {n: gflop[n] / rate / times[n]["median"] for n in peers},
        "faster": times["lavis"]["median"] / times["ours"]["median"],
        "same_answers": seen[peers["lavis"]] == seen[peers["ours"]],
    }
    measuring.print_table(
        ("peer", "seconds", "GFLOP", "share of limit"),
        [
            (n, times[n]["median"], gflop[n], f"{100 * result['share_of_limit'][n]:.0f}%")
            for n in peers
        ],
    )
    print(f"ours {result['faster']:.1f} times as fast; same answers: {result['same_answers']}")
    return result


def main() -> None:
    options = measuring.parser(__doc__)
    options.add_argument("--questions", type=int, default=8)
    options.add_argument("--answers", type=int, default=3129, help="of the list")
    options.add_argument("--candidates", type=int, default=128)
    options.add_argument("--longest", type=int, default=8, help="tokens of the longest answers")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    print("\nwritten:", measuring.save("answer_ranking", run(args), args.output))


if __name__ == "__main__":
    main()
