"""What a result depends on is noted, and compared where something trained is used again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from tiny_runs import TRAIN, options_of

from lavis_uniadapter.checkpoints import blip_files, identity
from lavis_uniadapter.checkpoints.identity import Identity, Source
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import CheckpointError
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.runners.run_checkpoints import LATEST
from lavis_uniadapter.runners.runner import LATEST_ADAPTER
from lavis_uniadapter.tools.compare import report
from lavis_uniadapter.tools.compare.running import Line

RECIPE = TRAIN / "shapes_retrieval.yaml"
SHORT = ("run.max_epoch=1", "run.valid_splits=[]", "run.test_splits=[]")


def save_base(path: Path, options, seed: int) -> None:
    torch.manual_seed(seed)
    section = load_config(RECIPE, options).model_cfg
    model = BlipUniAdapterRetrieval.from_config(section)
    torch.save({"model": blip_files.base_state_dict(model)}, path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_cache):
    """A folder with a run of one epoch, and the options of the run."""
    folder = tmp_path_factory.mktemp("trained")
    options = options_of("shapes_retrieval", tiny_cache)
    save_base(folder / "base.pth", options, seed=0)
    options += [f"model.pretrained={folder / 'base.pth'}", f"run.output_dir={folder}"]
    launch.run(RECIPE, [*options, *SHORT, "run.job_id=run"])
    yield folder, options
    launch.destroy_process_group()


@pytest.fixture
def evaluate(trained):
    """Evaluate what the run trained, its checkpoint or its adapter, with other options."""
    folder, options = trained

    def start(*others, part="checkpoint"):
        path = folder / "run" / {"checkpoint": LATEST, "adapter": LATEST_ADAPTER}[part]
        key = {"checkpoint": "run.resume_ckpt_path", "adapter": "model.adapter_ckpt"}[part]
        return launch.run(RECIPE, [*options, f"{key}={path}", *others], evaluate=True)

    return start


@pytest.mark.parametrize("part", ["checkpoint", "adapter"])
def test_another_base_is_refused_in_evaluation(evaluate, part):
    expected = r"another base checkpoint: 'base.pth' \(\w{8}\) then, 'random weights' "
    with pytest.raises(CheckpointError, match=expected + ".* Set model.pretrained"):
        evaluate("model.pretrained=null", part=part)


@pytest.fixture
def few_words(tmp_path):
    """A folder with a tokenizer of the first words of the embedded example."""
    words = (PACKAGE_ROOT / "configs/tokenizers/shapes/vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join(words[:60]) + "\n")
    return str(tmp_path)


@pytest.mark.parametrize("part", ["checkpoint", "adapter"])
def test_fewer_words_are_refused(evaluate, part, few_words):
    with pytest.raises(CheckpointError, match=r"another vocabulary: '\d+ tokens'.* then, '62 "):
        evaluate(f"model.tokenizer={few_words}", part=part)


def test_normalisation_is_refused_frames_are_named_and_force_is_heeded(evaluate, caplog):
    processor = "datasets.shapes_retrieval.vis_processor.eval"
    for part in ("checkpoint", "adapter"):
        with pytest.raises(CheckpointError, match=r"another eval\.mean: \[0\.48.* then, \[0\.5"):
            evaluate(f"{processor}.mean=[0.5,0.5,0.5]", part=part)
    assert "eval.n_frms" not in caplog.text
    result = evaluate(f"{processor}.n_frms=3", "model.pretrained=null", "model.force=True")
    assert caplog.text.count("another base checkpoint") == 1
    assert caplog.text.count("another eval.n_frms: 2 then, 3 now") == 1
    summary = json.loads((result.output_dir / run_folders.SUMMARY).read_text())
    assert summary["untrained"] is False


def test_resume_refuses_an_overwritten_base_and_other_records(trained, tmp_path):
    folder, options = trained
    resumed = [*options, *SHORT, "run.max_epoch=2", "run.job_id=run", "run.resume=auto"]
    with pytest.raises(
        CheckpointError, match=r"training records of shapes_retrieval: '\d+ records'"
    ):
        other = ("datasets.shapes_retrieval.generate.seed=1", f"run.cache_root={tmp_path}")
        launch.run(RECIPE, [*resumed, *other])
    with pytest.raises(CheckpointError, match=r"another train\.n_frms: 2 then, 3 now"):
        launch.run(RECIPE, [*resumed, "datasets.shapes_retrieval.vis_processor.train.n_frms=3"])
    content = (folder / "base.pth").read_bytes()
    save_base(folder / "base.pth", options_of("shapes_retrieval", folder), seed=1)
    try:
        with pytest.raises(CheckpointError, match="another base checkpoint: 'base.pth'"):
            launch.run(RECIPE, resumed)
    finally:
        (folder / "base.pth").write_bytes(content)


def test_what_was_not_trained_is_said(trained, caplog):
    folder, options = trained
    result = launch.run(RECIPE, options, evaluate=True)
    assert "this scores the untrained start: 'uniadapter' on 'base.pth'" in caplog.text
    assert "scores the untrained start" in (result.output_dir / "run.log").read_text()
    line = Line("nothing trained", runs=[run_folders.read(result.output_dir)])
    rows = report.rows_of([line], ["t2v_r1"])
    assert rows[0]["untrained"]
    assert "so the start is scored: nothing trained" in report.markdown_table(rows, ["t2v_r1"])


# --- what is hashed -----------------------------------------------------------------------------


def test_records_in_another_order_or_words_are_others(build_model):
    processors = {"eval": {"image_size": 32}}
    content = {"run": {"evaluate": False}, "datasets": {"d": {"vis_processor": processors}}}
    config = SimpleNamespace(run_cfg=OmegaConf.create(content["run"]), to_dict=lambda: content)
    model = build_model()
    records = [{"image": "1.jpg", "caption": "a dog"}, {"image": "2.jpg", "caption": "a cat"}]
    known = []
    for order in (records, [*records], records[::-1], [records[0], {**records[1], "caption": "x"}]):
        split = SimpleNamespace(annotation=order)
        known.append(identity.of_run(model, config, {"d": {"train": split}}))
    identity.check(known[0], known[1], "run", force=False)
    for other in known[2:]:
        with pytest.raises(CheckpointError, match="training records of d"):
            identity.check(known[0], other, "run", force=False)


def test_precision_does_not_change_a_base_and_other_weights_do(build_model, tmp_path):
    model, half, other = build_model(), build_model().half(), build_model(seed=1)
    model.save_adapter(tmp_path)
    half.load_adapter(tmp_path)
    half.load_state_dict(half.state_dict())
    assert half.base_fingerprint == model.base_fingerprint != other.base_fingerprint
    half.to(torch.bfloat16)
    assert half.base_fingerprint == model.base_fingerprint
    model.load_state_dict(other.state_dict())
    assert model.base_fingerprint == other.base_fingerprint
    with pytest.raises(CheckpointError, match="another base"):
        model.load_adapter(tmp_path)


def test_a_base_is_the_same_at_another_image_size(build_model, tmp_path):
    torch.save(blip_files.base_state_dict(build_model()), tmp_path / "base.pth")
    base = str(tmp_path / "base.pth")
    small, large = (build_model(pretrained=base, image_size=size) for size in (32, 64))
    assert small.base_fingerprint == large.base_fingerprint
    assert identity.of_model(small).base.name == "base.pth"
    assert identity.of_model(build_model(tuning="full")).base is None


def test_a_base_that_a_run_trained_keeps_its_vocabulary(build_model, few_words, tmp_path):
    model = build_model(tuning="full")
    noted = identity.of_model(model).model_dump()
    content = {"model": blip_files.base_state_dict(model), "identity": noted}
    torch.save(content, tmp_path / "full.pth")
    build_model(pretrained=str(tmp_path / "full.pth"), image_size=64)
    with pytest.raises(CheckpointError, match="full.pth' was trained with another vocabulary"):
        build_model(pretrained=str(tmp_path / "full.pth"), tokenizer=few_words)


def test_a_run_notes_it_in_its_folder_too(trained):
    folder = trained[0] / "run"
    noted = json.loads((folder / run_folders.CONFIG).read_text())["identity"]
    assert Identity(**noted) == identity.of_checkpoint(folder / LATEST)
    assert noted["base"]["name"] == "base.pth" and noted["data"]


def test_lavis_runners_note_it_beside_the_checkpoint(tmp_path, caplog):
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": {}, "optimizer": {}}, path)
    assert identity.of_checkpoint(path) == Identity()
    known = Identity(base=Source(name="base.pth", fingerprint="12"))
    identity.check(identity.of_checkpoint(path), known, path, force=False)
    assert "does not say which base checkpoint" in caplog.text
    (tmp_path / run_folders.CONFIG).write_text(json.dumps({"identity": known.model_dump()}))
    assert identity.of_checkpoint(path) == known


@pytest.mark.parametrize("content", ["[]", '{"identity": null}', "{}"])
def test_a_configuration_of_something_else_beside_a_checkpoint(tmp_path, content):
    torch.save({"model": {}, "optimizer": {}}, tmp_path / "checkpoint_best.pth")
    (tmp_path / identity.RUN_CONFIG).write_text(content)
    assert identity.of_checkpoint(tmp_path / "checkpoint_best.pth") == identity.Identity()
