"""UniAdapter: counts, initialisation, sharing, gradients, and its ablations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.vit import VisionTransformerEncoder
from omegaconf import OmegaConf
from small_models import (
    CAPTION,
    MODELS,
    RETRIEVAL,
    VIT,
    VQA,
    assert_same,
    batch,
    behaviour,
    outputs,
    perturb,
    skip_init,
    train_steps,
)

from lavis_uniadapter.adapters.bank import BackboneGeometry
from lavis_uniadapter.adapters.uniadapter import UniAdapterSet
from lavis_uniadapter.backbone import attach
from lavis_uniadapter.backbone.build import build_visual_encoder
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.methods import AdapterConfig

BLIP_BASE = BackboneGeometry(768, 12, 768, 12, {"text_encoder": 768})
NOTHING_SHARED = {"share": "none", "reuse_textual_up": False}
ABLATIONS = {
    "no query residual": {"query_residual": False},
    "no sharing": NOTHING_SHARED,
    "no sharing but of the textual up-projection": {"share": "none"},
    "up-projection shared": {"share": "up"},
    "all shared": {"share": "all"},
    "no reuse of the textual up-projection": {"reuse_textual_up": False},
    "no sharing, no query residual": {**NOTHING_SHARED, "query_residual": False},
    "no visual part": {"visual": False},
    "no textual part": {"textual": False},
    "no cross-modal part": {"cross_modal": False},
    "no cross-modal part, no query residual": {"cross_modal": False, "query_residual": False},
    "no key/value adapter": {"kv_bottleneck": 0},
    "no PFA": {"frame_aware": False},
}


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck, expected", [(128, 4_784_640), (512, 18_945_024)])
def test_parameter_count_of_the_paper(bottleneck, expected):
    adapter_set = UniAdapterSet({}, AdapterConfig(bottleneck=bottleneck), BLIP_BASE)
    assert sum(p.numel() for p in adapter_set.layer_parameters()) == expected


def test_blip_base_built_for_real(build_model, monkeypatch):
    skip_init(monkeypatch)
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
    assert len(adapter_set.layers) == 24 + 12
    assert adapter_set.layer("visual", 23).down["shared"].in_features == 1024
    assert adapter_set.layer("text", 11).down["shared"].in_features == 768
    assert adapter_set.layer("text", 12) is None
    assert set(adapter_set.layer("visual", 0).up) == {"visual"}
    assert set(adapter_set.layer("text", 0).up) == {"textual", "cross_modal"}
    assert adapter_set.key_value["text_encoder"]["key"].down.in_features == 1024
    assert adapter_set.key_value["text_encoder"]["key"].up.out_features == 768


def test_vit_of_another_width_and_depth_round_trips(build_small, tmp_path):
    model = build_small(RETRIEVAL, vit={**VIT, "width": 48, "depth": 3})
    train_steps(model, batch(RETRIEVAL), number=1)
    adapter_set = model.adapters["default"]
    assert adapter_set.layer("visual", 2).down["shared"].weight.shape == (8, 48)
    assert adapter_set.layer("text", 1).down["shared"].weight.shape == (8, 32)
    tuned = {k: v.clone() for k, v in adapter_set.state_dict().items()}
    model.save_adapter(tmp_path / "adapter")
    perturb(adapter_set)
    model.load_adapter(tmp_path / "adapter")
    assert_same(tuned, adapter_set.state_dict())


def test_large_is_lavis_own_large_vit(monkeypatch):
    skip_init(monkeypatch)
    ours = build_visual_encoder("large", 32)
    theirs = VisionTransformerEncoder.from_config({"vit_type": "large", "image_size": 32})
    shapes, expected = (
        {k: v.shape for k, v in encoder.state_dict().items()} for encoder in (ours, theirs)
    )
    assert shapes == expected
    assert ours.blocks[-1].drop_path.drop_prob == theirs.blocks[-1].drop_path.drop_prob > 0
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_numbers_of_parameters_of_ablations(build_small):
    def adapters(tuning="uniadapter", **options):
        return build_small(RETRIEVAL, tuning, adapter=options).parameter_counts()["adapters"]

    width, r, depth = 32, 8, 2
    norm, down, up = 2 * width, width * r + r, r * width + width
    assert adapters() == depth * (2 * norm + down + 3 * up)
    assert adapters(share="none") == depth * (4 * norm + 3 * down + 3 * up)
    assert adapters(share="up") == depth * (4 * norm + 3 * down + up)
    assert adapters(share="all") == depth * (2 * norm + down + up)
    assert adapters(reuse_textual_up=False) == adapters()
    assert adapters("adapter") == depth * 3 * (norm + down + up)
    assert adapters(visual=False) == depth * (2 * norm + down + 2 * up)
    assert adapters(cross_modal=False) == depth * (norm + down + 2 * up)
    assert adapters(query_residual=False, frame_aware=True) == adapters()


# --- initialisation -----------------------------------------------------------------------------


def test_fresh_identity_model_is_blip_bit_for_bit(build_model, video_batch):
    model = build_model(adapter={"init": "identity", "frame_aware": False})
    enabled = outputs(model, video_batch)
    with model.disable_adapter():
        assert_same(enabled, outputs(model, video_batch))


def test_frame_aware_attention_is_all_that_a_fresh_model_adds(build_model, video_batch):
    """It has no parameters to start at zero with; features are computed without it."""
    model = build_model(adapter={"frame_aware": True})
    enabled = outputs(model, video_batch)
    with model.disable_adapter():
        blip = outputs(model, video_batch)
    assert not torch.equal(enabled.pop("matching logits"), blip["matching logits"])
    assert_same(enabled, blip)


@pytest.mark.parametrize(
    ("share", "bottleneck"), [("none", 128), ("down", 512), ("up", 128), ("all", 128)]
)
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
    for arch in MODELS:
        for name, path in registry.get_model_class(arch).PRETRAINED_MODEL_CONFIG_DICT.items():
            # the demo and the emoji benchmark are no benchmarks of the paper
            if name not in ("shapes", "emoji"):
                assert OmegaConf.load(path).model.adapter.init == "released", path


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_of_the_first_step_are_not_extreme(build_model, video_batch):
    gradients = train_steps(build_model(), video_batch, number=1)
    largest = {name: gradient.abs().max().item() for name, gradient in gradients.items()}
    heads = max(value for name, value in largest.items() if ".heads." in name)
    for name, value in largest.items():
        assert value <= 10 * heads, name


@pytest.mark.parametrize("branch", ["visual", "textual", "cross_modal", "query residual"])
def test_every_branch_sends_gradient_to_the_shared_down_projection(
    build_model, video_batch, branch
):
    kind = {"query residual": "textual"}.get(branch, branch)
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
    for layer in model.adapters["default"].layers:
        assert layer.down["shared"].weight.grad.abs().max() > 0


def test_down_projection_is_one_tensor_for_vision_and_text(build_model):
    model = build_model()
    adapter_set = model.adapters["default"]
    for index in range(2):
        assert adapter_set.layer("visual", index) is adapter_set.layer("text", index)
    names = [name for name in model.state_dict() if "down.shared.weight" in name]
    assert len(names) == len({model.state_dict()[n].data_ptr() for n in names})
    assert all(name.startswith("adapters.") for name in names)


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
    calls = []

    def counting(function, *args, **kwargs):
        calls.append(function.__self__)
        return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(attach, "checkpoint", counting)
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


# --- ablations ----------------------------------------------------------------------------------

# A ViT of the text encoder's width or of another, as deep, less deep or deeper. Every ablation is
# trained where text is encoded alone, and where it never is.
CASES = [(arch, vit, "none") for arch in MODELS for vit in ({}, {"width": 48})]
CASES += [(RETRIEVAL, {"depth": 1}, "none"), (VQA, {"depth": 3}, "none")]
CASES += [(RETRIEVAL, {}, name) for name in ABLATIONS]
CASES += [(CAPTION, {"width": 48, "depth": 3}, name) for name in ABLATIONS]


@pytest.mark.parametrize(("arch", "vit", "ablation"), CASES, ids=str)
def test_ablations_train_all_that_they_declare(build_small, arch, ablation, vit):
    model = build_small(arch, adapter=ABLATIONS.get(ablation, {}), vit={**VIT, **vit})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = train_steps(model, batch(arch))
    assert gradients and [name for name, g in gradients.items() if g is None] == []
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        assert not torch.equal(model.get_parameter(name), before[name]), name


# Alone, not sharing the down-projection computes the same with the same weights.
@pytest.mark.parametrize("ablation", [a for a in ABLATIONS if ABLATIONS[a] != {"share": "none"}])
def test_ablations_leave_something_out(build_small, ablation):
    """Of equal parameters, without the part the model computes something else."""
    whole, part = (
        build_small(RETRIEVAL, adapter={"frame_aware": True, **options})
        for options in ({}, ABLATIONS[ablation])
    )
    perturb(whole.adapters)
    state = whole.adapters["default"].state_dict()
    renamed = {}  # where nothing is shared, each branch gets a copy of what is shared
    for name in part.adapters["default"].state_dict():
        source = name.replace(".up.shared.", ".up.cross_modal.")
        for branch in ("visual", "textual", "cross_modal"):
            source = source.replace(f".down.{branch}.", ".down.shared.")
            source = source.replace(f".norm_in.{branch}.", ".norm_in.shared.")
        renamed[name] = state[source]
    part.adapters["default"].load_state_dict(renamed)
    one, other = (behaviour(model)["matching logits"] for model in (whole, part))
    assert not torch.allclose(one, other, atol=1e-5)


def test_query_residual_is_the_textual_branch_of_what_precedes_cross_attention(build_small):
    with_it = build_small(RETRIEVAL)
    without = build_small(RETRIEVAL, adapter={"query_residual": False})
    perturb(with_it.adapters)
    without.adapters.load_state_dict(with_it.adapters.state_dict())
    layer, bare = (m.adapters["default"].layer("text", 0) for m in (with_it, without))
    a, c = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    torch.testing.assert_close(layer.cross_modal(a, c), bare.cross_modal(a, c) + layer.textual(a))


def test_frame_aware_attention_cannot_be_merged(build_small):
    nothing = {"visual": False, "textual": False, "cross_modal": False, "kv_bottleneck": 0}
    model = build_small(RETRIEVAL, adapter={**nothing, "frame_aware": True})
    with pytest.raises(ConfigError, match="cannot be folded"):
        model.merge_adapter()


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
