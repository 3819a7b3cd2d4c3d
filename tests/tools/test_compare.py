"""The comparison of methods: what it runs, what it chooses, what it reports."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_runs import TINY_CLIPS, TINY_RUN, TRAIN, held_by_another_process

from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST, LATEST
from lavis_uniadapter.tools.compare import progress, report, running
from lavis_uniadapter.tools.compare.plan import read_plan
from lavis_uniadapter.tools.compare.running import Comparison, Line
from uniadapter_cli.compare import main


@pytest.fixture
def plan_file(tmp_path):
    def write(**changes) -> Path:
        content = {
            "cfg_path": str(TRAIN / "shapes_retrieval.yaml"),
            "output_dir": str(tmp_path / "out"),
            "metrics": ["t2v_r1", "v2t_r1"],
            "seeds": [1],
            "runs": {"linear": {"options": ["model.tuning=linear"]}},
            **changes,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


def write_summary(folder: Path, score: float, r1: float, trained: int = 10) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / run_folders.SUMMARY,
        {
            "metrics": {"test": {"t2v_r1": r1, "v2t_r1": r1 / 2}},
            "best": {"score": score, "epoch": 0},
            "parameters": {"trained": trained, "total": 1000},
            "peak_bytes": 2_000_000_000,
        },
    )
    (folder / run_folders.LOG).write_text(
        json.dumps({"train_seconds": 50.0}) + "\n" + json.dumps({"test_seconds": 10.0}) + "\n"
    )


@pytest.fixture
def stub_runs(monkeypatch):
    """Instead of running, write a summary; learning rate 2e-3 validates best, 1e-3 tests best."""
    started = []

    def run(self, entry, folder, seed, options=()):
        started.append(folder.name)
        rate = next((float(o.split("=")[1]) for o in options if "init_lr" in o), None)
        if "broken" in entry.name:
            return f"{folder.name}: exit 1: it broke"
        score = {1e-3: 1.0, 2e-3: 3.0, 4e-3: 2.0, None: 0.0}[rate]
        r1 = {1e-3: 90.0, 2e-3: 40.0, 4e-3: 10.0, None: 5.0}[rate] + seed
        write_summary(folder, score, r1)
        return None

    monkeypatch.setattr(Comparison, "_run", run)
    return started


def test_learning_rate_is_chosen_on_validation_and_shared_on_demand(plan_file, stub_runs):
    plan = read_plan(
        plan_file(
            seeds=[1, 2],
            learning_rates=[1e-3, 2e-3, 4e-3],
            runs={
                "linear": {"options": ["model.tuning=linear"]},
                "no PFA": {"learning_rate_of": "linear"},
                "zero-shot": {"evaluate": True},
                "broken": {},
            },
        )
    )
    lines = {line.name: line for line in Comparison(plan, jobs=2).run()}
    assert lines["linear"].learning_rate == 2e-3 and not lines["linear"].at_edge
    assert lines["no PFA"].learning_rate == 2e-3
    assert [run.metric("t2v_r1") for run in lines["linear"].runs] == [41.0, 42.0]
    assert len(lines["zero-shot"].runs) == 1 and lines["zero-shot"].learning_rate is None
    assert lines["broken"].runs == [] and "it broke" in lines["broken"].failures[0]
    assert sum(name.startswith("linear-lr") for name in stub_runs) == 3
    assert not any(name.startswith("no-pfa-lr") for name in stub_runs)


def test_tuning_options_reach_tuning_runs_alone(plan_file, monkeypatch):
    given = {}

    def run(self, entry, folder, seed, options=()):
        given[folder.name] = options
        write_summary(folder, 1.0, 50.0)

    monkeypatch.setattr(Comparison, "_run", run)
    short = {"learning_rates": [1e-3, 2e-3], "tuning_options": ["run.max_epoch=1"]}
    Comparison(read_plan(plan_file(**short))).run()
    tuned = {name for name, options in given.items() if "run.max_epoch=1" in options}
    assert tuned == {"linear-lr0.001-seed0", "linear-lr0.002-seed0"}
    assert set(given) - tuned == {"linear-seed1"}


def test_best_at_the_edge_of_the_grid_is_marked(plan_file, stub_runs):
    plan = read_plan(plan_file(learning_rates=[2e-3, 4e-3]))
    (line,) = Comparison(plan).run()
    assert line.at_edge
    table = report.markdown_table(report.rows_of([line], plan.metrics), plan.metrics)
    assert "0.002*" in table and "smallest or largest" in table


def test_runs_in_different_precisions_are_told_apart(plan_file, stub_runs):
    plan = read_plan(plan_file(runs={"linear": {}, "lora": {}}, seeds=[1, 2]))
    lines = Comparison(plan).run()

    def table(*precisions):
        for run, precision in zip([*lines[0].runs, *lines[1].runs], precisions, strict=True):
            object.__setattr__(run, "precision", precision)
        return report.markdown_table(report.rows_of(lines, plan.metrics), plan.metrics)

    assert "precision" not in table("bf16", "bf16", "bf16", "bf16")
    assert "precision" not in table("bf16", "bf16", None, None)  # LAVIS's folders do not tell
    assert "linear in bf16; lora in float32." in table("bf16", "bf16", "float32", "float32")
    assert "linear in bf16, float32; lora in bf16." in table("bf16", "float32", "bf16", "bf16")


def test_a_metric_that_no_run_has_is_a_failure(plan_file, stub_runs):
    (line,) = Comparison(read_plan(plan_file(metrics=["t2v_R1"]))).run()
    assert "no metric 't2v_R1', only t2v_r1, v2t_r1" in line.failures[0]


@pytest.fixture
def stub_children(monkeypatch):
    """Instead of starting a process, write what it would leave; its commands."""
    commands = []

    class Child:
        def __init__(self, command, **kwargs):
            commands.append(command)
            options = dict(o.split("=", 1) for o in command if "=" in o)
            folder = Path(options["run.output_dir"]) / options["run.job_id"]
            write_summary(folder, 1.0, 50.0)
            (folder / LATEST).write_bytes(b"")
            (folder / BEST).write_bytes(str(options).encode())

        def wait(self):
            return 0

    monkeypatch.setattr(running.subprocess, "Popen", Child)
    return commands


@pytest.mark.parametrize(
    ("jobs", "processes", "threads", "policy"),
    [(1, 1, "8", None), (2, 1, "4", "PASSIVE"), (1, 2, "4", "PASSIVE"), (4, 4, "1", "PASSIVE")],
)
def test_runs_beside_each_other_share_the_processors(
    plan_file, stub_children, tmp_path, monkeypatch, jobs, processes, threads, policy
):
    environments = []
    child = running.subprocess.Popen

    def start(command, *, env, **options):
        environments.append(env)
        return child(command, **options)

    monkeypatch.setattr(running.subprocess, "Popen", start)
    monkeypatch.setattr(running.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, expected in (("default", policy), ("chosen", "ACTIVE")):
        if name == "chosen":
            monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        plan = read_plan(plan_file(), output_dir=str(tmp_path / name))
        Comparison(plan, jobs=jobs, processes=processes).run()
        assert environments[-1]["OMP_NUM_THREADS"] == threads
        assert environments[-1].get("OMP_WAIT_POLICY") == expected


def test_what_decides_a_result_decides_whether_it_is_still_good(plan_file, stub_children, tmp_path):
    def refused(processes=1, options=(), **changes):
        number = len(stub_children)
        plan = read_plan(plan_file(**changes), options)
        (line,) = Comparison(plan, processes=processes).run()
        return len(stub_children) == number and "another configuration" in str(line.failures)

    assert not refused()
    assert len(stub_children) == 1
    assert not refused() and len(stub_children) == 1  # finished before
    linear = ["model.tuning=linear"]
    assert refused(processes=2)
    assert refused(options=["run.max_epoch=4"])
    assert refused(runs={"linear": {"options": [*linear, "a.b=1", "a.b=2", "a.b=1"]}})
    with_base = {"base": {"cfg_path": str(TRAIN / "shapes_pretrain.yaml")}}
    assert refused(runs={"linear": {"options": linear}}, seeds=[1]) is False
    assert not refused(output_dir=str(tmp_path / "two"), **with_base)
    shutil.rmtree(tmp_path / "two/base")  # as a refusal advises
    with_base["base"]["options"] = ["run.max_epoch=3"]
    (line,) = Comparison(read_plan(plan_file(output_dir=str(tmp_path / "two"), **with_base))).run()
    assert "another configuration" in str(line.failures)


def test_a_run_that_never_started_may_be_corrected(plan_file, monkeypatch):
    class Child:
        def __init__(self, command, **kwargs):
            pass

        def wait(self):
            return 2

    monkeypatch.setattr(running.subprocess, "Popen", Child)
    for options in (["model.tunign=linear"], ["model.tuning=linear"]):
        plan = read_plan(plan_file(runs={"linear": {"options": options}}))
        (line,) = Comparison(plan).run()
        assert "exit 2" in line.failures[0] and "another configuration" not in line.failures[0]
        request = json.loads((plan.output_dir / "linear-seed1" / running.REQUEST).read_text())
        assert request["options"][0] == options[0]


def test_interrupting_starts_nothing_more(plan_file, monkeypatch, capsys):
    """By SIGTERM, in a process that ignores SIGINT as those in the background do."""
    started = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(self, entry, folder, seed, options=()):
        started.append(seed)
        time.sleep(0.2)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    monkeypatch.setattr(Comparison, "_run", run)
    try:
        assert main([str(plan_file(seeds=list(range(8))))]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) <= 3
    assert "continues from here" in capsys.readouterr().err


def test_two_comparisons_never_share_a_folder(plan_file, stub_runs):
    plan = read_plan(plan_file())
    with held_by_another_process(plan.output_dir):
        with pytest.raises(RuntimeError, match="Another comparison works in"):
            Comparison(plan).run()
    assert stub_runs == []
    Comparison(plan).run()
    assert stub_runs == ["linear-seed1"]


def test_report_has_means_deviations_and_failures(tmp_path):
    lines = [Line("linear", 1e-3), Line("broken", failures=["broken-seed1: exit 1: error: no"])]
    for seed, r1 in ((1, 40.0), (2, 44.0)):
        write_summary(tmp_path / str(seed), 0.0, r1, trained=250)
        lines[0].runs.append(run_folders.read(tmp_path / str(seed)))
    table = report.write_report(lines, ("t2v_r1", "v2t_r1"), tmp_path / "report")
    row = next(text for text in table.splitlines() if text.startswith("| linear"))
    assert row == "| linear | 0.001 | 250 | 25.00% | 42.0 ± 2.8 | 21.0 ± 1.4 | 2 | 1.0 | 2.00 |"
    assert "- broken: broken-seed1: exit 1: error: no" in table
    with open(tmp_path / "report/comparison.csv") as file:
        first, second = csv.DictReader(file)
    assert float(first["t2v_r1"]) == 42.0 and float(first["t2v_r1 std"]) == pytest.approx(8**0.5)
    assert second["t2v_r1"] == "" and second["failures"]
    assert (tmp_path / "report/comparison.png").stat().st_size > 5000
    assert json.loads((tmp_path / "report/comparison.json").read_text())[0]["seeds"] == 2


def test_differences_from_the_reference_have_a_column(tmp_path):
    lines = [Line("a"), Line("b")]
    for line, recalls in zip(lines, ([0.0, 0.0, 100.0], [100.0, 100.0, 100.0]), strict=True):
        folder = tmp_path / line.name
        write_summary(folder, 0.0, sum(recalls) / 3)
        (folder / "result").mkdir()
        outcomes = {"t2v_r1": [recalls]}
        write_json(folder / "result/outcomes_test.json", outcomes)
        line.runs.append(run_folders.read(folder))

    def table(reference):
        rows = report.rows_of(lines, ("t2v_r1",), reference)
        header, _, a, b, *_ = report.markdown_table(rows, ("t2v_r1",), reference).splitlines()
        assert f"| t2v_r1 - {reference}'s [95%] |" in header
        return a.split(" | ")[5], b.split(" | ")[5]

    first, second = table("a")
    assert first == "" and second.startswith("+66.7 [")
    first, second = table("b")
    assert first.startswith("-66.7 [") and second == ""


def lavis_run(folder: Path, results: dict) -> Path:
    """What LAVIS's ``runner_base`` leaves."""
    (folder / "result").mkdir(parents=True)
    log = json.dumps({"run": {"task": "retrieval"}}, indent=4) + "\n"
    (folder / "log.txt").write_text(log + json.dumps({"train_loss": "3.1"}) + "\n")
    (folder / "evaluate.txt").write_text(json.dumps({"old": 1}) + "\n" + json.dumps(results) + "\n")
    return folder


