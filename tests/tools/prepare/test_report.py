"""What `prepare` writes, reports and recommends to run."""

import json
import re
import runpy
import shlex
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.tasks import setup_task
from published import counts_in, snapshot

from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import destroy_process_group, init_process_group
from lavis_uniadapter.datasets.building import check_built, make_buildable
from lavis_uniadapter.tools import recipes
from lavis_uniadapter.tools.prepare.annotations import encode
from lavis_uniadapter.tools.prepare.benchmarks import Split
from lavis_uniadapter.tools.prepare.command import main


def test_other_contents_are_replaced_only_when_told_to(msr):
    msr.succeed()
    before = snapshot(msr.output)
    msr.succeed()  # the same again
    msr.data["sentences"][0]["caption"] = "another"  # video0
    msr.save()
    message = msr.fail()
    assert re.search(r"retrieval_train.json, .*cap_train.json exist with other contents", message)
    msr.succeed("--overwrite")
    changed = {path for path, state in snapshot(msr.output).items() if before[path] != state}
    assert set(map(str, changed)) == {"retrieval_train.json", "cap_train.json"}
    assert msr.written("cap_train.json")[0]["caption"] == "another"


@pytest.mark.parametrize("below", ["", "annotations"])
def test_an_output_that_cannot_be_written_is_an_error(msr, below):
    msr.output.write_text("a file")
    status, out, err = msr.run("--output", msr.output / below)
    assert (status, out) == (2, "")
    expected = f"--output is {msr.output / below}, but {msr.output} is not a folder you can"
    assert err.startswith(f"error: {expected}")  # without a progress bar before it
    assert msr.output.read_text() == "a file"


@settings(deadline=None)
@given(st.lists(st.text()))
def test_any_caption_survives_in_any_locale(captions):
    split = Split("msrvtt_retrieval", "train", {"a.mp4": captions}, "", (1, 1))
    read = json.loads(encode(split, {"a.mp4": "a.mov"}).decode("ascii"))
    assert read == [{"video": "a.mov", "caption": caption} for caption in captions]


def counts_of(workplace):
    counts = {}
    for path in workplace.output.iterdir():
        records = json.loads(path.read_text())
        captions = [r["caption"] for r in records]
        captions = sum(([c] if isinstance(c, str) else c for c in captions), [])
        counts[path.name] = (len({r["video"] for r in records}), len(captions))
    return counts


def test_the_report_counts_what_the_files_hold(msr):
    (msr.videos / "video1.mp4").unlink()
    msr.data["sentences"][3]["caption"] = ""  # video3
    msr.save()
    report = msr.succeed("--skip-missing", "--num-val", 2)
    assert counts_in(report) == counts_of(msr)
    assert counts_in(report)["cap_train.json"] == (3, 8)


def test_the_report_of_didemo_counts_what_the_files_hold(did):
    report = did.succeed(*did.val)
    assert counts_in(report) == counts_of(did)
    assert counts_in(report)["retrieval_test.json"] == (2, 2)


def printed_commands(report):
    lines = report.split("next:\n")[1].replace("\\\n", " ").splitlines()
    return {words[2]: words for words in map(shlex.split, lines)}


@pytest.fixture
def process_group():
    yield
    destroy_process_group()


def built(command, workplace, monkeypatch):
    """The datasets of a printed command, as a run builds and checks them."""
    assert command[:2] == ["uniadapter", "train"]
    config = load_config(recipes.find(command[2], recipes.runs()), command[3:])
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(workplace.root / "elsewhere"))
    init_process_group("cpu")
    run = config.run_cfg
    splits = [*run.train_splits, *run.valid_splits, *run.test_splits]
    make_buildable(config.datasets_cfg, splits)
    datasets = setup_task(config).build_datasets(config)
    check_built(datasets, config.datasets_cfg)
    (datasets,) = datasets.values()
    assert set(datasets) == set(splits)
    assert datasets["train"][0]["video"].shape[1:] == (8, 224, 224)
    return datasets


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("num_val", [0, 2])
def test_the_next_commands_of_msrvtt_find_the_files(msr, monkeypatch, num_val):
    monkeypatch.chdir(msr.root)  # relative paths are the command line's, not LAVIS's
    msr.options[1], msr.options[3] = "cache/msrvtt/videos", "cache/msrvtt/annotations"
    commands = printed_commands(msr.succeed("--num-val", num_val))
    assert list(commands) == ["msrvtt_retrieval", "msrvtt_caption"]
    datasets = built(commands["msrvtt_retrieval"], msr, monkeypatch)
    assert set(datasets) == {"train", "test"} | ({"val"} if num_val else set())
    assert len(datasets["train"]) == 3 * (8 - num_val)
    datasets = built(commands["msrvtt_caption"], msr, monkeypatch)
    assert {split: len(d) for split, d in datasets.items()} == {"train": 12, "val": 2, "test": 4}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("validated", [True, False])
def test_the_next_command_of_didemo_finds_the_files(did, monkeypatch, validated):
    commands = printed_commands(did.succeed(*(did.val if validated else [])))
    assert list(commands) == ["didemo_retrieval"]
    datasets = built(commands["didemo_retrieval"], did, monkeypatch)
    expected = {"train": 2, "test": 2} | ({"val": 1} if validated else {})
    assert {split: len(dataset) for split, dataset in datasets.items()} == expected


# --- the command line -----------------------------------------------------------------------------


def test_the_command_runs_as_a_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "check", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("lavis_uniadapter.prepare", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no videos")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    listed = re.findall(r"^ {4}(\w+) +\S", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["msrvtt", "didemo", "frames", "check", "emoji"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required: "),
        (["msrvt"], "invalid choice: 'msrvt'"),
        (["msrvtt"], "required: "),
        (["didemo", "--train", "a"], "required: "),
        (["frames", "--videos", "nowhere"], "--videos: nowhere is not an existing folder"),
        (["frames", "--videos", ".", "--frames", "0"], "--frames: 0 is not a whole number of 1"),
    ],
)
def test_wrong_command_lines_say_why(argv, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
