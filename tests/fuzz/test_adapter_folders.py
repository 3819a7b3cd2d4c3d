"""Adapter folders that are damaged: refused, or loaded as they were saved."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from fuzzing import (
    examples,
    harmed,
    strings,
    value_texts,
)
from hypothesis import given
from hypothesis import strategies as st
from small_models import perturb

from lavis_uniadapter.checkpoints.adapter_files import CONFIG, TENSORS
from lavis_uniadapter.common.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(build_model, tmp_path_factory):
    """A model, the folder of its adapter, and where to put a damaged one."""
    model = build_model()
    perturb(model.adapters)
    root = tmp_path_factory.mktemp("adapters")
    model.save_adapter(root / "sound", {"t2v_r1": 51.25})
    return model, root / "sound", root / "damaged"


def load_or_refuse(saved, **changed: bytes) -> CheckpointError | None:
    """Load an adapter with other files: refused, or the tensors that were saved."""
    model, sound, damaged = saved
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(sound, damaged)
    for name, content in changed.items():
        (damaged / {"tensors": TENSORS, "config": CONFIG}[name]).write_bytes(content)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        model.load_adapter(damaged, "loaded")
    except CheckpointError as error:
        assert str(damaged) in str(error)
        assert list(model.adapters) == ["default"]
        raised = error
    else:
        raised = None
        loaded, expected = (model.adapters[n].state_dict() for n in ("loaded", "default"))
        assert list(loaded) == list(expected)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
        model.set_adapter("default")
        model.delete_adapter("loaded")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return raised


@examples(60)
@given(st.data())
def test_harmed_tensors_never_load(saved, data):
    content = (saved[1] / TENSORS).read_bytes()
    new = data.draw(harmed(content))
    assert (load_or_refuse(saved, tensors=new) is None) == (new == content)


@examples(60)
@given(st.data())
def test_tensors_harmed_under_a_right_hash_raise_nothing_else(saved, data):
    """As a download would be that was damaged before it was saved."""
    model, sound, damaged = saved
    content = (sound / TENSORS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    new = data.draw(harmed(content[:header])) + content[header:]
    config = json.loads((sound / CONFIG).read_text())
    config["blake2b"] = hashlib.blake2b(new, digest_size=16).hexdigest()
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(sound, damaged)
    (damaged / TENSORS).write_bytes(new)
    (damaged / CONFIG).write_text(json.dumps(config))
    try:
        model.load_adapter(damaged, "loaded")
    except CheckpointError:
        assert list(model.adapters) == ["default"]
    else:
        model.set_adapter("default")
        model.delete_adapter("loaded")


@examples(60)
@given(st.data())
def test_a_harmed_config_is_refused_or_means_the_same(saved, data):
    load_or_refuse(saved, config=data.draw(harmed((saved[1] / CONFIG).read_bytes())))


@examples(60)
@given(st.data(), value_texts)
def test_a_config_of_any_values_is_refused_or_means_the_same(saved, data, text):
    config = json.loads((saved[1] / CONFIG).read_text())
    mark = "put the value here"
    inside, key = config, data.draw(st.sampled_from(sorted(config)))
    if isinstance(config[key], dict) and config[key] and data.draw(st.booleans()):
        inside, key = config[key], data.draw(st.sampled_from(sorted(config[key])))
    if data.draw(st.booleans()):
        inside[key] = mark
    else:
        inside[data.draw(strings)] = mark
    content = json.dumps(config).replace(json.dumps(mark), text)
    load_or_refuse(saved, config=content.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("configuration", ["bottleneck"]),
        ("configuration", {"bottelneck": 8}),
        ("configuration", {"bottleneck": -8}),
        ("settings", 35),
        ("base", "random weights"),
        ("base", {"name": "random weights"}),
        ("base", None),
        ("vocabulary", None),
        ("blake2b", None),
    ],
)
def test_a_config_of_other_kinds_is_called_damaged(saved, key, value):
    config = json.loads((saved[1] / CONFIG).read_text())
    config[key] = value
    assert "is damaged" in str(load_or_refuse(saved, config=json.dumps(config).encode()))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n  "),
        lambda text: text.replace("51.25", "3"),
        lambda text: json.dumps(dict(reversed(json.loads(text).items()))),
    ],
)
def test_a_config_that_means_the_same_loads(saved, change):
    text = (saved[1] / CONFIG).read_text()
    assert change(text) != text
    assert load_or_refuse(saved, config=change(text).encode()) is None