def test_runs_of_lavis_itself_are_read(tmp_path, monkeypatch):
    retrieval = lavis_run(tmp_path / "a", {"txt_r1": 70.0, "img_r1": 60.0, "agg_metrics": 80.0})
    summary = run_folders.read(retrieval)
    assert summary.metric("t2v_r1") == summary.metric("t2i_r1") == 60.0
    assert summary.metric("v2t_r1") == 70.0 and summary.metric("t2v_r5") is None
    caption = lavis_run(tmp_path / "b", {"test": {"CIDEr": 1.25, "Bleu_4": 0.3}})
    assert run_folders.read(caption).metric("CIDEr") == 1.25
    assert run_folders.read(caption).metric("cider") == 125.0

    monkeypatch.chdir(tmp_path)
    add = ["--add", f"BLIP={retrieval}", f"BLIP={retrieval}", "--metrics", "t2v_r1"]
    assert main([*add, "--output-dir", "table"]) == 0
    assert "| BLIP |  |  |  | 60.0 ± 0.0 | 2 |" in Path("table/comparison.md").read_text()


def test_folder_without_results_is_named(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    argv = ["--add", f"x={tmp_path / 'run'}", "--metrics", "m", "--output-dir", str(tmp_path)]
    assert main(argv) == 2
    assert "no finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"runs": None}, "runs is missing"),
        ({"metrics": []}, r"metrics is \[\]; it must be a list of names"),
        ({"seed": [1]}, "Did you mean 'seeds'"),
        ({"cfg_path": "no.yaml"}, "no.yaml"),
        ({"runs": {"a": {"option": []}}}, "Did you mean 'options'"),
        ({"runs": {"a": {"learning_rate_of": "b"}}}, "'b' of 'a' is no run"),
        ({"runs": {"a b": {}, "a-b": {}}}, "same folder"),
        ({"runs": {"a": {"evaluate": True}, "b": {"learning_rate_of": "a"}}}, "'a' of 'b'"),
        ({"runs": ["a"]}, "runs is"),
        ({"runs": {1: {}}}, "runs.1: the name 1 is a number"),
        ({"seeds": 3}, "seeds is 3"),
        ({"metrics": "t2v_r1"}, "metrics is 't2v_r1'"),
        ({"base": "x.yaml"}, "base is 'x.yaml'"),
        ({"runs": {"a": {"options": "x=1"}}}, "options is 'x=1'"),
        ({"reference": "liner"}, "'liner' is no run. Did you mean 'linear'"),
    ],
)
def test_impossible_plan_is_named(plan_file, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        read_plan(plan_file(**changes))


COMPARISONS = sorted((TRAIN.parent / "compare").glob("*.yaml"))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_compares_every_method_by_a_configuration_that_runs(path):
    plan = read_plan(path)
    models = [load_config(entry.cfg_path, entry.options).model_cfg for entry in plan.entries]
    tunings = {model.tuning for model in models if "tuning" in model}  # LAVIS's own have none
    if path.stem != "shapes_init":
        assert tunings == set(TUNING_METHODS)


@pytest.mark.processes
def test_compares_for_real_and_goes_on_where_it_stopped(
    plan_file, tmp_path, tiny_cache, monkeypatch, capsys
):
    """One finished, one stopped before its test, one that cannot work, one evaluated."""
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY_CLIPS, *TINY_RUN, f"run.cache_root={tiny_cache}"]
    runs = {
        "linear": {"options": ["model.tuning=linear"]},
        "impossible": {"options": ["model.adapter.bottleneck=0"]},
        "zero-shot": {"options": ["model.tuning=full"], "evaluate": True},
    }
    path = plan_file(options=tiny, runs=runs, reference="linear")
    assert main([str(path), "--jobs", "2"]) == 1  # for the impossible one
    said = capsys.readouterr().out
    table = (tmp_path / "out/comparison.md").read_text()
    assert "| linear |" in table and "| zero-shot |  | 0 |" in table
    assert "- impossible: impossible-seed1: exit 2: error: model.adapter.bottleneck is 0" in table
    linear = json.loads((tmp_path / "out/linear-seed1/summary.json").read_text())
    assert linear["seed"] == 1 and linear["tuning"] == "linear"
    assert linear["parameters"]["trained"] < linear["parameters"]["total"]
    assert linear["peak_bytes"] > 10**8
    assert "| t2v_r1 - linear's [95%] |" in table  # from the outcomes that both runs left
    zero_shot = run_folders.read(tmp_path / "out/zero-shot-seed42")
    for name in ("t2v_r1", "mean_recall"):
        kinds = zero_shot.outcomes[name]
        mean = sum(sum(kind) / len(kind) for kind in kinds) / len(kinds)
        assert mean == pytest.approx(zero_shot.metric(name))

    (tmp_path / "out/linear-seed1/summary.json").unlink()
    assert (tmp_path / "out/linear-seed1" / LATEST).is_file()
    del runs["impossible"]
    assert main([str(plan_file(options=tiny, runs=runs))]) == 0
    said = capsys.readouterr().out
    assert "zero-shot-seed42: finished before" in said and "linear-seed1: resumes" in said
    log = (tmp_path / "out/linear-seed1/log.txt").read_text()
    assert log.count('"train_epoch"') == 2  # no epoch trained again
    again = json.loads((tmp_path / "out/linear-seed1/summary.json").read_text())
    assert again["metrics"] == linear["metrics"]

    runs["linear"]["options"] = ["model.tuning=full"]
    assert main([str(plan_file(options=tiny, runs=runs))]) == 1
    assert "another configuration" in capsys.readouterr().out


