"""The table and the plot of a comparison."""

from __future__ import annotations

import csv
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.runners import run_folders
from lavis_uniadapter.tools.compare.intervals import paired_difference
from lavis_uniadapter.tools.compare.running import Line


def rows_of(
    lines: Sequence[Line], metrics: Sequence[str], reference: str | None = None
) -> list[dict[str, Any]]:
    """A row a line: means over seeds, sample standard deviations, and differences."""
    rows = []
    others = next((line.runs for line in lines if line.name == reference), [])
    for line in lines:
        runs = line.runs
        row: dict[str, Any] = {
            "method": line.name,
            "seeds": len(runs),
            "learning rate": line.learning_rate,
            "at edge of grid": line.at_edge,
            "trained parameters": runs[0].trained_parameters if runs else None,
            "total parameters": runs[0].total_parameters if runs else None,
        }
        for name in metrics:
            values = [run.metrics.get(name) for run in runs]
            row[name] = _average(statistics.fmean, values)
            row[f"{name} std"] = _average(statistics.stdev, values, at_least=2)
            compared = None if line.name == reference else paired_difference(runs, others, name)
            for part in ("mean", "low", "high"):
                row[f"{name} difference {part}"] = compared and getattr(compared, part)
        row["seconds"] = _average(statistics.fmean, [run.seconds for run in runs])
        row["peak bytes"] = _average(statistics.fmean, [run.peak_bytes for run in runs])
        row["precision"] = ", ".join(sorted({run.precision for run in runs if run.precision}))
        row["untrained"] = any(run.untrained for run in runs)
        row["failures"] = "; ".join(line.failures)
        rows.append(row)
    return rows


def _average(
    of: Callable[[list[float]], float], values: Sequence[float | None], at_least: int = 1
) -> float | None:
    known = [value for value in values if value is not None]
    return of(known) if len(known) >= at_least else None


def markdown_table(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], reference: str | None = None
) -> str:
    """The rows as a table, and below it what needs attention."""
    parts = [f"{metrics[0]} difference {part}" for part in ("mean", "low", "high")]
    compared = any(row[parts[0]] is not None for row in rows)
    header = ["method", "learning rate", "trained", "share", *metrics]
    header += [f"{metrics[0]} - {reference}'s [95%]"] if compared else []
    table = [[*header, "seeds", "min", "peak GB", "precision"], ["---"] * (len(header) + 4)]
    for row in rows:
        trained, total = row["trained parameters"], row["total parameters"]
        cells = [
            row["method"],
            _cell("{:g}", row["learning rate"]) + "*" * row["at edge of grid"],
            _cell("{:,}", trained),
            _cell("{:.2%}", trained / total if total else None),
        ]
        cells += [_cell("{:.1f}", row[m]) + _cell(" ± {:.1f}", row[f"{m} std"]) for m in metrics]
        if compared:
            cells.append(_cell("{:+.1f} [{:+.1f}, {:+.1f}]", *(row[part] for part in parts)))
        cells.append(str(row["seeds"]))
        cells.append(_cell("{:.1f}", row["seconds"] and row["seconds"] / 60))
        cells.append(_cell("{:.2f}", row["peak bytes"] and row["peak bytes"] / 1e9))
        table.append([*cells, row["precision"]])
    notes = ["| " + " | ".join(cells) + " |" for cells in table]
    if any(row["at edge of grid"] for row in rows):
        notes += ["", "\\* the best learning rate is the smallest or largest that was tried"]
    if untrained := ", ".join(row["method"] for row in rows if row["untrained"]):
        notes += ["", f"No adapter was trained or given, so the start is scored: {untrained}"]
    failures = [f"- {row['method']}: {row['failures']}" for row in rows if row["failures"]]
    return "\n".join(notes + (["", "Failed:", "", *failures] if failures else []))


def _cell(template: str, *values: float | None) -> str:
    return "" if None in values else template.format(*values)


def write_report(
    lines: Sequence[Line], metrics: Sequence[str], folder: Path, reference: str | None = None
) -> str:
    """Write ``comparison.{md,csv,json,png}``; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(lines, metrics, reference)
    table = markdown_table(rows, metrics, reference)
    (folder / "comparison.md").write_text(table + "\n")
    with open(folder / "comparison.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_json(folder / "comparison.json", rows)
    _plot(rows, metrics[0], folder / "comparison.png")
    return table


def _plot(rows: Sequence[Mapping[str, Any]], metric: str, picture: Path) -> None:
    """A metric against trained parameters, a point a method; a line, if it trains nothing."""
    figure = Figure((7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn: Counter[float] = Counter()
    for index, row in enumerate(rows):
        name, parameters, mean = row["method"], row["trained parameters"], row[metric]
        if parameters == 0 and mean is not None:
            axes.axhline(mean, color="grey", linestyle=":", label=name)
        elif parameters and mean is not None:
            # side by side, where methods train as many
            x = parameters * 1.025 ** drawn[parameters]
            drawn[parameters] += 1
            style = f"C{index % 10}{'osD^vP*X<>'[index // 10 % 10]}"
            axes.errorbar(x, mean, row[f"{metric} std"] or 0, fmt=style, capsize=3, label=name)
    title = "mean ± standard deviation over seeds"
    axes.set(xlabel="trained parameters", ylabel=metric, xscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(picture, dpi=130)


def added_lines(added: Sequence[str]) -> list[Line]:
    """Lines of finished runs, each given as NAME=FOLDER, by name; or a ConfigError."""
    lines: dict[str, Line] = {}
    for item in added:
        name, equals, folder = item.partition("=")
        if not equals:
            raise ConfigError(f"--add {item!r} is not NAME=FOLDER.")
        try:
            summary = run_folders.read(Path(folder))
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from error
        lines.setdefault(name, Line(name)).runs.append(summary)
    return list(lines.values())
