"""``python -m lavis_uniadapter.compare FILE``: run methods side by side, make a table and a plot.

The file lists configurations; each is run with several seeds, in a process of its own, with a
learning rate chosen on the validation split if the file gives a choice. Called again, it goes on
where it stopped. Folders of runs that finished elsewhere, LAVIS's own baselines included, join the
table by ``--add NAME=FOLDER``.

A file has these keys, of which ``cfg_path``, ``output_dir``, ``metrics`` and ``runs`` are needed:

    cfg_path: ../train/shapes_retrieval.yaml   # of every run; relative to this file
    output_dir: output/compare                 # relative to where the command is run
    metrics: [t2v_r1, v2t_r1]                  # of the test split; the first is plotted
    seeds: [1, 2, 3]
    options: [run.max_epoch=4]                 # for every run
    learning_rates: [3e-4, 1e-3, 3e-3]         # each run's is the best of these on validation
    tuning_seed: 0
    base: {cfg_path: ../train/shapes_pretrain.yaml}   # trained first; model.pretrained of all
    runs:
      uniadapter: {options: [model.tuning=uniadapter]}
      no PFA: {options: [model.adapter.frame_aware=False], learning_rate_of: uniadapter}
      zero-shot: {options: [model.tuning=full], evaluate: True}
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lavis_uniadapter import launch, run_folders
from lavis_uniadapter.errors import ConfigError, reject_unknown_keys
from lavis_uniadapter.figures import plot_comparison
from lavis_uniadapter.runner import BEST, LATEST

logger = logging.getLogger("lavis_uniadapter")

KEYS = (
    "cfg_path",
    "output_dir",
    "metrics",
    "seeds",
    "options",
    "learning_rates",
    "tuning_seed",
    "base",
    "runs",
)
RUN_KEYS = ("cfg_path", "options", "learning_rates", "learning_rate_of", "evaluate")
REQUEST = "request.json"
CONSOLE = "console.log"


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: a configuration, to be run with several seeds."""

    name: str
    cfg_path: Path
    options: tuple[str, ...]
    learning_rates: tuple[float, ...] = ()
    learning_rate_of: str | None = None
    evaluate: bool = False


@dataclass(frozen=True)
class Plan:
    """What a comparison file asks for."""

    output_dir: Path
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    base: Entry | None
    entries: tuple[Entry, ...]


