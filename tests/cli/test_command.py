"""The command ``uniadapter``: what is quick, what it lists and copies, how it runs a recipe."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from kill_and_resume import first_difference
from lavis.common.registry import registry
from tiny_runs import ROOT, TINY_CLIPS, TINY_RUN, TRAIN, held_by_another_process

from lavis_uniadapter.checkpoints.adapter_files import TENSORS
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.runners import launch
from lavis_uniadapter.runners.run_checkpoints import LATEST
from lavis_uniadapter.tools import recipes
from lavis_uniadapter.tools.compare.plan import read_plan
from uniadapter_cli.main import COMMANDS, main

CASES = {
    "": (2, "commands:\n  train "),
    "--help": (0, "copy a recipe"),
    **{f"{name} --help": (0, f"uniadapter {name}") for name in COMMANDS},
    "ls": (0, "MSR-VTT text-video retrieval"),
    "cp msrvtt_retrieval my.yaml": (0, "written: my.yaml"),
    "cp msrvtt_retrieval no/my.yaml": (2, "No folder 'no'"),
    "trian": (2, "trian"),
    "train": (2, "give one recipe"),
    "train msrvtt_retrieval didemo_retrieval": (2, "give one recipe"),
    "train msrvtt_retreival": (2, "Did you mean 'msrvtt_retrieval'?"),
    "evaluate none.yaml": (2, "No configuration file or recipe 'none.yaml'"),
    "evaluate shapes_retrieval --adapter none": (2, "'none' is not an adapter folder"),
    "train shapes_retrieval run.k_tets=3": (2, "Did you mean 'k_test'?"),
    "train shapes_retrieval run.init_lr=-1": (2, "run.init_lr is -1"),
    "predict caption . --cfg shapes_qa --output x.csv": (2, "Use 'uniadapter predict qa'"),
    "predict caption no --cfg shapes_caption --output x.csv": (
        2,
        "There is no folder or file 'no'",
    ),
    "predict caption . --cfg shapes_caption --output x.txt": (2, "must end in .jsonl or .csv"),
    "predict retrieval . --cfg shapes_retrieval --output x.csv": (2, "Give --text TEXT"),
    "compare vqa": (2, "Did you mean 'vqav2'?"),
    "compare": (2, "Give a PLAN"),
    "compare shapes_methods --metrics t2v_R1": (2, "no run measures 't2v_R1'. Did you mean"),
    "compare shapes_methods --runs linaer": (2, "'linaer' is not a run. Did you mean 'linear'?"),
    "compare --runs a --add a=. --metrics x --output-dir o": (2, "Give a PLAN"),
    "compare vqav2 --metrics acuracy": (2, "Did you mean 'accuracy'?"),
    "compare shapes_methods model.tunign=lora": (2, "run 'base': Unknown configuration key"),
    "compare shapes_methods --jobs 0": (2, "0 is not a whole number of 1 or more"),
    "compare --add a=none --metrics x --output-dir o": (2, "--add 'a=none' is not NAME=FOLDER"),
    "compare --job 1 --mertics x": (2, "--mertics"),
    "prepare msrvtt --vidoes x": (2, "required: --videos"),
    "search index --cfg none .": (2, "No configuration file or recipe 'none'"),
    "search index . --cfg shapes_retrieval --options run.k_tets=1": (2, "Did you mean 'k_test'?"),
    "search query x --index none": (2, "'none' holds no index"),
    "search serve --index . --qa-cfg none": (2, "No configuration file or recipe 'none'"),
    "search serve --prot 1": (2, "--prot"),
    "compare shapes_retrieval": (2, "Another command takes it."),
    "demo vqa": (2, "invalid choice: 'vqa'"),
    "demo --seed -3": (2, "run.seed is -3"),
    "demo --options run.max_epoch=0": (2, "run.max_epoch is 0"),
    "doctor all": (2, "unrecognized arguments: all"),
    "train shapes_retrieval run.num_workers=1000000": (2, "This run needs at least "),
}
# What needs the names that LAVIS registers.
NAMES = {
    "train shapes_retrieval run.task=vqaa": "run.task is 'vqaa'. Did you mean 'vqa'?",
    "train shapes_retrieval run.lr_sched=cosine": "run.lr_sched is 'cosine'",
    "train shapes_retrieval run.runner=runner_bse": "Did you mean 'runner_base'?",
    "train shapes_retrieval datasets.flickr={}": "Unknown dataset 'flickr'. Did you mean",
    "train blip_retrieval_flickr model.arch=blip_retreival": "Did you mean 'blip_retrieval'?",
    "train flickr_retrieval datasets.flickr30k.vis_processor.train.name=blip": "train.name is 'b",
    "train flickr_retrieval datasets.flickr30k.vis_processor.eval.sizee=4": "key 'datasets.flickr",
    "train blip_retrieval_flickr model.model_type=cocoo": "is 'cocoo'. Did you mean 'coco'?",
    "train custom_retrieval datasets.custom_retrieval.type=x": "type is 'x'. Known: default.",
    "evaluate flickr_retrieval model.image_size=224": "model.image_size is 224. Give both the",
}
ANSWER = """
import contextlib, io, json, sys
from uniadapter_cli.main import main
answers = {}
for case in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(case.split())
        except SystemExit as end:
            status = end.code
    answers[case] = status, out.getvalue(), err.getvalue()
