"""The demo, on a fraction of its data."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_runner import TINY_CLIPS, TINY_RUN, TINY_STILLS, TRAIN

from lavis_uniadapter import demo, launch
from lavis_uniadapter.config import load_config
from lavis_uniadapter.paths import PACKAGE_ROOT


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
    assert report["adapter_bytes"] == adapter.stat().st_size
    for picture in ("curves.png", "top5.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200
    printed = capsys.readouterr().out
    assert demo.table(report) in printed
    row = next(line for line in printed.splitlines() if line.startswith("after adapting"))
    assert f"{report['adapted']['t2v_r1']:.1f}" in row


@pytest.mark.parametrize(
    "path",
    sorted((PACKAGE_ROOT.parent / "projects").rglob("*.yaml")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_project_configuration_is_accepted(path):
    config = load_config(path, [f"run.evaluate={path.parent.name == 'eval'}"])
    assert config.model_cfg.arch == "blip_uniadapter_retrieval"
    assert config.run_cfg.device in ("cpu", "cuda")
