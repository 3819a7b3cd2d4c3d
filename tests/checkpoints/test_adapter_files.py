"""Adapter folders: what they hold, what they show, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    CAPTION,
    RETRIEVAL,
    VIT,
    assert_differ,
    assert_same,
    behaviour,
    perturb,
)

from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.checkpoints.adapter_files import CARD, CONFIG, TENSORS
from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.common.errors import CheckpointError, ConfigError

BESIDE_A_BACKBONE = [name for name, set_cls in TUNING_METHODS.items() if set_cls]


def test_folder_holds_no_backbone_queue_or_average(build_model, tmp_path):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / TENSORS)
    assert sum(t.numel() for t in saved.values()) == model.parameter_counts()["trainable"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {TENSORS, CONFIG, CARD}
    assert not list(tmp_path.glob(".*"))


def test_full_tuning_has_no_adapter_to_save(build_model, tmp_path):
    with pytest.raises(ConfigError, match="full"):
        build_model(tuning="full").save_adapter(tmp_path / "adapter")


def test_saving_replaces_an_adapter_and_nothing_else(build_model, tmp_path):
    model = build_model()
    model.save_adapter(tmp_path / "adapter", {"epoch": 1})
    model.save_adapter(tmp_path / "adapter", {"epoch": 2})
    assert '"epoch": 2' in (tmp_path / "adapter" / CONFIG).read_text()
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(ConfigError, match="file' is a file, or a folder whose"):
        model.save_adapter(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_card_of_the_user_stays(build_model, tmp_path):
    """Theirs from the start, or ours that they edited; one that nobody touched is replaced."""
    model = build_model()
    (tmp_path / CARD).write_text("years of work")
    for _ in range(2):
        model.save_adapter(tmp_path)
        model.load_adapter(tmp_path)
        assert (tmp_path / CARD).read_text() == "years of work"
    card = tmp_path / "adapter" / CARD
    for recall in (1.5, 2.5):
        model.save_adapter(card.parent, {"r1": recall})
        assert f"`r1` {recall}" in card.read_text()
    edited = card.read_text().replace("It holds", "My best one. It holds")
    card.write_text(edited)
    model.save_adapter(card.parent, {"r1": 3.5})
    assert card.read_text() == edited


def test_the_current_folder(build_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model()
    for _ in range(2):
        model.save_adapter(".")
        model.load_adapter(".")
    assert {path.name for path in tmp_path.iterdir()} == {TENSORS, CONFIG, CARD}
    assert Path.cwd() == tmp_path


def test_the_home_folder(build_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = build_model()
    model.save_adapter("~/run/mine")
    model.load_adapter("~/run/mine")
    assert {path.name for path in (tmp_path / "run/mine").iterdir()} == {TENSORS, CONFIG, CARD}
    with pytest.raises(CheckpointError, match=f"Did you mean '{tmp_path}/run/mine'"):
        model.load_adapter("~/run")


@pytest.mark.parametrize("folders", [["one"], ["one", "two"]])
def test_threads_leave_whole_folders(build_model, tmp_path, folders):
    model = build_model()
    models = [build_model() for _ in range(4)]
    for seed, each in enumerate(models):
        perturb(each.adapters, seed)
    places = [tmp_path / folder for folder in folders]

    def save_and_load(each):
        for number in range(3):
            for place in places:
                each.save_adapter(place, {"number": number})
        model.load_adapter(places[0], f"of {id(each)}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save_and_load, models))
    for place in places:
        model.load_adapter(place)
        assert {path.name for path in place.iterdir()} == {TENSORS, CONFIG, CARD}


def test_other_files_of_the_folder_stay(build_model, tmp_path):
    folder = tmp_path / "adapter"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "loss.txt").write_text("loss")
    (folder / "log.txt").write_text("log")
    (tmp_path / "link").symlink_to(folder)
    model = build_model()
    for place in (folder, tmp_path / "link"):
        model.save_adapter(place)
    assert {path.name for path in folder.iterdir()} == {TENSORS, CONFIG, CARD, "plots", "log.txt"}
    assert (folder / "plots" / "loss.txt").read_text() == "loss"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "link"}


@pytest.mark.parametrize("content", ['{"peft_type": "LORA"}', '{"format_version": 4}', "[]", "{"])
def test_config_of_another_library_is_not_overwritten(build_model, tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ConfigError, match=f"{CONFIG} or {TENSORS} save_adapter did not write"):
        build_model().save_adapter(tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / CONFIG]
    assert (tmp_path / CONFIG).read_text() == content


def stop_at_change(monkeypatch, step):
    """From the ``step``-th rename on, nothing changes on the disk: what a kill leaves."""
    calls = []

    def stopped(original):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) >= step:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", stopped(os.replace))
    monkeypatch.setattr(Path, "rename", stopped(Path.rename))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_kill_while_saving_loses_no_adapter_and_blocks_no_save(
    build_model, tmp_path, monkeypatch, step
):
    model = build_model()
    folder = tmp_path / "adapter"
    model.save_adapter(folder)
    saved_before = {k: v.clone() for k, v in model.adapters["default"].state_dict().items()}
    (folder / "log.txt").write_text("log")
    perturb(model.adapters)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_change(patch, step)
        model.save_adapter(folder)
    expected = saved_before if step < 2 else model.adapters["default"].state_dict()
    model.load_adapter(folder, "whole")
    assert_same(expected, model.adapters["whole"].state_dict())
    model.set_adapter("default")
    model.save_adapter(folder)
    model.load_adapter(folder, "again")
    assert {path.name for path in folder.iterdir()} == {TENSORS, CONFIG, CARD, "log.txt"}


def test_tensors_that_a_kill_cut_short_are_ignored_and_removed(build_model, tmp_path):
    model = build_model()
    model.save_adapter(tmp_path)
    waiting = tmp_path / f".{TENSORS}.{json.loads((tmp_path / CONFIG).read_text())['blake2b']}"
    waiting.write_bytes(b"cut")
    model.load_adapter(tmp_path)
    perturb(model.adapters)
    model.save_adapter(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {TENSORS, CONFIG, CARD}


@pytest.mark.parametrize("name", ["active", "layer", "a.b", ""])
def test_bad_name_is_refused_before_files_are_read(build_model, tmp_path, name):
    with pytest.raises(KeyError, match="A name is not empty, has no dot"):
        build_model().load_adapter(tmp_path / "missing", name)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["flipped byte", "cut short", "swapped names", "pickle"])
@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_damaged_tensors_never_load(build_small, tmp_path, tuning, harm):
    model = build_small(RETRIEVAL, tuning)
    perturb(model.adapters)
    model.save_adapter(tmp_path / "adapter")
    before = behaviour(model)
    path = tmp_path / "adapter" / TENSORS
    content = bytearray(path.read_bytes())
    if harm == "flipped byte":
        content[-3] ^= 16
    elif harm == "cut short":
        content = content[:-4]
    elif harm == "swapped names":
        names = sorted(model.adapters["default"].state_dict())
        one, other = (name.encode() for name in names[:2])
        header, placeholder = bytes(content), b"\0" * len(one)
        content = header.replace(b'"%b"' % one, placeholder).replace(b'"%b"' % other, b'"%b"' % one)
        content = content.replace(placeholder, b'"%b"' % other)
        assert content != header
    else:
        content = pickle.dumps({"weights": [1.0]})
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        model.load_adapter(tmp_path / "adapter")
    assert_same(before, behaviour(model))


@pytest.mark.parametrize("harm", ["deleted", "extra", "reshaped"])
def test_tensors_that_do_not_fit_are_named(build_model, tmp_path, harm):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS
    tensors = load_file(path)
    name = "layers.1.down.shared.weight"
    if harm == "deleted":
        del tensors[name]
    elif harm == "extra":
        name = "layers.7.down.shared.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, path)
    change_config(tmp_path, blake2b=hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        model.load_adapter(tmp_path / "adapter")


def change_config(tmp_path, **values):
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_incomplete_folder_never_loads(build_model, tmp_path, name):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink()
    with pytest.raises(CheckpointError, match=f"it has no {name}"):
        model.load_adapter(tmp_path / "adapter")


def test_folder_of_another_version_is_named(build_model, tmp_path):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    change_config(tmp_path, format_version=3)
    with pytest.raises(CheckpointError, match="by another version: format_version"):
        model.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "tuning, overrides, expected",
    [
        ("uniadapter", {"tuning": "linear"}, r"tuning: uniadapter \(model: linear\)"),
        ("uniadapter", {"adapter": {"bottleneck": 4}}, "bottleneck: 8"),
        ("uniadapter", {"adapter": {"kv_bottleneck": 0}}, "kv_bottleneck: 4"),
        ("lora", {"tuning": "lora", "lora": {"rank": 3}}, "rank: 4"),
        ("lora", {"tuning": "lora", "lora": {"targets": ["key"]}}, "targets"),
    ],
)
def test_adapter_of_another_method_or_size_is_refused(
    build_model, tmp_path, tuning, overrides, expected
):
    build_model(tuning=tuning).save_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=expected):
        build_model(**overrides).load_adapter(tmp_path / "adapter")


def test_what_matters_in_training_alone_may_differ(build_model, tmp_path):
    build_model(tuning="lora").save_adapter(tmp_path / "adapter")
    reordered = {"dropout": 0.1, "targets": ["value", "query"]}
    build_model(tuning="lora", lora=reordered).load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("harm", ["nan", "dtype", "arch"])
def test_harm_under_a_right_hash_never_loads(build_model, tmp_path, harm):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS
    tensors = load_file(path)
    name = "layers.1.down.shared.weight"
    expected, changes = name, {}
    if harm == "nan":
        tensors[name][0, 0] = torch.nan
    elif harm == "dtype":
        tensors[name] = tensors[name].to(torch.int64)
    else:
        expected, changes = f"arch: {CAPTION}", {"arch": CAPTION}
    save_file(tensors, path)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    change_config(tmp_path, blake2b=digest, **changes)
    before = behaviour(model)
    with pytest.raises(CheckpointError, match=expected):
        model.load_adapter(tmp_path / "adapter", force=True)
    assert_same(before, behaviour(model))


def test_weights_that_are_not_finite_are_not_saved(build_model, tmp_path):
    model = build_model()
    next(model.adapters.parameters()).data.fill_(torch.inf)
    with pytest.raises(ConfigError, match="not finite"):
        model.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adapter_of_another_base_needs_force(build_small, tmp_path):
    model, other = build_small(RETRIEVAL, seed=0), build_small(RETRIEVAL, seed=1)
    perturb(model.adapters)
    model.save_adapter(tmp_path / "adapter")
    before = behaviour(other)
    with pytest.raises(CheckpointError, match="another base checkpoint"):
        other.load_adapter(tmp_path / "adapter")
    assert_same(before, behaviour(other))
    other.load_adapter(tmp_path / "adapter", force=True)
    assert_differ(before, behaviour(other))


def test_adapter_fits_a_base_whose_random_heads_differ(build_model, tmp_path):
    """Heads that the base checkpoint lacks differ from run to run, and the adapter has its own."""
    base = base_state_dict(build_model())
    base = {k: v for k, v in base.items() if not k.startswith("itm_head")}
    torch.save(base, tmp_path / "base.pth")
    models = [build_model(seed=seed, pretrained=str(tmp_path / "base.pth")) for seed in (1, 2)]
    assert not torch.equal(models[0].itm_head.weight, models[1].itm_head.weight)
    models[0].save_adapter(tmp_path / "adapter")
    models[1].load_adapter(tmp_path / "adapter")


def test_another_prompt_is_logged(build_small, tmp_path, caplog):
    build_small(CAPTION, prompt="there is ").save_adapter(tmp_path / "adapter")
    build_small(CAPTION, prompt="a ").load_adapter(tmp_path / "adapter")
    assert re.search("trained with .*'there is '.*, and the model has .*'a '", caplog.text)


def test_loading_unpickles_nothing(build_model, tmp_path, monkeypatch):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    model.load_adapter(tmp_path / "adapter")


# --- the card -----------------------------------------------------------------------------------


def test_names_in_the_card_are_text(build_model, tmp_path):
    model = build_model()
    model.base_changed("a`b\n\n# [x](http://example.org) <script>.pth")
    model.save_adapter(tmp_path, {"r1\n```": 1.0})
    card = (tmp_path / CARD).read_text()
    assert "* Base checkpoint: `` a`b # [x](http://example.org) <script>.pth `` (" in card
    assert "Measured: ```` r1 ``` ```` 1\n" in card


@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_model_card_shows_what_it_is_and_code_that_works(
    build_small, tmp_path, tuning, small_med_config
):
    """The code runs on a base checkpoint of its own, as a reader of the card would run it."""
    small = {"adapter": {"bottleneck": 4, "kv_bottleneck": 2}, "lora": {"targets": ["key"]}}
    torch.save(base_state_dict(build_small(RETRIEVAL)), tmp_path / "base.pth")
    model = build_small(RETRIEVAL, tuning, pretrained=str(tmp_path / "base.pth"), **small)
    perturb(model.adapters)
    model.save_adapter(tmp_path / "adapter", {"test_t2v_r1": 12.5})
    card = (tmp_path / "adapter" / CARD).read_text()
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    for expected in (
        f"# {tuning} adapter for {RETRIEVAL}",
        f"Parameters: {trained:,}\n",
        "Measured: `test_t2v_r1` 12.5\n",
        model.base_fingerprint,
    ):
        assert expected in card

    code = card.split("```python\n")[1].split("```")[0]
    sizes = {
        **{"vit": None, "image_size": 32, "med_config_path": small_med_config},
        "pretrained": str(tmp_path / "base.pth"),
    }
    code = code.replace("THIS_FOLDER", str(tmp_path / "adapter")).replace("MODEL_TYPE", "shapes")
    base = f"config = OmegaConf.merge(config, {sizes}, {{'vit': {VIT}}})\n"
    names: dict = {}
    exec(code.replace("# config.pretrained", f"{base}# config.pretrained"), names)
    assert_same(behaviour(model), behaviour(names["model"]))
