"""What every tuning method must keep, whatever it is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_uniadapter.adapters import AdapterConfig, BackboneGeometry, UniAdapterSet
from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.common.errors import CheckpointError, ConfigError

METHODS = tuple(TUNING_METHODS)
BLIP_BASE = BackboneGeometry(768, 12, 768, 12, {"text_encoder": 768})


def perturb(module, seed=1, by=0.1):
    """Move every parameter off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * by)


def outputs(model, batch):
    """All that a retrieval model computes for a batch, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        visuals = model.encode_visual(batch)
        texts = model.encode_text(batch["text_input"])
        logits = model.match(texts, visuals, torch.tensor([1, 2, 3, 0]))
    return {
        "visual embeds": visuals.embeds,
        "visual feat": visuals.feat,
        "text embeds": texts.embeds,
        "text feat": texts.feat,
        "matching logits": logits,
    }


def assert_same(one, other):
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_differ(one, other, but=()):
    for name, value in one.items():
        if name not in but:
            assert not torch.allclose(value, other[name], atol=1e-4), name


@pytest.mark.parametrize("bottleneck, expected", [(128, 4_784_640), (512, 18_945_024)])
def test_parameter_count_of_the_paper(bottleneck, expected):
    adapter_set = UniAdapterSet({}, AdapterConfig(bottleneck=bottleneck), BLIP_BASE)
    assert sum(p.numel() for p in adapter_set.layer_parameters()) == expected


def test_blip_base_built_for_real(build_model):
    model = build_model(
        vit_type="base",
        vit=None,
        image_size=224,
        med_config_path="configs/models/med_config.json",
        embed_dim=256,
        adapter={"bottleneck": 128, "kv_bottleneck": 64},
    )
    counts = model.parameter_counts()
    assert counts["adapters"] == 4_784_640
    assert counts["backbone"] == 223_057_152
    assert "2.1" in model.adapter_summary().splitlines()[-1]


def test_vit_large_shares_nothing_between_widths():
    geometry = BackboneGeometry(1024, 24, 768, 12, {"text_encoder": 1024})
    adapter_set = UniAdapterSet({}, AdapterConfig(), geometry)
    assert len(adapter_set.visual_layers) == 24 and len(adapter_set.text_layers) == 12
    assert adapter_set.layer("visual", 23).down["shared"].in_features == 1024
    assert adapter_set.layer("text", 11).down["shared"].in_features == 768
    assert adapter_set.layer("text", 12) is None
    assert set(adapter_set.layer("visual", 0).up) == {"visual"}
    assert set(adapter_set.layer("text", 0).up) == {"textual", "cross_modal"}
    assert adapter_set.key_value["text_encoder"].key.down.in_features == 1024
    assert adapter_set.key_value["text_encoder"].key.up.out_features == 768


@pytest.mark.parametrize("depth, width", [(3, 32), (1, 32), (3, 48)])
def test_any_depth_and_width_trains(build_model, video_batch, depth, width):
    model = build_model(vit={"width": width, "depth": depth})
    model.train()
    model(video_batch).loss.backward()
    for name, p in model.trainable_parameters().items():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_fresh_identity_model_is_blip_bit_for_bit(build_model, video_batch):
    model = build_model(adapter={"init": "identity", "frame_aware": False})
    enabled = outputs(model, video_batch)
    with model.disable_adapter():
        assert_same(enabled, outputs(model, video_batch))


def test_frame_aware_attention_is_all_that_a_fresh_model_adds(build_model, video_batch):
    """It has no parameters to start at zero with; features know nothing of it."""
    model = build_model(adapter={"frame_aware": True})
    enabled = outputs(model, video_batch)
    with model.disable_adapter():
        blip = outputs(model, video_batch)
    assert not torch.equal(enabled.pop("matching logits"), blip["matching logits"])
    assert_same(enabled, blip)


@pytest.mark.parametrize("tuning", ["full", "linear"])
def test_methods_without_adapters_are_plain_blip(build_model, video_batch, tuning):
    models = [
        build_model(tuning=tuning, adapter={"frame_aware": frame_aware})
        for frame_aware in (True, False)
    ]
    assert_same(*(outputs(model, video_batch) for model in models))


@pytest.mark.parametrize("share", ["none", "down", "up", "all"])
@pytest.mark.parametrize("bottleneck", [128, 512])
@pytest.mark.parametrize("text_mode", [True, False], ids=["retrieval", "vqa"])
def test_released_init_draws_what_the_authors_start_from(share, bottleneck, text_mode):
    """Mean, standard deviation and largest value of every tensor, at BLIP base's width."""
    torch.manual_seed(0)
    geometry = dataclasses.replace(BLIP_BASE, text_mode=text_mode)
    config = AdapterConfig(bottleneck=bottleneck, share=share)
    adapter_set = UniAdapterSet({}, config, geometry)
    drawn: dict[str, list[torch.Tensor]] = {}
    for name, p in adapter_set.named_parameters():
        kind = name.split(".", 2)[-1] if name.startswith("layers.") else name
        drawn.setdefault(kind, []).append(p.detach().flatten())
    assert len(drawn) > 10
    for kind, tensors in drawn.items():
        values = torch.cat(tensors)
        if kind.endswith("bias"):
            expected = "zero"
        elif "norm" in kind or kind.endswith("scale"):
            expected = "one"
        elif text_mode and kind == "up.textual.weight":
            expected = "zero"
        elif text_mode and kind.startswith("down."):
            expected = "uniform"
        else:
            expected = "normal"
        if expected in ("zero", "one"):
            assert (values == (expected == "one")).all(), kind
            continue
        std = {"uniform": 1 / (3 * 768) ** 0.5, "normal": 0.02}[expected]
        error = 5 / len(values) ** 0.5  # five standard errors
        assert abs(values.mean()) < std * error, kind
        assert values.std() == pytest.approx(std, rel=error), kind
        if expected == "uniform":
            assert 0.036 < values.abs().max() < 0.0361, kind
        else:
            assert 3.5 * std < values.abs().max() < 7 * std, kind


