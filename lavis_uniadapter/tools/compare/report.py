"""The table and the plot of a comparison."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.runners import run_folders
from lavis_uniadapter.tools.compare.intervals import paired_difference
from lavis_uniadapter.tools.compare.running import Line
from lavis_uniadapter.tools.figures import plot_comparison


def rows_of(
    lines: Sequence[Line], metrics: Sequence[str], reference: str | None = None
) -> list[dict[str, Any]]:
    """A row a line: means over seeds, sample standard deviations, and paired differences.

    Args:
        reference: name of the line that differences are taken from.
    """
    rows = []
    reference_runs = next((line.runs for line in lines if line.name == reference), [])
    for line in lines:
        row: dict[str, Any] = {"method": line.name, "seeds": len(line.runs)}
        row["learning rate"] = line.learning_rate
        row["at edge of grid"] = line.at_edge
        first = line.runs[0] if line.runs else None
        row["trained parameters"] = first.trained_parameters if first else None
        row["total parameters"] = first.total_parameters if first else None
        for name in metrics:
            values = [value for run in line.runs if (value := run.metric(name)) is not None]
            row[name] = statistics.fmean(values) if values else None
            row[f"{name} std"] = statistics.stdev(values) if len(values) > 1 else None
            difference = None
            if line.name != reference:
                difference = paired_difference(line.runs, reference_runs, name)
            for part in ("mean", "low", "high"):
                row[f"{name} difference {part}"] = difference and getattr(difference, part)
        for name, values in (
            ("seconds", [run.seconds for run in line.runs]),
            ("peak bytes", [run.peak_bytes for run in line.runs]),
        ):
            known = [value for value in values if value is not None]
            row[name] = statistics.fmean(known) if known else None
        row["precision"] = ", ".join(sorted({run.precision for run in line.runs if run.precision}))
        row["failures"] = "; ".join(line.failures)
        rows.append(row)
    return rows


def markdown_table(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], reference: str | None = None
) -> str:
    compared = f"{metrics[0]} - {reference}'s [95%]"
    has_differences = any(row[f"{metrics[0]} difference mean"] is not None for row in rows)
    header = ["method", "learning rate", "trained", "share", *metrics]
    header += [*([compared] if has_differences else []), "seeds", "min", "peak GB"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        trained, total = row["trained parameters"], row["total parameters"]
        rate = row["learning rate"]
        cells = [
            row["method"],
            "" if rate is None else f"{rate:g}" + ("*" if row["at edge of grid"] else ""),
            "" if trained is None else f"{trained:,}",
            f"{100 * trained / total:.2f}%" if trained is not None and total else "",
            *(_mean_and_deviation(row[name], row[f"{name} std"]) for name in metrics),
            *([_interval(row, metrics[0])] if has_differences else []),
            str(row["seeds"]),
            "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
            "" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["at edge of grid"] for row in rows):
        lines += ["", "\\* the best learning rate is the smallest or largest that was tried"]
    known = [(row["method"], row["precision"]) for row in rows if row["precision"]]
    if len({one for _, precision in known for one in precision.split(", ")}) > 1:
        each = "; ".join(f"{method} in {precision}" for method, precision in known)
        lines += ["", f"Not all runs computed in the same precision: {each}."]
    failures = [f"- {row['method']}: {row['failures']}" for row in rows if row["failures"]]
    return "\n".join(lines + (["", "Failed:", "", *failures] if failures else []))


def _mean_and_deviation(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _interval(row: Mapping[str, Any], metric: str) -> str:
    mean, low, high = (row[f"{metric} difference {part}"] for part in ("mean", "low", "high"))
    return "" if mean is None else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


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
    first = metrics[0]
    points = {
        row["method"]: (row["trained parameters"], row[first], row[f"{first} std"] or 0.0)
        for row in rows
        if row[first] is not None and row["trained parameters"] is not None
    }
    if points:
        plot_comparison(points, first, folder / "comparison.png")
    return table


def added_lines(added: Sequence[str]) -> list[Line]:
    """Lines of finished runs' folders, given as NAME=FOLDER; of one name, seeds of one line.

    Raises:
        ConfigError: naming what is no such pair, or a folder without a finished run.
    """
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
