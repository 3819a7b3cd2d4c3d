"""Pictures of runs: curves, clips, and methods compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from torch import Tensor
from torchvision.utils import make_grid

PLAIN = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@dataclass
class Cell:
    """A clip in a picture: (3, frames, H, W) with values in 0..1, text above it, a frame."""

    clip: Tensor
    text: str = ""
    framed: bool = False


@plt.rc_context(PLAIN)
def plot_curves(log: Path, metric: str, picture: Path) -> None:
    """Losses and a validation metric over epochs, from a runner's ``log.txt``."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, split in zip(grid, ("train", "val"), strict=True):
        records = [line for line in lines if f"{split}_epoch" in line]
        epochs = [record[f"{split}_epoch"] + 1 for record in records]
        for key in records[0]:
            if key.startswith("train_loss") or key == f"val_{metric}":
                values = [record[key] for record in records]
                axes.plot(epochs, values, marker=".", label=key.removeprefix(f"{split}_"))
        axes.set(xlabel="epoch", ylabel=split)
        axes.set_ylim(bottom=0)
        axes.legend()
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
            frames = cell.clip.clamp(0, 1).transpose(0, 1)
            sheet = make_grid(frames, nrow=(len(frames) + 1) // 2, padding=0)
            axes.imshow(sheet.permute(1, 2, 0))
            axes.set_title(cell.text, loc="left", fontsize=9)
            if cell.framed:
                axes.spines[:].set(color="tab:green", linewidth=5)
    figure.suptitle(title)
    _save(figure, picture)


@plt.rc_context(PLAIN)
def plot_comparison(rows: Sequence[Mapping[str, Any]], metric: str, picture: Path) -> None:
    """A metric against trained parameters, a point a method; a line, if it trains nothing.

    Args:
        rows: of a comparison's report.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    drawn: Counter[float] = Counter()
    for index, row in enumerate(rows):
        name, parameters, mean = row["method"], row["trained parameters"], row[metric]
        if mean is None or parameters is None:
            continue
        if parameters == 0:
            axes.axhline(mean, color="grey", linestyle=":", label=name)
            continue
        # side by side, where methods train as many
        x = parameters * 1.025 ** drawn[parameters]
        drawn[parameters] += 1
        style = f"C{index % 10}{'osD^vP*X<>'[index // 10 % 10]}"
        axes.errorbar(x, mean, row[f"{metric} std"] or 0, fmt=style, capsize=3, label=name)
    title = "mean ± standard deviation over seeds"
    axes.set(xlabel="trained parameters", ylabel=metric, xscale="log", title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    _save(figure, picture)


def _save(figure: Any, picture: Path) -> None:
    figure.savefig(picture, dpi=130)
    plt.close(figure)
