"""Runs a comparison: each run in its own process, learning rates chosen, resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.schema.compare import PlanFile, RunEntry
from lavis_uniadapter.runners import run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.runners.run_folders import RunSummary
from lavis_uniadapter.tools.compare.plan import slug
from lavis_uniadapter.tools.compare.progress import RunsProgress

logger = logging.getLogger("lavis_uniadapter")

REQUEST = "request.json"
CONSOLE = "console.log"


class RunFailed(RuntimeError):
    """A run of a comparison did not finish; says which, and why."""


@dataclass
class Line:
    """Results of an entry: its finished runs by seed, and what failed."""

    name: str
    learning_rate: float | None = None
    at_edge: bool = False
    runs: list[RunSummary] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


# A line, the end of the run's folder name, and options over those of the line's entry.
Job = tuple[Line, str, tuple[str, ...]]


class Comparison:
    """Runs a plan, ``jobs`` runs at a time, each in one process or several.

    Runs that have finished before are not repeated. Processor threads are divided among the jobs.
    """

    def __init__(self, plan: PlanFile, jobs: int = 1, processes: int = 1):
        self.plan = plan
        self.folder = Path(plan.output_dir)
        self.jobs = jobs
        self.processes = processes
        self._progress = RunsProgress(self.folder)
        self._children: set[subprocess.Popen] = set()
        # What every run starts from, if the plan has a base: an option, and the file's hash.
        self._start: tuple[str, ...] = ()
        self._base_identity: str | None = None

    def run(self) -> list[Line]:
        """All runs of the plan; a failed one is a failure of its line, and the others continue.

        Raises:
            RunFailed: if the base, from which all start, cannot be trained.
            FolderInUse: if another comparison works in the same folder.
        """
        lines = [Line(name) for name in self.plan.runs]
        pool = ThreadPoolExecutor(self.jobs)
        with run_folders.sole_user(self.folder), self._progress, pool:
            try:
                if self.plan.base:
                    self._run(self.plan.base, "base")
                    weights = (self.folder / "base" / BEST).resolve()
                    self._start = (f"model.pretrained={weights}",)
                    self._base_identity = hashlib.sha256(weights.read_bytes()).hexdigest()
                self._tune(pool, lines)
                self._measure(pool, lines)
            except BaseException:  # Ctrl-C among them
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self._children):
                    child.send_signal(signal.SIGTERM)
                raise
        return lines

    def _tune(self, pool: Executor, lines: Sequence[Line]) -> None:
        """Give each line the learning rate whose run is best on validation."""
        seed = self.plan.tuning_seed
        common = ("run.test_splits=[]", *self.plan.tuning_options, f"run.seed={seed}")
        rates = {name: entry.learning_rates or () for name, entry in self.plan.runs.items()}
        tried = [(line, r) for line in lines if len(rates[line.name]) > 1 for r in rates[line.name]]
        jobs = [(line, f"lr{r:g}-seed{seed}", (f"run.init_lr={r}", *common)) for line, r in tried]
        scores: dict[str, dict[float, float]] = {line.name: {} for line in lines}
        for (line, rate), summary in zip(tried, self._results(pool, jobs), strict=True):
            if summary and summary.best is not None:
                scores[line.name][rate] = summary.best
            elif summary:
                line.failures.append("nothing was validated; set run.valid_splits")
        for line in lines:
            source = self.plan.runs[line.name].learning_rate_of or line.name
            if len(rates[source]) == 1:
                line.learning_rate = rates[source][0]
            elif scored := scores[source]:
                line.learning_rate = max(scored, key=scored.__getitem__)
                line.at_edge = line.learning_rate in (min(rates[source]), max(rates[source]))
            elif rates[source]:
                line.failures.append("no learning rate could be chosen")

    def _measure(self, pool: Executor, lines: Sequence[Line]) -> None:
        jobs: list[Job] = []
        for line in lines:
            entry, rate = self.plan.runs[line.name], line.learning_rate
            options = () if rate is None else (f"run.init_lr={rate}",)
            if entry.evaluate:
                jobs.append((line, "test", ()))
            elif options or not (entry.learning_rates or entry.learning_rate_of):
                for seed in self.plan.seeds:
                    jobs.append((line, f"seed{seed}", (*options, f"run.seed={seed}")))
        for (line, *_), summary in zip(jobs, self._results(pool, jobs), strict=True):
            if summary is None:
                continue
            line.runs.append(summary)
            for metric in self.plan.metrics:
                if metric not in summary.metrics:
                    known = ", ".join(summary.metrics) or "none"
                    line.failures.append(f"there is no metric '{metric}', only {known}")

    def _results(self, pool: Executor, jobs: Sequence[Job]) -> Iterator[RunSummary | None]:
        """What each run left; None, and a failure of its line, for one that failed."""
        attempts = [
            pool.submit(self._run, self.plan.runs[line.name], f"{slug(line.name)}-{end}", options)
            for line, end, options in jobs
        ]
        for (line, *_), attempt in zip(jobs, attempts, strict=True):
            try:
                yield attempt.result()
            except RunFailed as failure:
                line.failures.append(str(failure))
                yield None

    def _run(self, entry: RunEntry, name: str, options: tuple[str, ...] = ()) -> RunSummary:
        """Run one configuration in the folder ``name``, or resume it, and read what it left."""
        folder = self.folder / name
        options = (*entry.options, *self._start, *options)
        self._claim(entry, folder, options)
        if run_folders.is_finished(folder):
            logger.info("%s: finished before", name)
        else:
            resumes = _has_checkpoint(folder) and not entry.evaluate
            logger.info("%s: %s", name, "resumes" if resumes else "starts")
            shown = self._progress.add_task(name, total=None)
            try:
                self._execute(entry, folder, options)
            finally:
                self._progress.remove_task(shown)
        return run_folders.read(folder)

    def _claim(self, entry: RunEntry, folder: Path, options: Sequence[str]) -> None:
        """Write down in a folder what is run there, unless it has a run of something else."""
        request: dict[str, Any] = {
            "cfg": Path(str(entry.cfg_path)).read_text(),
            "options": list(options),
            "evaluate": entry.evaluate,
            "processes": self.processes,
            "base": self._base_identity,
        }
        folder.mkdir(parents=True, exist_ok=True)
        holds_something = run_folders.is_finished(folder) or _has_checkpoint(folder)
        if holds_something and json.loads((folder / REQUEST).read_text()) != request:
            raise RunFailed(f"'{folder}' holds a run of another configuration; delete that folder.")
        write_json(folder / REQUEST, request)

    def _execute(self, entry: RunEntry, folder: Path, options: Sequence[str]) -> None:
        """Run a process to its end; its output goes to a file."""
        command = [sys.executable, "-m"]
        if self.processes > 1:
            command += ["torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={self.processes}", "-m"]
        command += ["uniadapter_cli", "evaluate" if entry.evaluate else "train"]
        command += [str(entry.cfg_path), *options]
        command += [f"run.output_dir={folder.parent.resolve()}", f"run.job_id={folder.name}"]
        command += [] if entry.evaluate else ["run.resume=auto"]
        variables = environment(self.processes * (1 if entry is self.plan.base else self.jobs))
        with open(folder / CONSOLE, "ab") as console:
            start = console.tell()
            child = subprocess.Popen(command, env=variables, stdout=console, stderr=console)
            self._children.add(child)
            status = child.wait()
            self._children.discard(child)
        if status == 0 and run_folders.is_finished(folder):
            logger.info("%s: done", folder.name)
            return
        said = (folder / CONSOLE).read_bytes()[start:].decode(errors="replace").strip().splitlines()
        reason = next((text for text in said if text.startswith("error: ")), [*said, ""][-1])
        logger.info("%s: FAILED (exit %s), see %s", folder.name, status, folder / CONSOLE)
        raise RunFailed(f"{folder.name}: exit {status}: {reason}")


def environment(processes: int) -> dict[str, str]:
    """Environment of one of several processes that share this machine's processors.

    OpenMP threads that wait for others of their process spin by default. Beside other processes
    that takes the processor from threads that have work; alone, going to sleep costs a little.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    policy = {"OMP_WAIT_POLICY": "PASSIVE"} if processes > 1 else {}
    return {**policy, **os.environ, "OMP_NUM_THREADS": str(threads)}


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoint_*.pth"))