@dataclass
class Line:
    """What came of an entry: its finished runs by seed, and what failed."""

    name: str
    learning_rate: float | None = None
    at_edge: bool = False
    runs: list[run_folders.RunSummary] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def read_plan(path: Path, options: Sequence[str] = (), output_dir: str | None = None) -> Plan:
    """Read a comparison file.

    Args:
        options: for every run, the base's included; they win over the file's.
        output_dir: instead of the file's.

    Raises:
        ConfigError: naming what is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"No comparison file '{path}'.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}' is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"'{path}' is not a mapping of {', '.join(KEYS)}.")
    reject_unknown_keys(content, KEYS, path.name)
    for key in ("output_dir", "metrics", "runs"):
        if not content.get(key):
            raise ConfigError(f"'{path}' has no {key}.")
    _check_types(content, path.name)

    def entry(name: str, section: Mapping[str, Any], common: Sequence[str]) -> Entry:
        reject_unknown_keys(section, RUN_KEYS, f"{path.name}: runs.{name}")
        _check_types(section, f"{path.name}: runs.{name}")
        cfg = section.get("cfg_path", content.get("cfg_path"))
        if not cfg or not (path.parent / cfg).is_file():
            raise ConfigError(f"'{path}': cfg_path of '{name}' is '{cfg}', which is no file.")
        of = section.get("learning_rate_of")
        evaluate = bool(section.get("evaluate", False))
        rates = section.get("learning_rates", content.get("learning_rates")) or ()
        return Entry(
            name=name,
            cfg_path=(path.parent / cfg).resolve(),
            options=(*common, *(section.get("options") or ()), *options),
            learning_rates=()
            if of or section.get("evaluate")
            else tuple(float(rate) for rate in rates),
            learning_rate_of=of,
            evaluate=evaluate,
        )

    entries = tuple(
        entry(name, section or {}, content.get("options") or ())
        for name, section in content["runs"].items()
    )
    by_name = {e.name: e for e in entries}
    for e in entries:
        if e.learning_rate_of and not by_name.get(e.learning_rate_of, e).learning_rates:
            raise ConfigError(
                f"'{path}': learning_rate_of '{e.learning_rate_of}' of '{e.name}' is no run with "
                "learning_rates."
            )
    if len({_slug(name) for name in by_name}) < len(entries):
        raise ConfigError(f"'{path}': two runs would have the same folder; rename one.")
    base = content.get("base")
    return Plan(
        output_dir=Path(output_dir or content["output_dir"]),
        metrics=tuple(content["metrics"]),
        seeds=tuple(content.get("seeds") or (42,)),
        tuning_seed=int(content.get("tuning_seed", 0)),
        base=entry("base", {**base, "learning_rates": []}, ()) if base else None,
        entries=entries,
    )


# What each key of a comparison file must be, where it is given.
TYPES = {
    "metrics": (list, "a list of names"),
    "seeds": (list, "a list of whole numbers"),
    "options": (list, "a list of section.key=value"),
    "learning_rates": (list, "a list of numbers"),
    "runs": (dict, "a mapping of names to what each runs"),
    "base": (dict, "a mapping with cfg_path and options"),
    "evaluate": (bool, "True or False"),
    "learning_rate_of": (str, "the name of a run"),
}


def _check_types(section: Mapping[str, Any], where: str) -> None:
    for key, (kind, description) in TYPES.items():
        if section.get(key) is not None and not isinstance(section[key], kind):
            raise ConfigError(f"{where}: {key} is {section[key]!r}; it must be {description}.")
    for name, run in (section.get("runs") or {}).items():
        if not isinstance(name, str) or not isinstance(run or {}, dict):
            raise ConfigError(f"{where}: runs.{name} must be a name and a mapping.")


class Comparison:
    """Carries a plan out; what has finished before is not run again.

    Args:
        plan: what to run.
        jobs: runs at a time; processor threads are divided among them.
        processes: of each run, by torchrun; 1: a plain process.
    """

    def __init__(self, plan: Plan, jobs: int = 1, processes: int = 1):
        self.plan = plan
        self.jobs = jobs
        self.processes = processes
        self._children: set[subprocess.Popen] = set()
        self._base_identity: str | None = None

    def run(self) -> list[Line]:
        """All runs of the plan; a failed one is a failure of its line, and the others go on.

        Raises:
            RuntimeError: if the base, on which all stand, cannot be trained.
        """
        lines = {entry.name: Line(entry.name) for entry in self.plan.entries}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                pretrained = self._train_base(pool)
                self._tune(pool, lines, pretrained)
                self._measure(pool, lines, pretrained)
            except BaseException:  # Ctrl-C among them
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self._children):
                    child.send_signal(signal.SIGTERM)
                raise
        return list(lines.values())

    def _train_base(self, pool) -> tuple[str, ...]:
        """Train what all runs start from, if the plan has a base; the option that names it."""
        base = self.plan.base
        if base is None:
            return ()
        folder = self.plan.output_dir / "base"
        seed = _seed_of(base.options)
        if failure := pool.submit(self._run, base, folder, seed, beside=1).result():
            raise RuntimeError(f"The base could not be trained: {failure}")
        self._base_identity = hashlib.sha256((folder / BEST).read_bytes()).hexdigest()
        return (f"model.pretrained={(folder / BEST).resolve()}",)

    def _tune(self, pool, lines: dict[str, Line], common: tuple[str, ...]) -> None:
        """Give each line the learning rate whose run is best on validation."""
        attempts = {
            (entry.name, rate): self._folder(entry, f"lr{rate:g}-seed{self.plan.tuning_seed}")
            for entry in self.plan.entries
            if len(entry.learning_rates) > 1
            for rate in entry.learning_rates
        }
        by_name = {entry.name: entry for entry in self.plan.entries}
        futures = {
            (name, rate): pool.submit(
                self._run,
                by_name[name],
                folder,
                self.plan.tuning_seed,
                (*common, f"run.init_lr={rate}", "run.test_splits=[]"),
            )
            for (name, rate), folder in attempts.items()
        }
        scores: dict[str, dict[float, float]] = {}
        for (name, rate), future in futures.items():
            if failure := future.result():
                lines[name].failures.append(f"learning rate {rate:g}: {failure}")
                continue
            best = run_folders.read(attempts[name, rate]).best
            if best is None:
                lines[name].failures.append(
                    f"learning rate {rate:g}: nothing was validated, set run.valid_splits"
                )
            else:
                scores.setdefault(name, {})[rate] = best
        for entry in self.plan.entries:
            line = lines[entry.name]
            if len(entry.learning_rates) == 1:
                line.learning_rate = entry.learning_rates[0]
            elif entry.name in scores:
                line.learning_rate = max(scores[entry.name], key=scores[entry.name].get)
                line.at_edge = line.learning_rate in (
                    min(entry.learning_rates),
                    max(entry.learning_rates),
                )
        for entry in self.plan.entries:
            if entry.learning_rate_of:
                source = lines[entry.learning_rate_of]
                lines[entry.name].learning_rate = source.learning_rate
                lines[entry.name].at_edge = source.at_edge

    def _measure(self, pool, lines: dict[str, Line], common: tuple[str, ...]) -> None:
        futures = []
        for entry in self.plan.entries:
            line = lines[entry.name]
            wants_rate = entry.learning_rates or entry.learning_rate_of
            if wants_rate and line.learning_rate is None:
                line.failures.append("no learning rate could be chosen")
                continue
            rate = () if line.learning_rate is None else (f"run.init_lr={line.learning_rate}",)
            seeds = (_seed_of(entry.options),) if entry.evaluate else self.plan.seeds
            for seed in seeds:
                folder = self._folder(entry, f"seed{seed}")
                futures.append(
                    (line, folder, pool.submit(self._run, entry, folder, seed, (*common, *rate)))
                )
        for line, folder, future in futures:
            if failure := future.result():
                line.failures.append(failure)
                continue
            summary = run_folders.read(folder)
            line.runs.append(summary)
            for name in self.plan.metrics:
                if summary.metric(name) is None:
                    known = ", ".join(summary.metrics) or "none"
                    line.failures.append(f"{folder.name} has no metric '{name}', only {known}")

    def _folder(self, entry: Entry, suffix: str) -> Path:
        return self.plan.output_dir / f"{_slug(entry.name)}-{suffix}"

    def _run(
        self,
        entry: Entry,
        folder: Path,
        seed: int,
        options: tuple[str, ...] = (),
        beside: int | None = None,
    ) -> str | None:
        """Run one configuration in its folder, or go on with it; what went wrong, or None.

        Args:
            beside: how many runs share the processor, this one included; None: ``jobs``.
        """
        options = (*entry.options, *options, f"run.seed={seed}")
        request = {
            "cfg": entry.cfg_path.read_text(),
            "options": list(options),
            "evaluate": entry.evaluate,
            "processes": self.processes,
            "base": self._base_identity,
        }
        folder.mkdir(parents=True, exist_ok=True)
        holds_something = run_folders.is_finished(folder) or (folder / LATEST).is_file()
        if holds_something and json.loads((folder / REQUEST).read_text()) != request:
            return (
                f"'{folder}' holds a run of another configuration. Delete it, or take another "
                "--output-dir."
            )
        run_folders.write_json(folder / REQUEST, request)
        if run_folders.is_finished(folder):
            logger.info("%s: finished before", folder.name)
            return None
        resumed = (folder / LATEST).is_file() and not entry.evaluate
        logger.info("%s: %s", folder.name, "goes on" if resumed else "starts")
        command = [sys.executable, "-m"]
        if self.processes > 1:
            command += ["torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={self.processes}", "-m"]
        command += ["lavis_uniadapter.launch", "--cfg-path", str(entry.cfg_path), "--options"]
        command += [*options, f"run.output_dir={folder.parent.resolve()}"]
        command += [f"run.job_id={folder.name}"]
        command += ["run.evaluate=True"] if entry.evaluate else []
        command += [f"run.resume_ckpt_path={(folder / LATEST).resolve()}"] if resumed else []
        threads = max(1, (os.cpu_count() or 1) // ((beside or self.jobs) * self.processes))
        with open(folder / CONSOLE, "ab") as console:
            start = console.tell()
            child = subprocess.Popen(
                command,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            self._children.add(child)
            status = child.wait()
            self._children.discard(child)
        if status == 0 and run_folders.is_finished(folder):
            summary = run_folders.read(folder)
            found = [(name, summary.metric(name)) for name in self.plan.metrics]
            shown = ", ".join(f"{name} {value:.2f}" for name, value in found if value is not None)
            logger.info("%s: done%s", folder.name, f", {shown}" if shown else "")
            return None
        with open(folder / CONSOLE, "rb") as console:
            console.seek(start)
            said = console.read().decode(errors="replace").strip().splitlines()
        reason = next((text for text in said if text.startswith("error: ")), said[-1:] or "")
        reason = reason if isinstance(reason, str) else reason[0]
        logger.info("%s: FAILED (exit %s), see %s", folder.name, status, folder / CONSOLE)
        return f"{folder.name}: exit {status}: {reason}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def _seed_of(options: Sequence[str]) -> int:
    given = [o.removeprefix("run.seed=") for o in options if o.startswith("run.seed=")]
    return int(given[-1]) if given else 42


# --- the table ----------------------------------------------------------------------------------


def rows_of(lines: Sequence[Line], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """A row a line: means over seeds, and sample standard deviations."""
    rows = []
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
        for name, values in (
            ("seconds", [run.seconds for run in line.runs]),
            ("peak bytes", [run.peak_bytes for run in line.runs]),
        ):
            known = [value for value in values if value is not None]
            row[name] = statistics.fmean(known) if known else None
        row["failures"] = "; ".join(line.failures)
        rows.append(row)
    return rows


def markdown_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    header = ["method", "learning rate", "trained", "share", *metrics, "seeds", "min", "peak GB"]
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
            str(row["seeds"]),
            "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
            "" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["at edge of grid"] for row in rows):
        lines += ["", "\\* the best learning rate is the smallest or largest that was tried"]
    failures = [f"- {row['method']}: {row['failures']}" for row in rows if row["failures"]]
    return "\n".join(lines + (["", "Failed:", "", *failures] if failures else []))


def _mean_and_deviation(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def write_report(lines: Sequence[Line], metrics: Sequence[str], folder: Path) -> str:
    """Write ``comparison.{md,csv,json,png}``; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(lines, metrics)
    table = markdown_table(rows, metrics)
    (folder / "comparison.md").write_text(table + "\n")
    with open(folder / "comparison.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run_folders.write_json(folder / "comparison.json", rows)
    points = {
        row["method"]: (
            row["trained parameters"],
            row[metrics[0]],
            row[f"{metrics[0]} std"] or 0.0,
        )
        for row in rows
        if row[metrics[0]] is not None and row["trained parameters"] is not None
    }
    if points:
        plot_comparison(
            points,
            metrics[0],
            folder / "comparison.png",
            f"{metrics[0]} against what is trained (mean ± standard deviation over seeds)",
        )
    return table


def _added_lines(added: Sequence[str]) -> list[Line]:
    """Lines of finished runs' folders, given as NAME=FOLDER; of one name, seeds of one line."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 if a run failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[1],
        epilog="FILE: " + __doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="comparison file")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="section.key=value", help="for every run"
    )
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--output-dir", help="instead of the file's")
    parser.add_argument("--metrics", nargs="+", help="instead of the file's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes of a run")
    args = parser.parse_args(argv)
    launch.log_to_console()
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        added = _added_lines(args.add)
        if args.file is None and not (added and args.metrics and args.output_dir):
            raise ConfigError("Give a comparison FILE, or --add, --metrics and --output-dir.")
        plan = read_plan(args.file, args.options, args.output_dir) if args.file else None
        metrics = args.metrics or plan.metrics
        folder = plan.output_dir if plan else Path(args.output_dir)
        lines = Comparison(plan, args.jobs, args.nproc_per_node).run() if plan else []
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    lines += added
    logger.info("\n%s", write_report(lines, metrics, folder))
    logger.info("\nwritten: %s", folder / "comparison.{md,csv,json,png}")
    return 1 if any(line.failures for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