def test_benchmark_models_start_as_released():
    for arch in ("retrieval", "vqa", "caption"):
        types = registry.get_model_class(f"blip_uniadapter_{arch}").PRETRAINED_MODEL_CONFIG_DICT
        for name, path in types.items():
            if name != "shapes":
                assert OmegaConf.load(path).model.adapter.init == "released", path


def test_gradients_of_the_first_step_are_not_extreme(build_model, video_batch):
    model = build_model().train()
    model(video_batch).loss.backward()
    largest = {name: p.grad.abs().max().item() for name, p in model.trainable_parameters().items()}
    heads = max(value for name, value in largest.items() if ".heads." in name)
    for name, value in largest.items():
        assert value <= 10 * heads, name


def test_trainable_set_is_the_declared_one(build_model):
    uniadapter = build_model(tuning="uniadapter")
    assert set(uniadapter.trainable_parameters()) == {
        f"adapters.default.{name}"
        for name, _ in uniadapter.adapters.get("default").named_parameters()
    }
    linear = build_model(tuning="linear")
    assert set(linear.trainable_parameters()) == {
        f"adapters.default.heads.{head}.{leaf}"
        for head in ("vision_proj", "text_proj", "itm_head")
        for leaf in ("weight", "bias")
    }
    full = build_model(tuning="full")
    assert set(full.trainable_parameters()) == {name for name, _ in full.named_parameters()}
    assert not any(name.startswith("adapters.") for name in full.trainable_parameters())


