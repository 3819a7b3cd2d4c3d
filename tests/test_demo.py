"""The demo, on a fraction of its data."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from omegaconf import OmegaConf
from PIL import Image
from tiny_runs import TINY_CLIPS, TINY_RUN, TINY_STILLS, TRAIN

from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.runners import launch
from lavis_uniadapter.tools import demo, demo_qa_caption


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    for constant, name, data in (
        ("PRETRAIN", "shapes_pretrain", TINY_STILLS),
        ("ADAPT", "shapes_retrieval", TINY_CLIPS),
    ):
        config = OmegaConf.load(TRAIN / f"{name}.yaml")
        config = OmegaConf.merge(config, OmegaConf.from_dotlist([*data, *TINY_RUN]))
        OmegaConf.save(config, tmp_path / f"{name}.yaml")
        monkeypatch.setattr(demo, constant, tmp_path / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    launch.destroy_process_group()


def test_demo_leaves_table_pictures_and_adapter(tiny_demo, capsys):
    assert demo.main(["--seed", "3", "--output-dir", "out"]) == 0
    folder = tiny_demo / "out/clips-seed3"
    report = json.loads((folder / "demo.json").read_text())
    assert report["gallery"] == 5
    assert report["chance"]["t2v_r1"] == 20 and report["chance"]["t2v_medr"] == 3
    for key in ("zero_shot", "adapted"):
        assert {"t2v_r1", "t2v_r5", "t2v_r10", "v2t_medr"} <= set(report[key])
    adapter = folder / "adapter_best/adapter.safetensors"
    assert report["adapter_megabytes"] == adapter.stat().st_size / 1e6
    for picture in ("curves.png", "top5.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200
    printed = capsys.readouterr().out
    assert demo.table(report) in printed
    row = next(line for line in printed.splitlines() if line.startswith("after adapting"))
    assert f"{report['adapted']['t2v_r1']:.1f}" in row


@pytest.fixture
def tiny_qa_caption_demo(tmp_path, monkeypatch):
    small = {"generate.num_train": 8, "generate.num_val": 2, "generate.num_test": 3}
    stages = {}
    for task, paths in demo_qa_caption.STAGES.items():
        for path in paths:
            config = OmegaConf.load(path)
            (name,) = config.datasets
            data = [f"datasets.{name}.{key}={value}" for key, value in small.items()]
            run = ["run.max_epoch=1", "run.num_workers=0", "run.batch_size_train=4"]
            run += ["run.warmup_steps=1", "run.device=cpu", "model.vit.depth=1"]
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([*data, *run]))
            OmegaConf.save(config, tmp_path / path.name)
        stages[task] = tuple(tmp_path / path.name for path in paths)
    monkeypatch.setattr(demo_qa_caption, "STAGES", stages)
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)  # takes seconds to start
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    launch.destroy_process_group()


def test_qa_and_caption_demo(tiny_qa_caption_demo, capsys):
    assert demo_qa_caption.main(["--seed", "3", "--output-dir", "out"]) == 0
    report = json.loads((tiny_qa_caption_demo / "out/demo-seed3.json").read_text())
    printed = capsys.readouterr().out
    assert demo_qa_caption.table(report) in printed
    folder = tiny_qa_caption_demo / "out/qa-clips-seed3"
    items = json.loads((folder / "result/test_epoch_best.json").read_text())
    assert len(items) == 12
    right = 100 * sum(item["prediction"] == item["answer"] for item in items) / 12
    assert report["qa"]["adapted"]["accuracy"] == pytest.approx(right)
    row = next(line for line in printed.splitlines() if line.startswith("after adapting"))
    assert f"{right:.1f}" in row.split()[2]
    # by hand: the most frequent training answer to each kind of question
    training = json.loads(
        next(tiny_qa_caption_demo.rglob("clips/annotations/qa_train.json")).read_text()
    )
    right = 0
    for kind in ("what", "where", "how"):
        answers = [r["answer"] for r in training if r["question"].split()[0] == kind]
        most = Counter(answers).most_common(1)[0][0]
        right += sum(i["answer"] == most for i in items if i["question_type"] == kind)
    assert report["qa"]["majority"]["accuracy"] == pytest.approx(100 * right / 12)
    assert {"cider", "bleu_4", "word_for_word"} <= set(report["caption"]["adapted"])
    with Image.open(tiny_qa_caption_demo / "out/described-seed3.png") as image:
        assert min(image.size) > 200


@pytest.mark.parametrize(
    "path",
    sorted((PACKAGE_ROOT.parent / "projects").glob("*/[te]*/*.yaml")),  # train, eval
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_project_configuration_is_accepted(path):
    config = load_config(path, [f"run.evaluate={path.parent.name == 'eval'}"])
    assert config.model_cfg.arch.startswith("blip_uniadapter_")
    assert config.run_cfg.device in ("cpu", "cuda")
