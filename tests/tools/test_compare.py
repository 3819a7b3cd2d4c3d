"""The comparison of methods: what it runs, what it chooses, what it reports."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from tiny_runs import TINY_CLIPS, TINY_RUN, TRAIN

from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST, LATEST
from lavis_uniadapter.tools.compare import report, running
from lavis_uniadapter.tools.compare.plan import read_plan
from lavis_uniadapter.tools.compare.running import Comparison, Line
from uniadapter_cli.compare import main


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

    def run(self, entry, name, options=()):
        started.append(name)
        given = dict(option.split("=") for option in options)
        rate = float(given.get("run.init_lr", 0))
        if "broken" in name:
            raise running.RunFailed(f"{name}: exit 1: it broke")
        score = {1e-3: 1.0, 2e-3: 3.0, 4e-3: 2.0, 0: 0.0}[rate]
        r1 = {1e-3: 90.0, 2e-3: 40.0, 4e-3: 10.0, 0: 5.0}[rate]
        write_summary(self.folder / name, score, r1 + int(given.get("run.seed", 0)))
        return run_folders.read(self.folder / name)

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
    assert [run.metrics.get("t2v_r1") for run in lines["linear"].runs] == [41.0, 42.0]
    assert len(lines["zero-shot"].runs) == 1 and lines["zero-shot"].learning_rate is None
    assert lines["broken"].runs == [] and "it broke" in lines["broken"].failures[0]
    assert sum(name.startswith("linear-lr") for name in stub_runs) == 3
    assert not any(name.startswith("no-pfa-lr") for name in stub_runs)


def test_tuning_options_reach_tuning_runs_alone(plan_file, monkeypatch):
    given = {}

    def run(self, entry, name, options=()):
        given[name] = options
        write_summary(self.folder / name, 1.0, 50.0)
        return run_folders.read(self.folder / name)

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


def test_precisions_of_runs_are_shown(plan_file, stub_runs):
    plan = read_plan(plan_file(seeds=[1, 2]))
    lines = Comparison(plan).run()
    for run, precision in zip(lines[0].runs, ("float32", "bf16"), strict=True):
        object.__setattr__(run, "precision", precision)
    table = report.markdown_table(report.rows_of(lines, plan.metrics), plan.metrics)
    assert table.splitlines()[2].endswith("| bf16, float32 |")


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
def test_concurrent_runs_share_the_processors(
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


def test_a_run_that_only_tests_is_evaluated_once(plan_file, stub_children):
    runs = {"zero-shot": {"options": ["model.tuning=full"], "evaluate": True}}
    plan = read_plan(plan_file(runs=runs, seeds=[1, 2], learning_rates=[1e-3, 2e-3]))
    (line,) = Comparison(plan).run()
    (command,) = stub_children
    assert len(line.runs) == 1 and "evaluate" in command
    assert not any(
        option.startswith(("run.resume", "run.init_lr", "run.seed")) for option in command
    )


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
        request = json.loads((Path(plan.output_dir) / "linear-seed1" / running.REQUEST).read_text())
        assert request["options"][0] == options[0]


def test_interrupting_starts_nothing_more(plan_file, monkeypatch, capsys):
    """By SIGTERM, in a process that ignores SIGINT as those in the background do."""
    started = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(self, entry, name, options=()):
        started.append(name)
        time.sleep(0.2)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        raise running.RunFailed(name)

    monkeypatch.setattr(Comparison, "_run", run)
    try:
        assert main([str(plan_file(seeds=list(range(8))))]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) <= 3
    assert "continues from here" in capsys.readouterr().err


def test_two_comparisons_never_share_a_folder(plan_file, stub_runs):
    plan = read_plan(plan_file())
    with run_folders.sole_user(Path(plan.output_dir)):
        with pytest.raises(run_folders.FolderInUse, match="Another process is using"):
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
    assert row == "| linear | 0.001 | 250 | 25.00% | 42.0 ± 2.8 | 21.0 ± 1.4 | 2 | 1.0 | 2.00 |  |"
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


@pytest.mark.parametrize("content", ["", '{"txt_r1": 7', "7", "[7]"])
def test_a_result_of_lavis_that_was_cut_off_is_named(tmp_path, content):
    folder = lavis_run(tmp_path / "a", {})
    (folder / "evaluate.txt").write_text(content)
    with pytest.raises(FileNotFoundError, match=r"evaluate\.txt' does not end in a result"):
        run_folders.read(folder)


def test_only_numbers_of_a_result_of_lavis_are_read(tmp_path):
    folder = lavis_run(tmp_path / "a", {"txt_r1": 7, "note": "s", "list": [1]})
    with open(folder / "evaluate.txt", "a") as file:
        file.write("\n")
    assert run_folders.read(folder).metrics == {"txt_r1": 7, "v2t_r1": 7, "i2t_r1": 7}


def test_runs_of_lavis_itself_are_read(tmp_path, monkeypatch):
    retrieval = lavis_run(tmp_path / "a", {"txt_r1": 70.0, "img_r1": 60.0, "agg_metrics": 80.0})
    summary = run_folders.read(retrieval)
    assert summary.metrics.get("t2v_r1") == summary.metrics.get("t2i_r1") == 60.0
    assert summary.metrics.get("v2t_r1") == 70.0 and summary.metrics.get("t2v_r5") is None
    caption = lavis_run(tmp_path / "b", {"test": {"CIDEr": 1.25, "Bleu_4": 0.3}})
    assert run_folders.read(caption).metrics.get("CIDEr") == 1.25
    assert run_folders.read(caption).metrics.get("cider") == 125.0

    monkeypatch.chdir(tmp_path)
    add = ["--add", f"BLIP={retrieval}", f"BLIP={retrieval}", "--metrics", "t2v_r1"]
    assert main([*add, "--output-dir", "table"]) == 0
    assert "| BLIP |  |  |  | 60.0 ± 0.0 | 2 |" in Path("table/comparison.md").read_text()


def test_folder_without_results_is_named(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    argv = ["--add", f"x={tmp_path / 'run'}", "--metrics", "m", "--output-dir", str(tmp_path)]
    assert main(argv) == 2
    assert "no finished run" in capsys.readouterr().err


@pytest.mark.processes
def test_a_comparison_runs_and_resumes(plan_file, tmp_path, tiny_cache, monkeypatch, capsys):
    """One run that finishes, and one that cannot work; then the first lacks its test."""
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY_CLIPS, *TINY_RUN, f"run.cache_root={tiny_cache}"]
    tiny.append('run.test_splits=["test","val"]')
    runs = {
        "linear": {"options": ["model.tuning=linear"]},
        "impossible": {"options": ["run.test_splits=[tset]"]},
    }
    path = plan_file(options=tiny, runs=runs, reference="linear")
    assert main([str(path), "--jobs", "2"]) == 1  # for the impossible one
    table = (tmp_path / "out/comparison.md").read_text()
    assert "| linear |" in table
    assert "- impossible: impossible-seed1: exit 2: error: run.test_splits names 'tset'" in table
    linear = json.loads((tmp_path / "out/linear-seed1/summary.json").read_text())
    assert linear["seed"] == 1 and linear["tuning"] == "linear"
    assert linear["parameters"]["trained"] < linear["parameters"]["total"]
    assert linear["peak_bytes"] > 10**8
    summary = run_folders.read(tmp_path / "out/linear-seed1")
    for metric in ("t2v_r1", "mean_recall"):
        assert summary.metrics.get(metric) == linear["metrics"]["test"][metric]
        assert summary.metrics.get(f"val_{metric}") == linear["metrics"]["val"][metric]
    for name in ("t2v_r1", "mean_recall", "val_t2v_r1", "val_mean_recall"):
        kinds = summary.outcomes[name]
        mean = sum(sum(kind) / len(kind) for kind in kinds) / len(kinds)
        assert mean == pytest.approx(summary.metrics.get(name))

    (tmp_path / "out/linear-seed1/summary.json").unlink()
    assert (tmp_path / "out/linear-seed1" / LATEST).is_file()
    del runs["impossible"]
    assert main([str(plan_file(options=tiny, runs=runs))]) == 0
    assert "linear-seed1: resumes" in capsys.readouterr().out
    log = (tmp_path / "out/linear-seed1/log.txt").read_text()
    assert log.count('"train_epoch"') == 2  # no epoch trained again
    again = json.loads((tmp_path / "out/linear-seed1/summary.json").read_text())
    assert again["metrics"] == linear["metrics"]
    assert main([str(plan_file(options=tiny, runs=runs))]) == 0
    assert "linear-seed1: finished before" in capsys.readouterr().out


def test_a_new_run_in_an_old_folder_is_not_taken_for_finished(tmp_path, tiny_cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY_CLIPS, *TINY_RUN, f"run.cache_root={tiny_cache}", "run.job_id=same"]
    options += ["run.max_epoch=1", "run.test_splits=[]", "run.valid_splits=[]"]
    path = TRAIN / "shapes_retrieval.yaml"
    folder = launch.run(path, options).output_dir
    assert run_folders.is_finished(folder)

    def stop(*_):
        raise FloatingPointError

    monkeypatch.setattr(launch.console, "describe_start", stop)
    with pytest.raises(FloatingPointError):
        launch.run(path, [*options, "run.resume=auto", "run.max_epoch=9"])
    assert not run_folders.is_finished(folder)
    launch.destroy_process_group()