@pytest.mark.parametrize("tuning", METHODS)
def test_momentum_follows_the_average_once_a_step(build_model, video_batch, tuning):
    model = build_model(tuning=tuning, momentum=0.9, adapter_momentum=0.8).train()
    state = model.momentum_average.state_dict()
    # Neither the matching head nor what only matching reads of the key/value adapter.
    assert {n for n in state if "itm_head" in n or "key_value" in n} == set()
    assert any("text_proj" in n for n in state) and any("vision_proj" in n for n in state)
    assert set(state) <= set(model.trainable_parameters())
    expected = {name: value.clone() for name, value in state.items()}
    optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=0.1)
    for _ in range(3):
        for name, p in model.trainable_parameters().items():
            if name in expected:
                adapter = name.startswith("adapters.") and ".heads." not in name
                decay = 0.8 if adapter else 0.9
                expected[name] = decay * expected[name] + (1 - decay) * p.detach()
        model(video_batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.momentum_average.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_momentum_needs_no_second_backbone(build_model):
    model = build_model(tuning="uniadapter")
    averaged = sum(b.numel() for b in model.momentum_average.buffers())
    assert averaged < model.parameter_counts()["trainable"]
    assert not hasattr(model, "visual_encoder_m")


def test_features_under_momentum_are_the_averages(build_model, video_batch):
    model = build_model().eval()
    online = outputs(model, video_batch)
    perturb(model.adapters)
    moved = outputs(model, video_batch)
    with model.momentum_average.swapped_in():
        under_momentum = outputs(model, video_batch)
    assert torch.equal(under_momentum["visual embeds"], online["visual embeds"])
    assert not torch.allclose(moved["visual embeds"], online["visual embeds"])
    assert_same(moved, outputs(model, video_batch))


@pytest.mark.parametrize("branch", ["visual", "textual", "cross_modal", "query residual"])
def test_every_branch_sends_gradient_to_the_shared_down_projection(
    build_model, video_batch, branch
):
    kinds = {"query residual": "textual"}
    kind = kinds.get(branch, branch)
    only = {name: name == kind for name in ("visual", "textual", "cross_modal")}
    model = build_model(adapter={**only, "kv_bottleneck": 0})
    perturb(model.adapters)
    visuals = model.encode_visual(video_batch)
    texts = model.encode_text(video_batch["text_input"])
    if branch == "visual":
        visuals.embeds.square().sum().backward()
    elif branch == "textual":
        texts.embeds.square().sum().backward()
    else:
        model.match(texts, visuals).square().sum().backward()
    for layer in model.adapters.get("default").layers:
        assert layer.down["shared"].weight.grad.abs().max() > 0


def test_down_projection_is_one_tensor_for_vision_and_text(build_model):
    model = build_model()
    for block, layer in zip(
        model.visual_encoder.blocks, model.text_encoder.encoder.layer, strict=True
    ):
        assert block.adapter_slot().down["shared"] is layer.adapter_slot().down["shared"]
    names = [name for name in model.state_dict() if "down.shared.weight" in name]
    assert len(names) == len({model.state_dict()[n].data_ptr() for n in names})
    assert all(name.startswith(("adapters.", "momentum_average.")) for name in names)


def test_backbone_keys_are_lavis_own(build_model):
    from lavis.models.med import XBertEncoder
    from lavis.models.vit import VisionTransformer

    model = build_model()
    visual = VisionTransformer(32, 16, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2)
    text = XBertEncoder(model.text_encoder.config, add_pooling_layer=False)
    assert model.visual_encoder.state_dict().keys() == visual.state_dict().keys()
    assert model.text_encoder.state_dict().keys() == text.state_dict().keys()


@pytest.mark.parametrize("frame_aware", [False, True])
def test_activation_checkpointing_gives_equal_gradients(
    build_model, video_batch, frame_aware, monkeypatch
):
    import lavis_uniadapter.backbone.text as text
    import lavis_uniadapter.backbone.vision as vision

    calls = []

    def counting(function, *args, **kwargs):
        calls.append(function.__self__)
        return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(text, "checkpoint", counting)
    monkeypatch.setattr(vision, "checkpoint", counting)
    gradients = []
    for layers in (0, 2):
        model = build_model(
            vit_grad_ckpt=bool(layers),
            vit_ckpt_layer=layers,
            text_ckpt_layer=layers,
            adapter={"frame_aware": frame_aware},
        ).train()
        perturb(model.adapters)
        torch.manual_seed(3)  # the draw of negatives
        model(video_batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.trainable_parameters().items()})
    assert set(calls) == {*model.visual_encoder.blocks, *model.text_encoder.encoder.layer}
    largest = max(g.abs().max() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-5, atol=1e-6 * largest.item()
        )


# --- adapters as things of their own ------------------------------------------------------------


def test_saved_adapter_holds_no_backbone_queue_or_average(build_model, tmp_path):
    from safetensors.torch import load_file

    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert sum(t.numel() for t in saved.values()) == model.parameter_counts()["trainable"]
    assert not list(tmp_path.glob(".*"))


def test_full_tuning_has_no_adapter_to_save(build_model, tmp_path):
    with pytest.raises(ConfigError, match="full"):
        build_model(tuning="full").save_adapter(tmp_path / "adapter")


def rewrite(folder, change):
    """Change the tensors of an adapter folder and keep its checksum right."""
    import hashlib

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    content = (folder / "adapter.safetensors").read_bytes()
    config["blake2b"] = hashlib.blake2b(content, digest_size=16).hexdigest()
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("harm", ["deleted", "extra", "reshaped"])
def test_tensors_that_do_not_fit_are_named(build_model, tmp_path, harm):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    name = "layers.1.down.shared.weight"

    def change(tensors):
        if harm == "deleted":
            del tensors[name]
        elif harm == "extra":
            tensors["layers.7.down.shared.weight"] = torch.zeros(2)
        else:
            tensors[name] = tensors[name][:, 1:].contiguous()

    rewrite(tmp_path / "adapter", change)
    expected = "layers.7.down.shared.weight" if harm == "extra" else name
    with pytest.raises(CheckpointError, match=expected.replace(".", r"\.")):
        model.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("harm", ["no tensors", "no config"])
