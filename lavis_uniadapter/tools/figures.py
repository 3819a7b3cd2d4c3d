"""Pictures of a run: its curves, and what a retrieval model finds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from torch import Tensor


def plot_curves(log: Path, picture: Path, title: str) -> None:
    """Loss and R@1 over epochs, from a runner's ``log.txt``."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    train = [line for line in lines if "train_epoch" in line]
    val = [line for line in lines if "val_epoch" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for key in (k for k in train[0] if k.startswith("train_loss")):
        left.plot(
            [line["train_epoch"] + 1 for line in train],
            [line[key] for line in train],
            marker=".",
            label=key.removeprefix("train_"),
        )
    recalls = [k for k in (val[0] if val else {}) if k.endswith("_r1")]
    for key in recalls:
        right.plot(
            [line["val_epoch"] + 1 for line in val],
            [line[key] for line in val],
            marker=".",
            label=key.removeprefix("val_").replace("_", " "),
        )
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="validation R@1 (%)", ylim=(0, 100))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def plot_top_matches(
    clips: Mapping[int, Tensor],
    queries: Sequence[str],
    ranking: np.ndarray,
    right_answers: Sequence[int],
    picture: Path,
    title: str,
) -> None:
    """A sheet of text queries with their best-ranked clips, the right one framed.

    Args:
        clips: by gallery index, (3, frames, H, W) with values in 0..1.
        queries: one text a row.
        ranking: (queries, shown) gallery indices, best first.
        right_answers: the right gallery index of each query.
    """
    shown = ranking.shape[1]
    figure, grid = plt.subplots(
        len(queries),
        shown,
        figsize=(2.1 * shown, 1.45 * len(queries)),
        layout="constrained",
        squeeze=False,
    )
    for row, (query, best, right) in enumerate(zip(queries, ranking, right_answers, strict=True)):
        for column, index in enumerate(best):
            axes = grid[row, column]
            axes.imshow(_contact_sheet(clips[index]))
            axes.set(xticks=[], yticks=[])
            correct = index == right
            for spine in axes.spines.values():
                spine.set(color="tab:green" if correct else "none", linewidth=5)
        grid[row, 0].set_title(query, loc="left", fontsize=9)
    figure.suptitle(title)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def plot_described_clips(
    clips: Mapping[str, Tensor], lines: Mapping[str, Sequence[str]], picture: Path, title: str
) -> None:
    """A sheet of clips, each above what a model says of it.

    Args:
        clips: by name, (3, frames, H, W) with values in 0..1.
        lines: texts about each clip.
    """
    columns = min(3, len(clips))
    rows = -(-len(clips) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, clip) in zip(grid.flat, clips.items(), strict=False):
        axes.imshow(_contact_sheet(clip))
        axes.text(
            *(0, -0.06, "\n".join(lines[name])),
            transform=axes.transAxes,
            verticalalignment="top",
            fontsize=9,
        )
    figure.suptitle(title)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def _contact_sheet(clip: Tensor) -> np.ndarray:
    """Frames of a (3, T, H, W) clip in two rows, as an (2H, T/2 W, 3) picture."""
    frames = clip.permute(1, 2, 3, 0).clamp(0, 1).numpy()
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    half = len(frames) // 2
    rows = [np.concatenate(list(part), axis=1) for part in (frames[:half], frames[half:])]
    return np.concatenate(rows, axis=0)


def plot_comparison(
    points: Mapping[str, tuple[float, float, float]], metric: str, picture: Path, title: str
) -> None:
    """A metric against trained parameters, a point a method.

    Args:
        points: by method (trained parameters, mean, standard deviation); methods that train
            nothing are drawn as a line across.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    drawn: Counter[float] = Counter()
    for index, (name, (parameters, mean, deviation)) in enumerate(points.items()):
        colour = f"C{index % 10}"
        if not parameters:
            axes.axhline(mean, color="grey", linestyle=":", label=name)
            continue
        marker = "osD^vP*X<>"[index // 10 % 10]
        # side by side, where methods train as many
        beside = 1.025 ** drawn[parameters]
        drawn[parameters] += 1
        axes.errorbar(
            *(parameters * beside, mean, deviation),
            color=colour,
            marker=marker,
            linestyle="none",
            capsize=3,
            label=name,
        )
    axes.set(xlabel="trained parameters", ylabel=metric, xscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(picture, dpi=130)
    plt.close(figure)
