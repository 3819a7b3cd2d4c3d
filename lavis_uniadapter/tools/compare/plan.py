"""Reads comparison files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lavis_uniadapter.common.config import read_yaml, validate
from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema.compare import PlanFile, RunEntry, named
from lavis_uniadapter.evaluation.answer_metrics import METRICS as ANSWER_METRICS
from lavis_uniadapter.tools import recipes

DIRECTIONS = ("t2v", "v2t", "t2i", "i2t")


# The metrics of each task that has a recipe.
METRICS: dict[str, Collection[str]] = {
    "uniadapter_retrieval": {
        "mean_recall",
        *(f"{way}_r{k}" for way in DIRECTIONS for k in (1, 5, 10)),
        *(f"{way}_{rank}" for way in DIRECTIONS for rank in ("medr", "meanr")),
    },
    "vqa": {"accuracy", "yes/no", "number", "other"},  # LAVIS's, by VQAv2's types of answers
    "video_qa": {*ANSWER_METRICS, "unknown_answers"},
    "uniadapter_captioning": {*(f"bleu_{n}" for n in range(1, 5)), "meteor", "rouge_l", "cider"},
}


def read_plan(
    path: Path,
    options: Sequence[str] = (),
    output_dir: str | None = None,
    metrics: Sequence[str] | None = None,
    runs: Sequence[str] | None = None,
) -> PlanFile:
    """Read a comparison file; each run gets the full path of its recipe and all its options.

    Args:
        options: for every run, the base included; they win over the file's.
        output_dir, metrics: instead of the file's.
        runs: names of the file's runs; the others are left out.

    Raises:
        ConfigError: naming what is wrong.
    """
    instead = {"output_dir": output_dir, "metrics": metrics}
    content = read_yaml(path) | {key: value for key, value in instead.items() if value}
    try:
        plan = _complete(PlanFile.read(content, ""), path.parent, options)
        return _only(plan, runs) if runs else plan
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error}") from None


def check_runs(plan: PlanFile) -> None:
    """Raise ConfigError for a wrong configuration of a run, or a metric that no run measures."""
    tasks: set[str] = set()
    splits: set[str] = set()
    base = {} if plan.base is None else {"base": plan.base}
    for name, run in (base | plan.runs).items():
        more = ["run.evaluate=True"] if run.evaluate else []
        try:
            content = validate(run.cfg_path or "", [*run.options, *more])
            if len(run.learning_rates or ()) > 1 and plan.tuning_options:
                validate(run.cfg_path or "", [*run.options, *plan.tuning_options])
        except ConfigError as error:
            raise ConfigError(f"run '{name}': {error}") from None
        tasks.add(content["run"]["task"])
        if run is not plan.base:  # the base is not in the table
            splits.update(content["run"]["test_splits"])
    if not splits:
        raise ConfigError("No run is tested; set run.test_splits.")
    if tasks <= set(METRICS):
        names = {"agg_metrics"}.union(*(METRICS[task] for task in tasks))
        known = sorted(named(split, name) for split in splits for name in names)
        for metric in plan.metrics:
            if metric not in known:
                hint = nearest(metric, known) or f" Known: {', '.join(known)}."
                raise ConfigError(f"metrics: no run measures '{metric}'.{hint}")


def _complete(plan: PlanFile, folder: Path, options: Sequence[str]) -> PlanFile:
    known = recipes.runs()

    def complete(name: str, run: RunEntry, common: Sequence[str]) -> RunEntry:
        cfg_path = run.cfg_path or plan.cfg_path
        if cfg_path is None:
            raise ConfigError(f"'{name}' has no cfg_path.")
        file = folder / cfg_path
        path = file if file.is_file() else recipes.find(cfg_path, known)
        rates = plan.learning_rates if run.learning_rates is None else run.learning_rates
        changes = {
            "cfg_path": str(path.resolve()),
            "options": (*common, *run.options, *options),
            "learning_rates": () if run.learning_rate_of or run.evaluate else rates,
        }
        return run.model_copy(update=changes)

    runs = {name: complete(name, run, plan.options) for name, run in plan.runs.items()}
    for name, run in runs.items():
        of = run.learning_rate_of
        if of and not (of in runs and runs[of].learning_rates):
            raise ConfigError(
                f"learning_rate_of '{of}' of '{name}' is not a run with learning_rates."
            )
    if len(set(map(slug, runs))) < len(runs):
        raise ConfigError("two runs would have the same folder; rename one.")
    reference = plan.reference or _first(runs)
    if reference not in runs:
        raise ConfigError(f"reference '{reference}' is not a run.{nearest(reference, runs)}")
    changes = {
        "cfg_path": None,
        "reference": reference,
        "base": None if plan.base is None else complete("base", plan.base, ()),
        "runs": runs,
    }
    return plan.model_copy(update=changes)


def _first(runs: Mapping[str, RunEntry]) -> str:
    """The first run that trains, if there is one."""
    return next((name for name, run in runs.items() if not run.evaluate), next(iter(runs)))


def _only(plan: PlanFile, names: Sequence[str]) -> PlanFile:
    for name in names:
        if name not in plan.runs:
            raise ConfigError(f"--runs: '{name}' is not a run.{nearest(name, plan.runs)}")
        of = plan.runs[name].learning_rate_of
        if of and of not in names:
            raise ConfigError(f"--runs: '{name}' takes its learning rate from '{of}'; add it.")
    runs = {name: run for name, run in plan.runs.items() if name in names}
    reference = plan.reference if plan.reference in runs else _first(runs)
    return plan.model_copy(update={"runs": runs, "reference": reference})


def slug(name: str) -> str:
    """A run's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()
