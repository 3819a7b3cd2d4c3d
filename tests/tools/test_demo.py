"""The demo, on a fraction of its data."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from omegaconf import OmegaConf
from PIL import Image
from tiny_runs import TINY_CLIPS, TINY_RUN, TINY_STILLS

from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.runners import launch
from lavis_uniadapter.tools import demo, recipes
from uniadapter_cli.main import main


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo's recipes by their own names, made tiny."""
    files = {}
    for names in recipes.STAGES.values():
        for name in names:
            config = OmegaConf.load(recipes.runs()[name])
            (dataset,) = config.datasets
            if dataset.endswith("retrieval"):
                tiny = [*(TINY_STILLS if "image" in dataset else TINY_CLIPS), *TINY_RUN]
            else:
                sizes = {"num_train": 8, "num_val": 2, "num_test": 3}
                tiny = [f"datasets.{dataset}.generate.{key}={n}" for key, n in sizes.items()]
                tiny += ["run.max_epoch=1", "run.num_workers=0", "run.batch_size_train=4"]
                tiny += ["run.warmup_steps=1", "run.device=cpu", "model.vit.depth=1"]
            files[name] = tmp_path / f"{name}.yaml"
            OmegaConf.save(OmegaConf.merge(config, OmegaConf.from_dotlist(tiny)), files[name])
    monkeypatch.setattr(recipes, "runs", lambda: files)
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)  # takes seconds to start
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    launch.destroy_process_group()


@pytest.mark.parametrize("task", recipes.STAGES)
def test_demo_leaves_table_picture_and_adapter(tiny_demo, task, capsys):
    folder = tiny_demo / f"out/{task}-clips-seed3"
    folder.mkdir(parents=True)  # of an earlier demo, whose stages are not reused
    (folder / "config.json").write_text("{}")
    (folder / "log.txt").write_text("earlier")
    assert main(["demo", task, "--seed", "3", "--output-dir", "out"]) == 0
    assert "earlier" not in (folder / "log.txt").read_text()
    report = json.loads((folder / "demo.json").read_text())
    for row in ("before (zero-shot)", "after adapting"):
        assert set(demo.METRICS[task]) <= set(report["metrics"][row])
    adapter = folder / "adapter_best/adapter.safetensors"
    assert report["adapter_megabytes"] == adapter.stat().st_size / 1e6
    with Image.open(folder / "clips.png") as image:
        assert min(image.size) > 200
    printed = capsys.readouterr().out
    assert demo.table(report) in printed
    row = next(line for line in printed.splitlines() if line.startswith("after adapting"))
    first = report["metrics"]["after adapting"][demo.METRICS[task][0]]
    assert row.split()[2] == f"{first:.1f}"
    if task == "retrieval":
        assert report["test_items"] == 5
        assert report["metrics"]["chance"] == demo.chance(5)
        assert demo.chance(5)["t2v_r1"] == 20 and demo.chance(5)["v2t_medr"] == 3
    if task == "qa":
        majority = report["metrics"]["majority answer"]["accuracy"]
        assert majority == pytest.approx(accuracy_of_majority_answers(tiny_demo, folder))


def accuracy_of_majority_answers(root, folder) -> float:
    items = json.loads((folder / "result/test_epoch_best.json").read_text())
    training = json.loads(next(root.rglob("clips/annotations/qa_train.json")).read_text())
    right = 0
    for kind in ("what", "where", "how"):
        answers = [r["answer"] for r in training if r["question"].split()[0] == kind]
        most = Counter(answers).most_common(1)[0][0]
        right += sum(i["answer"] == most for i in items if i["question_type"] == kind)
    return 100 * right / len(items)
