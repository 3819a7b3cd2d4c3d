"""Comparison files: what is refused, and those of ``projects/``."""

from __future__ import annotations

import pytest
import yaml
from tiny_runs import TRAIN

from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.evaluation.ranking_metrics import metric_names
from lavis_uniadapter.tools import recipes
from lavis_uniadapter.tools.compare.plan import METRICS, check_runs, read_plan


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"runs": None}, "runs is missing"),
        ({"metrics": []}, r"metrics is \[\]; it must not be empty"),
        ({"seed": [1]}, "Did you mean 'seeds'"),
        ({"cfg_path": "no.yaml"}, "no.yaml"),
        ({"runs": {"a": {"option": []}}}, "Did you mean 'options'"),
        ({"runs": {"a": {"learning_rate_of": "b"}}}, "'b' of 'a' is not a run"),
        ({"runs": {"a b": {}, "a-b": {}}}, "same folder"),
        ({"runs": {"a": {"evaluate": True}, "b": {"learning_rate_of": "a"}}}, "'a' of 'b'"),
        ({"runs": ["a"]}, "runs is"),
        ({"runs": {1: {}}}, "runs.1: the name 1 is a number"),
        ({"seeds": 3}, "seeds is 3"),
        ({"metrics": "t2v_r1"}, "metrics is 't2v_r1'"),
        ({"base": "x.yaml"}, "base is 'x.yaml'"),
        ({"runs": {"a": {"options": "x=1"}}}, "options is 'x=1'"),
        ({"reference": "liner"}, "'liner' is not a run. Did you mean 'linear'"),
    ],
)
def test_impossible_plan_is_named(plan_file, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        read_plan(plan_file(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics": ["t2v_r1", "t2v_R5"]}, "no run measures 't2v_R5'. Did you mean 't2v_r5'?"),
        ({"metrics": ["accuracy"]}, "no run measures 'accuracy'"),
        (
            {"metrics": ["t2v_r1", "val_t2v_r1"], "options": ['run.test_splits=["test","val_2"]']},
            "no run measures 'val_t2v_r1'. Did you mean 'val_2_t2v_r1'?",
        ),
        (  # the base is not in the table
            {"metrics": ["val_t2v_r1"], "base": {"options": ['run.test_splits=["val"]']}},
            "no run measures 'val_t2v_r1'",
        ),
        ({"runs": {"a": {"options": ["run.max_epohc=1"]}}}, "run 'a': .*Did you mean 'max_epoch'"),
        (
            {"tuning_options": ["run.k_tets=1"], "learning_rates": [0.1, 0.2]},
            "run 'linear': .*Did you mean 'k_test'",
        ),
        ({"learning_rates": [0.1, 2]}, "learning_rates.1 is 2; it must be less"),
        ({"options": ["run.test_splits=[]"]}, "No run is tested; set run.test_splits"),
    ],
)
def test_impossible_runs_are_named_before_any_starts(plan_file, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        check_runs(read_plan(plan_file(**changes)))


def test_the_command_line_wins_over_the_plan(plan_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    plan = read_plan(plan_file(), output_dir="~/out", metrics=["mean_recall"])
    assert (plan.output_dir, plan.metrics) == ("/home/someone/out", ("mean_recall",))
    check_runs(plan)


def test_runs_of_a_plan_are_chosen_in_its_order(plan_file):
    runs = {"0-shot": {"evaluate": True}, "a": {}, "b c": {}, "d": {"learning_rate_of": "a"}}
    path = plan_file(runs=runs, learning_rates=[0.1], reference="a")
    plan = read_plan(path)
    chosen = read_plan(path, runs=["d", "a"])
    assert list(chosen.runs.items()) == [("a", plan.runs["a"]), ("d", plan.runs["d"])]
    assert chosen.reference == "a" and read_plan(path, runs=["b c", "0-shot"]).reference == "b c"
    assert read_plan(path, runs=["0-shot"]).reference == "0-shot"
    with pytest.raises(ConfigError, match="--runs: 'bc' is not a run. Did you mean 'b c'?"):
        read_plan(path, runs=["a", "bc"])
    with pytest.raises(ConfigError, match="--runs: 'd' takes its learning rate from 'a'; add it"):
        read_plan(path, runs=["d"])


def test_the_metrics_of_a_plan_are_those_of_the_tasks():
    tasks = {yaml.safe_load(path.read_text())["run"]["task"] for path in recipes.runs().values()}
    assert set(METRICS) == tasks
    retrieval = {*metric_names("video"), *metric_names("image")}
    assert METRICS["uniadapter_retrieval"] == retrieval
    assert METRICS["uniadapter_captioning"] == set(caption_metrics.METRICS)


COMPARISONS = sorted((TRAIN.parent / "compare").glob("*.yaml"))


@pytest.mark.usefixtures("emoji_folder")
@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_compares_every_method_by_a_configuration_that_runs(path):
    plan = read_plan(path)
    check_runs(plan)
    models = [load_config(entry.cfg_path, entry.options).model_cfg for entry in plan.runs.values()]
    tunings = {model.tuning for model in models if "tuning" in model}  # LAVIS's own have none
    if path.stem != "shapes_init":
        assert tunings == set(TUNING_METHODS)