assert not any(map(sys.modules.get, ("torch", "lavis", "transformers")))
print(json.dumps(answers))
"""
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "lavis", "transformers", "numpy", "matplotlib")))
"""


def ask(code: str, cases, folder) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(cases))],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the command answers where PyTorch and LAVIS cannot be imported, in an empty folder."""
    return ask(WITHOUT_TORCH + ANSWER, CASES, tmp_path_factory.mktemp("light"))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What the command answers where they could be imported, and are not."""
    return ask(ANSWER, NAMES, tmp_path_factory.mktemp("light"))


@pytest.mark.parametrize("case", NAMES)
def test_wrong_names_are_refused_before_lavis_is_imported(refusals, case):
    status, _, err = refusals[case]
    assert status == 2 and NAMES[case] in err, err


@pytest.mark.parametrize("module", ["lavis_uniadapter", "lavis_uniadapter.demo"])
def test_the_package_is_the_command_too(tmp_path, module):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage: uniadapter" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "lavis", "transformers"}


@pytest.mark.parametrize("case", CASES)
def test_answers_without_torch_and_lavis(answers, case):
    expected_status, expected = CASES[case]
    status, out, err = answers[case]
    assert status == expected_status, err
    assert expected in (err if status else out)


def test_lists_what_lavis_knows(capsys):
    assert main(["ls"]) == 0
    printed = capsys.readouterr().out
    for arch, types in recipes.model_types().items():
        cls = registry.get_model_class(arch)
        assert set(types) == set(cls.PRETRAINED_MODEL_CONFIG_DICT)
        assert f"{arch}" in printed
    ours = [name for name in registry.list_models() if name.startswith("blip_uniadapter")]
    assert set(recipes.model_types()) == set(ours)
    used = recipes.datasets(recipes.runs())
    assert set(used) <= set(registry.list_datasets())
    assert used["flickr30k"][0] == "flickr_retrieval"
    assert all(recipes.description(path) for path in recipes.runs().values())


def test_a_copied_recipe_is_the_recipe(tmp_path):
    copy = recipes.copy("msrvtt_retrieval", tmp_path / "my.yaml")
    assert copy.read_text() == (TRAIN / "msrvtt_retrieval.yaml").read_text()
    with pytest.raises(ConfigError, match="my.yaml' exists"):
        recipes.copy("msrvtt_retrieval", copy)


def test_a_copied_comparison_runs_the_same_recipes(tmp_path):
    copy = recipes.copy("compare/flickr_retrieval", tmp_path / "my.yaml")
    assert read_plan(copy) == read_plan(recipes.comparisons()["flickr_retrieval"])


@pytest.mark.usefixtures("emoji_folder")
@pytest.mark.parametrize("options", [[], ["run.evaluate=True"]], ids=["train", "evaluate"])
@pytest.mark.parametrize("name", recipes.runs())
def test_every_recipe_is_accepted(name, options):
    assert load_config(recipes.runs()[name], options).run_cfg.device in ("cpu", "cuda")


