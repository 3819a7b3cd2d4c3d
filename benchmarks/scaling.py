"""How the second stage of retrieval evaluation grows: with visual inputs, with texts and with k.

Each is doubled three times while the others stay. BLIP base, one frame of 224 px, features given.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader

from benchmarks import measuring
from benchmarks.models import our_retrieval, random_captions
from benchmarks.retrieval_evaluation import Gallery, give_features, timed_rerank

TOKENS = 197


def main() -> None:
    options = measuring.parser(__doc__)
    options.add_argument("--smallest", type=int, default=8, help="visual inputs, texts")
    options.add_argument("--k", type=int, default=4, help="the smallest")
    args = options.parse_args()
    model = our_retrieval(224, frame_aware=False, device=args.device)
    most = 8 * args.smallest
    embeds = torch.randn(most, TOKENS, 768, generator=torch.Generator().manual_seed(0))
    give_features(model, None, embeds, frames=1)

    def once(visuals: int, texts: int, k: int):
        def measure() -> float:
            gallery = Gallery(visuals, seed=0)
            gallery.text = random_captions(texts, seed=1)
            seconds, pairs, _ = timed_rerank(model, DataLoader(gallery, 8), k, 0.0, args.device)
            counts[visuals, texts, k] = pairs
            return seconds

        return measure

    counts: dict[tuple[int, int, int], int] = {}
    base = {"visuals": args.smallest, "texts": args.smallest, "k": args.k}
    lines = {}
    for what, start in base.items():
        # the others large enough that k candidates exist throughout
        others = most if what == "k" else 2 * args.smallest
        fixed = {"visuals": others, "texts": others, "k": args.k}
        settings = [{**fixed, what: start * factor} for factor in (1, 2, 4, 8)]
        peers = {str(s[what]): once(**s) for s in settings}
        times = measuring.interleaved(peers, args.repeats)
        lines[what] = [
            {**s, "pairs": counts[tuple(s.values())], "seconds": times[str(s[what])]["median"]}
            for s in settings
        ]
        print()
        measuring.print_table(
            (what, "pairs", "seconds"),
            [(str(row[what]), row["pairs"], row["seconds"]) for row in lines[what]],
        )
    result = {"machine": measuring.machine(args.device), "lines": lines}
    path = measuring.save("scaling", result, args.output)
    plot(lines, path.with_suffix(".png"))
    print("written:", path, path.with_suffix(".png"))


def plot(lines: dict[str, list[dict]], picture: Path) -> None:
    """A panel for each of what was doubled, all to one scale of seconds."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", sharey=True)
    for axes, (what, rows) in zip(panels, lines.items(), strict=True):
        axes.plot([row[what] for row in rows], [row["seconds"] for row in rows], marker="o")
        axes.set(xlabel=what, xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.05 * max(row["seconds"] for rows in lines.values() for row in rows))
    panels[0].set_ylabel("seconds, second stage")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