def test_a_new_run_in_an_old_folder_is_not_taken_for_finished(tmp_path, tiny_cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY_CLIPS, *TINY_RUN, f"run.cache_root={tiny_cache}", "run.job_id=same"]
    options += ["run.max_epoch=1", "run.test_splits=[]", "run.valid_splits=[]"]
    path = TRAIN / "shapes_retrieval.yaml"
    folder = launch.run(path, options).output_dir
    assert run_folders.is_finished(folder)
    options += ["run.resume=auto", "run.max_skipped_steps=1", "run.warmup_steps=0"]
    with pytest.raises(FloatingPointError):
        launch.run(path, [*options, "run.max_epoch=9", "run.init_lr=1e30"])
    assert not run_folders.is_finished(folder)
    launch.destroy_process_group()


# --- progress -----------------------------------------------------------------------------------


def test_progress_shows_running_runs_and_the_time_left(tmp_path):
    folders = [tmp_path / name for name in ("linear-seed1", "lora-seed1")]
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress.Progress(console) as shown:
        for folder in folders:
            folder.mkdir()
            shown.start(folder)
        config = {"run": {"max_epoch": 5}}
        (folders[0] / "config.json").write_text(json.dumps(config))
        lines = [{"train_epoch": n, "train_seconds": 50.0} for n in range(2)]
        lines += [{"val_epoch": 1, "val_seconds": 20.0}]
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (folders[0] / run_folders.LOG).write_text(log)
        table = shown.table()
        columns = [list(column.cells) for column in table.columns]
        assert columns[0] == ["linear-seed1", "lora-seed1"]
        assert columns[1] == ["2/5", "0/?"]
        assert columns[3] == ["3:00", ""]
        shown.end(folders[0], failed=False)
        shown.end(folders[1], failed=True)
        assert shown.table().row_count == 0
    assert "1 finished, 1 failed" in console.file.getvalue()


def test_progress_draws_on_terminals_only(tmp_path):
    console = Console(file=io.StringIO())
    with progress.Progress(console) as shown:
        shown.start(tmp_path)
    assert not console.file.getvalue()