@pytest.fixture
def tiny(tmp_path, tiny_cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield [*TINY_CLIPS, *TINY_RUN, f"run.cache_root={tiny_cache}"]
    launch.destroy_process_group()


def test_trains_a_recipe_by_name_and_evaluates_its_adapter(tiny, tmp_path, capsys):
    """Options between the flags, and in both spellings."""
    recipe = "shapes_retrieval"
    assert main(["train", recipe, *tiny, "run.job_id=one", "run.max_epoch=1"]) == 0
    folder = tmp_path / "output/shapes_retrieval"
    adapter = str(folder / "one/adapter_best")
    capsys.readouterr()
    options = [*tiny, "--options", "run.job_id=two"]
    assert main(["evaluate", "run.k_test=4", "--adapter", adapter, recipe, *options]) == 0
    printed = capsys.readouterr().out
    assert f"adapter: {adapter}" in printed and "test t2v: r1" in printed
    assert (folder / "two/summary.json").is_file()


def test_dry_run_names_a_folder_that_is_taken(tiny, tmp_path, capsys):
    folder = tmp_path / "output/shapes_retrieval/taken"
    folder.mkdir(parents=True)
    torch.save({"model": {}, "optimizer": {}, "epoch": 0}, folder / LATEST)
    arguments = ["train", "shapes_retrieval", "--dry-run", *tiny, "run.job_id=taken"]
    assert main(arguments) == 2
    assert "holds a run already. Set run.resume=auto" in capsys.readouterr().err
    with held_by_another_process(folder):
        assert main(arguments) == 2
    assert "Another process is using" in capsys.readouterr().err


def test_trains_on_from_an_adapter(tiny, tmp_path, capsys):
    recipe = ["train", "shapes_retrieval", *tiny, "run.valid_splits=[]", "run.test_splits=[]"]
    assert main([*recipe, "run.job_id=first"]) == 0
    folder = tmp_path / "output/shapes_retrieval"
    start = str(folder / "first/adapter_latest")
    still = ("run.max_epoch=1", "run.init_lr=0", "run.min_lr=0", "run.warmup_lr=0")
    assert main([*recipe, "--adapter", start, "run.job_id=second", *still]) == 0
    assert f"adapter: {start}" in capsys.readouterr().out
    saved = (folder / name / "adapter_latest" / TENSORS for name in ("first", "second"))
    assert first_difference(*map(safetensors.torch.load_file, saved)) is None


@pytest.mark.parametrize(
    "command, option, expected",
    [
        ("train", "", "dataset: shapes_retrieval, items: train 12, val 4, test 5"),
        ("evaluate", "", "dataset: shapes_retrieval, items: test 5"),
        ("train", "model.pretrained=none.pth", "No checkpoint at 'none.pth'"),
        ("train", "model.pretrained=configs", "No checkpoint at 'configs'"),  # of the package
        ("train", "model.adapter_ckpt=none", "model.adapter_ckpt: 'none' is not an adapter folder"),
        ("train", "model.load_finetuned=True", "model.finetuned is None"),
        ("evaluate", "model.finetuned=no.pth", "load_finetuned is False"),
        ("train", "run.batch_size_train=99", "fewer than run.batch_size_train 99"),
        ("train", "max_epoch=3", "'max_epoch' is not a section. Did you mean 'run.max_epoch'?"),
        ("train", "run.test_splits=[tset]", "run.test_splits names 'tset'"),
        ("train", "model.tunning=full", "Did you mean 'tuning'?"),
    ],
)
def test_dry_run_checks_and_leaves_no_run(tiny, tmp_path, capsys, command, option, expected):
    arguments = [command, "shapes_retrieval", "--dry-run", *tiny, *filter(None, [option])]
    assert main(arguments) == (2 if option else 0)
    captured = capsys.readouterr()
    assert expected in (captured.err if option else captured.out)
    assert not (tmp_path / "output").exists()


def test_dry_run_names_missing_files(tiny, capsys):
    assert main(["train", "msrvtt_retrieval", "--dry-run", "run.cache_root=empty"]) == 2
    assert "msrvtt" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch, tmp_path, capsys):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["cp", "shapes_qa", str(tmp_path / "mine.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{tmp_path / 'mine.yaml'}': No space") and "Free" in error
    assert not [*tmp_path.iterdir()]