def test_incomplete_folder_never_loads(build_model, tmp_path, harm):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    name = {"no tensors": "adapter.safetensors", "no config": "adapter_config.json"}[harm]
    (tmp_path / "adapter" / name).unlink()
    with pytest.raises(CheckpointError, match="adapter"):
        model.load_adapter(tmp_path / "adapter")


def test_adapter_of_another_base_needs_force(build_model, video_batch, tmp_path):
    model, other = build_model(seed=0), build_model(seed=1)
    perturb(model.adapters)
    model.save_adapter(tmp_path / "adapter")
    before = outputs(other, video_batch)
    with pytest.raises(CheckpointError, match="another base checkpoint"):
        other.load_adapter(tmp_path / "adapter")
    assert_same(before, outputs(other, video_batch))
    other.load_adapter(tmp_path / "adapter", force=True)
    assert_differ(before, outputs(other, video_batch))


def test_saving_replaces_an_adapter_and_nothing_else(build_model, tmp_path):
    model = build_model()
    model.save_adapter(tmp_path / "adapter", {"epoch": 1})
    model.save_adapter(tmp_path / "adapter", {"epoch": 2})
    assert '"epoch": 2' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="thesis.tex"):
        model.save_adapter(tmp_path / "work")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"


def test_adapter_fits_a_base_whose_random_heads_differ(build_model, tmp_path):
    """Heads that the base checkpoint lacks differ from run to run, and the adapter has its own."""
    base = base_state_dict(build_model())
    base = {k: v for k, v in base.items() if not k.startswith("itm_head")}
    torch.save(base, tmp_path / "base.pth")
    models = [build_model(seed=seed, pretrained=str(tmp_path / "base.pth")) for seed in (1, 2)]
    assert not torch.equal(models[0].itm_head.weight, models[1].itm_head.weight)
    models[0].save_adapter(tmp_path / "adapter")
    models[1].load_adapter(tmp_path / "adapter")


def test_another_adapter_leaves_training_state_alone(build_model, video_batch, tmp_path):
    model = build_model().train()
    model.save_adapter(tmp_path / "other")
    perturb(model.adapters)
    model.momentum_average.update()
    before = {k: v.clone() for k, v in model.momentum_average.state_dict().items()}
    model.load_adapter(tmp_path / "other", name="other")
    for name, value in model.momentum_average.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="'other' is not the one that trains"):
        model(video_batch)
    model.set_adapter("default")
    model(video_batch).loss.backward()


def test_checkpoint_with_another_queue_length_loads_for_evaluation(
    build_model, video_batch, tmp_path
):
    model, other = build_model(seed=0, queue_size=12), build_model(seed=0, queue_size=8)
    perturb(model.adapters)
    torch.save({"model": model.state_dict()}, tmp_path / "run.pth")
    other.load_checkpoint(str(tmp_path / "run.pth"))
    assert_same(outputs(model, video_batch), outputs(other, video_batch))


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"tuning": "linear"}, "'uniadapter'"),
        ({"adapter": {"bottleneck": 4}}, "bottleneck: 8"),
        ({"adapter": {"kv_bottleneck": 0}}, "kv_bottleneck: 4"),
    ],
)
def test_adapter_of_another_method_or_size_is_refused(build_model, tmp_path, overrides, expected):
    build_model().save_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=expected):
        build_model(**overrides).load_adapter(tmp_path / "adapter")


def test_disabling_gives_blip_and_survives_an_exception(build_model, video_batch):
    model = build_model()
    with model.disable_adapter():
        blip = outputs(model, video_batch)
    perturb(model.adapters)
    tuned = outputs(model, video_batch)
    assert_differ(tuned, blip)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        assert_same(blip, outputs(model, video_batch))
        raise ZeroDivisionError
    assert_same(tuned, outputs(model, video_batch))


@pytest.mark.parametrize(
    "adapter, key",
    [
        ({"bottleneck": 0}, "bottleneck"),
        ({"bottleneck": 1.5}, "bottleneck"),
        ({"kv_bottleneck": -1}, "kv_bottleneck"),
        ({"scale": 0}, "scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "zeros"}, "init"),
        ({"visual": 1}, "visual"),
        ({"bottelneck": 8}, "bottelneck"),
    ],
)
def test_impossible_adapter_configuration_is_named(adapter, key):
    with pytest.raises(ConfigError, match=key):
        AdapterConfig.read(adapter, "model.adapter")
