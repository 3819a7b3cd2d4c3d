"""Runs a comparison: each run in its own process, learning rates chosen, resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.runners import run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.tools.compare.plan import Entry, Plan, slug
from lavis_uniadapter.tools.compare.progress import Progress

logger = logging.getLogger("lavis_uniadapter")

REQUEST = "request.json"
CONSOLE = "console.log"


@dataclass
class Line:
    """Results of an entry: its finished runs by seed, and what failed."""

    name: str
    learning_rate: float | None = None
    at_edge: bool = False
    runs: list[run_folders.RunSummary] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Comparison:
    """Runs a plan; runs that have finished before are not repeated.

    Args:
        plan: what to run.
        jobs: runs at a time; processor threads are divided among them.
        processes: of each run, by torchrun; 1: a plain process.
    """

    def __init__(self, plan: Plan, jobs: int = 1, processes: int = 1):
        self.plan = plan
        self.jobs = jobs
        self.processes = processes
        self._progress = Progress()
        self._children: set[subprocess.Popen] = set()
        self._base_identity: str | None = None

    def run(self) -> list[Line]:
        """All runs of the plan; a failed one is a failure of its line, and the others continue.

        Raises:
            RuntimeError: if the base, from which all start, cannot be trained, or another
                comparison works in the same folder.
        """
        try:
            with run_folders.sole_user(self.plan.output_dir), self._progress:
                return self._run_all()
        except run_folders.FolderInUse:
            raise RuntimeError(
                f"Another comparison works in '{self.plan.output_dir}'. Wait for it, end it, or "
                "choose another --output-dir."
            ) from None

    def _run_all(self) -> list[Line]:
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
        seed = self.plan.tuning_seed
        attempts = []
        for entry in self.plan.entries:
            for rate in entry.learning_rates if len(entry.learning_rates) > 1 else ():
                folder = self._folder(entry, f"lr{rate:g}-seed{seed}")
                options = (*common, f"run.init_lr={rate}", "run.test_splits=[]")
                options += self.plan.tuning_options
                future = pool.submit(self._run, entry, folder, seed, options)
                attempts.append((entry.name, rate, folder, future))
        scores: dict[str, dict[float, float]] = {}
        for name, rate, folder, future in attempts:
            failure = future.result()
            best = None if failure else run_folders.read(folder).best
            if best is None:
                failure = failure or "nothing was validated, set run.valid_splits"
                lines[name].failures.append(f"learning rate {rate:g}: {failure}")
            else:
                scores.setdefault(name, {})[rate] = best
        for entry in self.plan.entries:
            line, rates = lines[entry.name], entry.learning_rates
            if len(rates) == 1:
                line.learning_rate = rates[0]
            elif entry.name in scores:
                line.learning_rate = max(scores[entry.name], key=scores[entry.name].get)
                line.at_edge = line.learning_rate in (min(rates), max(rates))
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
                future = pool.submit(self._run, entry, folder, seed, (*common, *rate))
                futures.append((line, folder, future))
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
        return self.plan.output_dir / f"{slug(entry.name)}-{suffix}"

    def _run(
        self,
        entry: Entry,
        folder: Path,
        seed: int,
        options: tuple[str, ...] = (),
        beside: int | None = None,
    ) -> str | None:
        """Run one configuration in its folder, or resume it; what went wrong, or None.

        Args:
            beside: how many runs share the processor, this one included; None: ``jobs``.
        """
        options = (*entry.options, *options, f"run.seed={seed}")
        failure = self._claim(entry, folder, options)
        if failure is None and run_folders.is_finished(folder):
            logger.info("%s: finished before", folder.name)
        elif failure is None:
            resumes = _has_checkpoint(folder) and not entry.evaluate
            logger.info("%s: %s", folder.name, "resumes" if resumes else "starts")
            self._progress.start(folder)
            failure = self._execute(self._command(entry, folder, options), folder, beside)
        self._progress.end(folder, failed=failure is not None)
        return failure

    def _claim(self, entry: Entry, folder: Path, options: Sequence[str]) -> str | None:
        """Note in a folder what is run there; why that cannot be, or None."""
        request = {
            "cfg": entry.cfg_path.read_text(),
            "options": list(options),
            "evaluate": entry.evaluate,
            "processes": self.processes,
            "base": self._base_identity,
        }
        folder.mkdir(parents=True, exist_ok=True)
        holds_something = run_folders.is_finished(folder) or _has_checkpoint(folder)
        if holds_something and json.loads((folder / REQUEST).read_text()) != request:
            return (
                f"'{folder}' holds a run of another configuration. Delete it, or choose another "
                "--output-dir."
            )
        write_json(folder / REQUEST, request)
        return None

    def _command(self, entry: Entry, folder: Path, options: Sequence[str]) -> list[str]:
        command = [sys.executable, "-m"]
        if self.processes > 1:
            command += ["torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={self.processes}", "-m"]
        command += ["uniadapter_cli", "evaluate" if entry.evaluate else "train"]
        command += [str(entry.cfg_path), *options]
        command += [f"run.output_dir={folder.parent.resolve()}", f"run.job_id={folder.name}"]
        return command + ([] if entry.evaluate else ["run.resume=auto"])

    def _execute(self, command: list[str], folder: Path, beside: int | None) -> str | None:
        """Wait for a run's process; what went wrong, or None."""
        with open(folder / CONSOLE, "ab") as console:
            start = console.tell()
            child = subprocess.Popen(
                command,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment((beside or self.jobs) * self.processes),
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
        last = said[-1] if said else "no message"
        reason = next((text for text in said if text.startswith("error: ")), last)
        logger.info("%s: FAILED (exit %s), see %s", folder.name, status, folder / CONSOLE)
        return f"{folder.name}: exit {status}: {reason}"


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


def _seed_of(options: Sequence[str]) -> int:
    given = [o.removeprefix("run.seed=") for o in options if o.startswith("run.seed=")]
    return int(given[-1]) if given else 42
