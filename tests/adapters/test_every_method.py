"""What every tuning method promises, on every model: a registered method is tested for free."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import (
    MODELS,
    RETRIEVAL,
    assert_close,
    assert_differ,
    assert_same,
    batch,
    behaviour,
    perturb,
    train_steps,
)

from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.common.errors import ConfigError

BESIDE_A_BACKBONE = [name for name, set_cls in TUNING_METHODS.items() if set_cls]
FOLDABLE = ["lora", "bitfit", "linear"]
OF_HEADS = ("visual embeds", "text embeds")  # which linear probing does not change


@pytest.fixture(params=MODELS)
def arch(request):
    return request.param


def differ(one, other, tuning):
    assert_differ(one, other, but=OF_HEADS if tuning == "linear" else ())


@pytest.mark.parametrize("tuning", TUNING_METHODS)
def test_every_declared_parameter_trains_and_no_other(build_small, arch, tuning):
    """A declared parameter without gradient would also stop distributed training."""
    model = build_small(arch, tuning)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = train_steps(model, batch(arch))
    assert [name for name, g in gradients.items() if g is None] == []
    if tuning == "full":
        assert set(gradients) == set(before)
    else:
        own = model.adapters["default"].named_parameters(prefix="adapters.default")
        assert set(gradients) == {name for name, _ in own}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in gradients), name


@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_round_trip_under_another_seed(build_small, tmp_path, arch, tuning):
    model = build_small(arch, tuning)
    with model.disable_adapter():
        base = behaviour(model)
    # a fresh adapter of the embedded example changes nothing
    assert_close(behaviour(model), base, rtol=1e-5, atol=1e-6)
    train_steps(model, batch(arch))
    tuned = behaviour(model)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        assert_same(base, behaviour(model))
        raise ZeroDivisionError
    differ(base, tuned, tuning)
    assert_same(tuned, behaviour(model))
    model.save_adapter(tmp_path / "adapter", {"r1": 12.5})

    other = build_small(arch, tuning, seed=9)
    other.load_state_dict(base_state_dict(model), strict=False)
    other.base_changed("the same BLIP")
    other.load_adapter(tmp_path / "adapter")
    assert_same(tuned, behaviour(other))
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["metrics"] == {"r1": 12.5} and about["method"] == tuning


@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_two_named_adapters_do_not_interfere(build_small, tmp_path, arch, tuning):
    model, fresh = build_small(arch, tuning), build_small(arch, tuning)
    expected = {}
    for seed, name in enumerate(("one", "two")):
        perturb(model.adapters["default"], seed)
        model.save_adapter(tmp_path / name)
        expected[name] = behaviour(model)
        fresh.load_adapter(tmp_path / name, name=name)
    differ(expected["one"], expected["two"], tuning)
    for name in ("one", "two", "one"):
        fresh.set_adapter(name)
        assert_same(expected[name], behaviour(fresh))


@pytest.mark.parametrize("tuning", TUNING_METHODS)
def test_summary_fits_on_a_screen_and_adds_up(build_small, arch, tuning):
    model = build_small(arch, tuning)
    rows = {}
    for line in model.adapter_summary().splitlines()[1:]:
        if "paper's count" not in line:
            label, number, _ = (part for part in line.split("  ") if part.strip())
            rows[label.strip()] = int(number.replace(",", ""))
    total, trained = rows.pop("total"), rows.pop("trained")
    assert sum(rows.values()) == total == sum(p.numel() for p in model.parameters())
    assert trained == sum(p.numel() for p in model.trainable_parameters().values())
    assert len(rows) < 20
    if tuning != "full":
        assert trained == sum(number for label, number in rows.items() if "active" in label)


@pytest.mark.parametrize("tuning", TUNING_METHODS)
def test_momentum_follows_the_average_once_a_step(build_model, video_batch, tuning):
    model = build_model(tuning=tuning, momentum=0.9, adapter_momentum=0.8).train()
    names = {name.replace(".", "/"): name for name in model.trainable_parameters()}
    averages = {names[key]: value for key, value in model.momentum_average.named_buffers()}
    # Neither the matching head nor what only matching reads of the key/value adapter.
    assert {n for n in averages if "itm_head" in n or "key_value" in n} == set()
    assert any("text_proj" in n for n in averages) and any("vision_proj" in n for n in averages)
    expected = {name: value.clone() for name, value in averages.items()}
    optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=0.1)
    for _ in range(3):
        for name in expected:
            adapter = name.startswith("adapters.") and ".heads." not in name
            decay = 0.8 if adapter else 0.9
            current = model.get_parameter(name).detach()
            expected[name] = decay * expected[name] + (1 - decay) * current
        model(video_batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(averages, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tuning", FOLDABLE)
def test_merging_gives_a_plain_blip_that_computes_the_same(build_small, arch, tuning):
    targets = ["query", "key", "value", "ffn_in", "ffn_out"]
    model = build_small(arch, tuning, lora={"targets": targets})
    perturb(model.adapters, by=0.05)
    tuned = behaviour(model)
    with model.disable_adapter():
        differ(behaviour(model), tuned, tuning)
    fingerprint = model.base_fingerprint
    model.merge_adapter()
    assert list(model.adapters) == [] and model.base_fingerprint != fingerprint
    assert_close(behaviour(model), tuned, rtol=1e-4, atol=1e-5)
    assert not any(name.startswith(("adapters.", "momentum")) for name in model.state_dict())
    plain = build_small(arch, "full", seed=4)
    plain.load_state_dict(base_state_dict(model), strict=False)
    assert_same(behaviour(model), behaviour(plain))


@pytest.mark.parametrize("tuning", [n for n in BESIDE_A_BACKBONE if n not in FOLDABLE])
def test_adapters_beside_layers_cannot_be_merged(build_small, tuning):
    with pytest.raises(ConfigError, match=f"'{tuning}'.*cannot be folded"):
        build_small(RETRIEVAL, tuning).merge_adapter()


@pytest.mark.parametrize("tuning", ["full", "linear"])
def test_methods_without_adapters_do_not_weigh_frames(build_small, tuning):
    models = [
        build_small(RETRIEVAL, tuning, adapter={"frame_aware": frame_aware})
        for frame_aware in (True, False)
    ]
    assert_same(*map(behaviour, models))
