"""Pictures of runs: curves, clips, and methods compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from torch import Tensor


@dataclass
class Cell:
    """A clip in a picture: (3, frames, H, W) with values in 0..1, text above it, a frame."""

    clip: Tensor
    text: str = ""
    framed: bool = False


def plot_curves(log: Path, metrics: Sequence[str], picture: Path) -> None:
    """Losses and validation metrics over epochs, from a runner's ``log.txt``."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    train = [line for line in lines if "train_epoch" in line]
    val = [line for line in lines if "val_epoch" in line]
    losses = [key for key in train[0] if key.startswith("train_loss")]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for one, records, split, keys in (
        (axes[0], train, "train_", losses),
        (axes[1], val, "val_", [f"val_{name}" for name in metrics]),
    ):
        epochs = [record[f"{split}epoch"] + 1 for record in records]
        for key in keys:
            values = [record[key] for record in records]
            one.plot(epochs, values, marker=".", label=key.removeprefix(split))
        one.set(xlabel="epoch", ylabel="training" if one is axes[0] else "validation")
        one.set_ylim(bottom=0)
        _finish(one)
    _save(figure, picture)


def plot_clips(rows: Sequence[Sequence[Cell]], picture: Path, title: str) -> None:
    """A sheet of clips, each as its frames in two rows."""
    columns = max(map(len, rows))
    size = (2.4 * columns, (1.6 + 0.1 * max(c.text.count("\n") for c in rows[0])) * len(rows))
    figure, grid = plt.subplots(
        len(rows), columns, figsize=size, layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("none")
    for row, cells in zip(grid, rows, strict=True):
        for axes, cell in zip(row, cells, strict=False):
            axes.imshow(_contact_sheet(cell.clip))
            axes.set_title(cell.text, loc="left", fontsize=9)
            if cell.framed:
                axes.spines[:].set(color="tab:green", linewidth=5)
    figure.suptitle(title)
    _save(figure, picture)


def _contact_sheet(clip: Tensor) -> np.ndarray:
    """Frames of a (3, T, H, W) clip in two rows, as a (2H, T/2 W, 3) picture."""
    frames = clip.permute(1, 2, 3, 0).clamp(0, 1).numpy()
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    half = len(frames) // 2
    rows = [np.concatenate(list(part), axis=1) for part in (frames[:half], frames[half:])]
    return np.concatenate(rows, axis=0)


def plot_comparison(
    points: Mapping[str, tuple[float, float, float]], metric: str, picture: Path
) -> None:
    """A metric against trained parameters, a point a method.

    Args:
        points: by method (trained parameters, mean, standard deviation); methods that train
            nothing are drawn as a line across.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    drawn: Counter[float] = Counter()
    for index, (name, (parameters, mean, deviation)) in enumerate(points.items()):
        if not parameters:
            axes.axhline(mean, color="grey", linestyle=":", label=name)
            continue
        # side by side, where methods train as many
        x = parameters * 1.025 ** drawn[parameters]
        drawn[parameters] += 1
        style = f"C{index % 10}{'osD^vP*X<>'[index // 10 % 10]}"
        axes.errorbar(x, mean, deviation, fmt=style, capsize=3, label=name)
    title = "mean ± standard deviation over seeds"
    axes.set(xlabel="trained parameters", ylabel=metric, xscale="log", title=title)
    _finish(axes)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    _save(figure, picture)


def _finish(axes) -> None:
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure, picture: Path) -> None:
    figure.savefig(picture, dpi=130)
    plt.close(figure)
