"""Every tuning method on every model, UniAdapter's ablations, and methods against references."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from test_adapter_contracts import assert_differ, assert_same, outputs, perturb
from torch import nn

from lavis_uniadapter.adapters import LoraConfig, LoraSet
from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.checkpoints.blip_files import base_state_dict
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.paths import PACKAGE_ROOT

MODELS = ("blip_uniadapter_retrieval", "blip_uniadapter_vqa", "blip_uniadapter_caption")
BESIDE_A_BACKBONE = [name for name, method in TUNING_METHODS.items() if method.set_cls]
FOLDABLE = ["lora", "bitfit", "linear"]
ABLATIONS = {
    "no query residual": {"query_residual": False},
    "no sharing": {"share": "none", "reuse_textual_up": False},
    "no sharing but of the textual up-projection": {"share": "none"},
    "up-projection shared": {"share": "up"},
    "all shared": {"share": "all"},
    "no reuse of the textual up-projection": {"reuse_textual_up": False},
    "no sharing, no query residual": {
        "share": "none",
        "reuse_textual_up": False,
        "query_residual": False,
    },
    "no visual part": {"visual": False},
    "no textual part": {"textual": False},
    "no cross-modal part": {"cross_modal": False},
    "no cross-modal part, no query residual": {"cross_modal": False, "query_residual": False},
    "no key/value adapter": {"kv_bottleneck": 0},
    "no PFA": {"frame_aware": False},
}
VIT = {"width": 32, "depth": 2, "num_heads": 4, "patch_size": 16, "mlp_ratio": 2}
WORDS = ["a red circle", "a blue star on the left"]


@pytest.fixture
def build(small_med_config):
    """Build a small model of any kind from its real configuration file."""

    def build_any(arch: str, tuning: str = "uniadapter", seed: int = 0, **overrides):
        cls = registry.get_model_class(arch)
        config = OmegaConf.load(cls.default_config_path("shapes")).model
        small = {"image_size": 32, "med_config_path": small_med_config, "tuning": tuning}
        adapter = {"bottleneck": 8, "kv_bottleneck": 4, "frame_aware": False}
        sections = {"adapter": adapter, "lora": {"rank": 2}}
        config = OmegaConf.merge(config, {"vit": None}, small, sections, {"vit": VIT}, overrides)
        torch.manual_seed(seed)
        return cls.from_config(config)

    return build_any


def batch(arch: str, image_size: int = 32) -> dict:
    """Two videos of two frames with all that the model's training step reads."""
    generator = torch.Generator().manual_seed(5)
    samples = {
        "video": torch.randn(2, 3, 2, image_size, image_size, generator=generator),
        "text_input": list(WORDS),
    }
    if arch == "blip_uniadapter_retrieval":
        progress = {"epoch": 1, "iters": 0, "num_iters_per_epoch": 2}
        samples.update(image_id=torch.arange(2), **progress)
    elif arch == "blip_uniadapter_vqa":
        samples.update(answer=["red", "left", "a star"], n_answers=torch.tensor([2, 1]))
        samples.update(weight=torch.tensor([0.5, 0.5, 1.0]))
    return samples


def computed(model, samples) -> torch.Tensor:
    """The loss in evaluation mode: of every model, something that every part has a say in."""
    model.eval()
    torch.manual_seed(0)  # negatives
    moved = {name: b.clone() for name, b in model.named_buffers()}  # by retrieval: queue, averages
    with torch.no_grad():
        loss = model(dict(samples)).loss
        for name, buffer in model.named_buffers():
            buffer.copy_(moved[name])
    return loss


def train_steps(model, samples, number: int = 3) -> dict[str, torch.Tensor]:
    """Take some steps; returns the first step's gradients."""
    model.train()
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-2, weight_decay=0)
    first = None
    for _ in range(number):
        model(dict(samples)).loss.backward()
        if first is None:
            first = {name: p.grad for name, p in model.trainable_parameters().items()}
            first = {name: None if g is None else g.clone() for name, g in first.items()}
        optimizer.step()
        optimizer.zero_grad()
    return first


# --- contracts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("tuning", TUNING_METHODS)
def test_every_declared_parameter_trains_and_no_other(build, arch, tuning):
    """A declared parameter without gradient would also stop distributed training."""
    model = build(arch, tuning)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = train_steps(model, batch(arch))
    assert [name for name, g in gradients.items() if g is None] == []
    if tuning != "full":
        assert all(name.startswith("adapters.default.") for name in gradients)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in gradients), name


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_round_trip_under_another_seed(build, tmp_path, arch, tuning):
    model = build(arch, tuning)
    with model.disable_adapter():
        base = behaviour(model, arch)
    for name, value in behaviour(model, arch).items():  # a fresh adapter changes nothing
        torch.testing.assert_close(value, base[name], rtol=1e-5, atol=1e-6)
    train_steps(model, batch(arch))
    tuned = behaviour(model, arch)
    with model.disable_adapter():
        assert_same(base, behaviour(model, arch))
    of_heads = ("visual embeds", "text embeds")  # which heads do not change
    assert_differ(base, tuned, but=of_heads if tuning == "linear" else ())
    model.save_adapter(tmp_path / "adapter", {"r1": 12.5})

    other = build(arch, tuning, seed=9)
    other.load_state_dict(base_state_dict(model), strict=False)
    other.base_changed("the same BLIP")
    other.load_adapter(tmp_path / "adapter")
    assert_same(tuned, behaviour(other, arch))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["metrics"] == {"r1": 12.5} and config["method"] == tuning


def behaviour(model, arch: str) -> dict[str, torch.Tensor]:
    """What the model computes that no queue or average has a say in."""
    if arch == "blip_uniadapter_retrieval":
        return outputs(model, samples_for_outputs())
    return {"loss": computed(model, batch(arch))}


def samples_for_outputs():
    video = torch.randn(4, 3, 2, 32, 32, generator=torch.Generator().manual_seed(6))
    return {"video": video, "text_input": [*WORDS, "yellow", "a green square"]}


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("tuning", TUNING_METHODS)
def test_summary_fits_on_a_screen_and_adds_up(build, arch, tuning):
    model = build(arch, tuning)
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


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
@pytest.mark.parametrize("harm", ["flipped byte", "cut short", "swapped names", "pickle"])
def test_damaged_tensors_never_load(build, tmp_path, arch, tuning, harm):
    model = build(arch, tuning)
    perturb(model.adapters)
    model.save_adapter(tmp_path / "adapter")
    before = computed(model, batch(arch))
    path = tmp_path / "adapter" / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "flipped byte":
        content[-3] ^= 16
    elif harm == "cut short":
        content = content[:-4]
    elif harm == "swapped names":
        names = sorted(model.adapters.get("default").state_dict())
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
    assert torch.equal(computed(model, batch(arch)), before)


def test_loading_unpickles_nothing(build, tmp_path, monkeypatch):
    model = build(MODELS[0])
    model.save_adapter(tmp_path / "adapter")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    model.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("arch", MODELS)
def test_vit_large_trains_and_its_adapter_loads(build, tmp_path, arch):
    """24 layers of 1024 beside 12 of 768, on one patch a frame."""
    config = json.loads((PACKAGE_ROOT / "configs/models/shapes_med_config.json").read_text())
    config.update(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    (tmp_path / "med.json").write_text(json.dumps({**config, "num_hidden_layers": 12}))
    how = {"vit_type": "large", "vit": None, "image_size": 16}
    how.update(med_config_path=str(tmp_path / "med.json"), drop_path_rate=0.0)
    with quick_init():
        model = build(arch, **how)
    assert model.visual_encoder.pos_embed.shape == (1, 2, 1024)
    assert len(model.visual_encoder.blocks) == 24
    samples = batch(arch, image_size=16)
    gradients = train_steps(model, samples, number=1)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
    layers = model.adapters.get("default")
    assert layers.layer("visual", 23).down["shared"].weight.shape == (8, 1024)
    assert layers.layer("text", 11).down["shared"].weight.shape == (8, 768)
    tuned = {k: v.clone() for k, v in layers.state_dict().items()}
    model.save_adapter(tmp_path / "adapter")
    perturb(layers)
    model.load_adapter(tmp_path / "adapter")
    for name, value in layers.state_dict().items():
        assert torch.equal(value, tuned[name]), name


def quick_init():
    """Inside, large random matrices are drawn quickly (truncated normals take minutes)."""
    patch = pytest.MonkeyPatch()

    def draw(tensor, mean=0.0, std=1.0, **kwargs):
        with torch.no_grad():
            return tensor.uniform_(-std, std)

    class Quick:
        def __enter__(self):
            import lavis.models.vit as vit

            patch.setattr(vit, "trunc_normal_", draw)
            patch.setattr(nn.init, "trunc_normal_", draw)

        def __exit__(self, *error):
            patch.undo()

    return Quick()


# --- ablations of UniAdapter --------------------------------------------------------------------


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("vit", [{}, {"width": 48}, {"depth": 1}], ids=str)
def test_ablations_train_all_that_they_declare(build, arch, ablation, vit):
    model = build(arch, adapter=ABLATIONS[ablation], vit={**VIT, **vit})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = train_steps(model, batch(arch))
    assert gradients and [name for name, g in gradients.items() if g is None] == []
    for name in gradients:
        assert not torch.equal(model.get_parameter(name), before[name]), name


# Alone, not sharing the down-projection computes the same with the same weights.
@pytest.mark.parametrize("ablation", [a for a in ABLATIONS if ABLATIONS[a] != {"share": "none"}])
def test_ablations_leave_something_out(build, ablation):
    """Of equal parameters, without the part the model computes something else."""
    whole, part = (
        build(MODELS[0], adapter={"frame_aware": True, **options})
        for options in ({}, ABLATIONS[ablation])
    )
    perturb(whole.adapters)
    state = whole.adapters.get("default").state_dict()
    own = part.adapters.get("default").state_dict()
    renamed = {}  # where nothing is shared, each branch gets a copy of what is shared
    for name in own:
        source = name.replace(".up.shared.", ".up.cross_modal.")
        for branch in ("visual", "textual", "cross_modal"):
            source = source.replace(f".down.{branch}.", ".down.shared.")
            source = source.replace(f".norm_in.{branch}.", ".norm_in.shared.")
        renamed[name] = state[source]
    part.adapters.get("default").load_state_dict(renamed)
    one, other = (outputs(model, samples_for_outputs()) for model in (whole, part))
    assert not torch.allclose(one["matching logits"], other["matching logits"], atol=1e-5)


def test_numbers_of_parameters_of_ablations(build):
    def adapters(tuning="uniadapter", **options):
        return build(MODELS[0], tuning, adapter=options).parameter_counts()["adapters"]

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


def test_query_residual_is_the_textual_branch_of_what_precedes_cross_attention(build):
    with_it, without = (build(MODELS[0], adapter={"query_residual": q}) for q in (True, False))
    perturb(with_it.adapters)
    without.adapters.load_state_dict(with_it.adapters.state_dict())
    layer, bare = (m.adapters.get("default").layer("text", 0) for m in (with_it, without))
    a, c = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    torch.testing.assert_close(layer.cross_modal(a, c), bare.cross_modal(a, c) + layer.textual(a))


# --- methods against references -----------------------------------------------------------------


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("tuning", FOLDABLE)
def test_merging_gives_a_plain_blip_that_computes_the_same(build, arch, tuning):
    samples = batch(arch)
    model = build(arch, tuning, lora={"targets": ["query", "key", "value", "ffn_in", "ffn_out"]})
    perturb(model.adapters, by=0.05)
    tuned = computed(model, samples)
    with model.disable_adapter():
        assert abs(computed(model, samples) - tuned) > 1e-3
    fingerprint = model.base_fingerprint
    model.merge_adapter()
    assert model.adapters.names() == [] and model.base_fingerprint != fingerprint
    if arch != "blip_uniadapter_retrieval":  # whose averages are gone with what trained
        torch.testing.assert_close(computed(model, samples), tuned, rtol=1e-4, atol=1e-5)
    assert not any(name.startswith(("adapters.", "momentum")) for name in model.state_dict())
    plain = build(arch, "full", seed=4)
    plain.load_state_dict(base_state_dict(model), strict=False)
    for name, value in behaviour(model, arch).items():
        assert torch.equal(value, behaviour(plain, arch)[name]), name


@pytest.mark.parametrize("tuning", FOLDABLE)
def test_merged_retrieval_computes_the_same(build, tuning):
    model = build(MODELS[0], tuning)
    perturb(model.adapters, by=0.05)
    tuned = outputs(model, samples_for_outputs())
    model.merge_adapter()
    for name, value in outputs(model, samples_for_outputs()).items():
        torch.testing.assert_close(value, tuned[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuning", ["uniadapter", "adapter"])
def test_adapters_beside_layers_cannot_be_merged(build, tuning):
    with pytest.raises(ConfigError, match=f"'{tuning}'.*cannot be folded"):
        build(MODELS[0], tuning).merge_adapter()


def test_frame_aware_attention_cannot_be_merged(build):
    nothing = {"visual": False, "textual": False, "cross_modal": False, "kv_bottleneck": 0}
    model = build(MODELS[0], adapter={**nothing, "frame_aware": True})
    with pytest.raises(ConfigError, match="cannot be folded"):
        model.merge_adapter()


def test_lora_changes_exactly_its_rows(build):
    model = build(MODELS[0], "lora", lora={"targets": ["value"], "rank": 3, "alpha": 6})
    perturb(model.adapters)
    qkv = model.visual_encoder.blocks[0].attn.qkv
    low_rank = model.adapters.get("default").deltas["visual_encoder/blocks/0/attn/qkv"]["value"]
    x = torch.randn(2, 5, 32)
    change = qkv(x) - nn.functional.linear(x, qkv.weight, qkv.bias)
    expected = x @ (2.0 * low_rank.up.weight @ low_rank.down.weight).t()
    assert not change[..., :64].any()
    torch.testing.assert_close(change[..., 64:], expected, rtol=1e-4, atol=1e-5)


def test_lora_equals_peft(build):
    """Outputs and gradients of the text encoder, with the same low-rank matrices."""
    peft = pytest.importorskip("peft")
    model = build(MODELS[0], "lora", lora={"rank": 3, "alpha": 6})
    perturb(model.adapters)
    theirs = nn.Module()
    theirs.text_encoder = copy.deepcopy(build(MODELS[0], "full").text_encoder)
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["query", "value"])
    theirs = peft.inject_adapter_in_model(config, theirs)
    deltas = model.adapters.get("default").deltas
    number = 0
    for path, module in theirs.named_modules():
        role = path.rpartition(".")[2]
        if role in ("query", "value"):
            ours = deltas[path.replace(".", "/")][role]
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(ours.down.weight)
                module.lora_B["default"].weight.copy_(ours.up.weight)
            number += 1
    assert number == 2 * 2 * 2  # layers, self- and cross-attention, roles
    tokens = model.tokenize(WORDS)
    states = torch.randn(2, 5, 32)
    results = []
    for encoder in (model.text_encoder, theirs.text_encoder):
        out = encoder.eval()(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=states,
            return_dict=True,
        ).last_hidden_state
        out.square().sum().backward()
        results.append(out)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    some = "text_encoder.encoder.layer.0.crossattention.self.query"
    torch.testing.assert_close(
        deltas[some.replace(".", "/")]["query"].down.weight.grad,
        theirs.get_submodule(some).lora_A["default"].weight.grad,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "section, key",
    [
        ({"rank": 0}, "rank"),
        ({"alpha": -1}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"targets": ["querry"]}, "targets"),
        ({"targets": []}, "targets"),
        ({"targets": "query"}, "targets"),
        ({"rnak": 4}, "Did you mean 'rank'"),
    ],
)
def test_impossible_lora_is_named(section, key):
    with pytest.raises(ConfigError, match=key):
        LoraConfig.read(section, "model.lora")


def test_lora_of_another_rank_or_target_is_refused(build, tmp_path):
    build(MODELS[0], "lora").save_adapter(tmp_path / "adapter")
    for section, expected in (({"rank": 3}, "rank: 2"), ({"targets": ["key"]}, "targets")):
        with pytest.raises(CheckpointError, match=expected):
            build(MODELS[0], "lora", lora=section).load_adapter(tmp_path / "adapter")
    # what matters in training alone, and the order of targets, may differ
    reordered = {"dropout": 0.1, "targets": ["value", "query"]}
    build(MODELS[0], "lora", lora=reordered).load_adapter(tmp_path / "adapter", force=True)


def test_bitfit_leaves_out_what_cannot_matter(build):
    """A bias of keys adds the same to all logits of a query."""
    names = list(build(MODELS[0], "bitfit").adapters.get("default").deltas)
    assert not any(name.endswith("/key") for name in names)
    assert "text_encoder/encoder/layer/0/crossattention/self/query" in names
    assert "visual_encoder/patch_embed/proj" in names and "visual_encoder/norm" in names


def test_biases_are_one_dimensional_and_keep_the_precision(build):
    """Weight decay is for matrices; and a float32 bias must not undo autocast."""
    model = build(MODELS[0], "bitfit")
    deltas = model.adapters.get("default").deltas
    assert {p.ndim for p in deltas.parameters()} == {1}
    perturb(deltas)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.visual_encoder.blocks[0].mlp.fc1(torch.randn(2, 32)).dtype == torch.bfloat16


# --- many adapters on one backbone --------------------------------------------------------------


def test_a_thousand_random_switches(build, tmp_path):
    model = build(MODELS[0]).eval()
    samples = samples_for_outputs()
    expected = {}
    for seed, name in enumerate(("coco", "flickr")):
        perturb(model.adapters.get("default"), seed)
        model.save_adapter(tmp_path / name)
        model.load_adapter(tmp_path / name, name=name)
        expected[name] = outputs(model, samples)
        model.set_adapter("default")
    assert_differ(expected["coco"], expected["flickr"])
    texts = model.tokenize(WORDS)
    features = {}
    with torch.no_grad():
        for name in expected:
            model.set_adapter(name)
            features[name] = model.encode_text(texts).feat
        generator = torch.Generator().manual_seed(0)
        for _ in range(1000):
            name = ("coco", "flickr")[int(torch.randint(2, (1,), generator=generator))]
            model.set_adapter(name)
            if torch.rand(1, generator=generator) < 0.1:
                with pytest.raises(ZeroDivisionError), model.disable_adapter():
                    raise ZeroDivisionError
            assert torch.equal(model.encode_text(texts).feat, features[name])
    for name in expected:
        model.set_adapter(name)
        assert_same(expected[name], outputs(model, samples))


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_two_named_adapters_of_any_method_do_not_interfere(build, tmp_path, arch, tuning):
    model = build(arch, tuning)
    expected = {}
    for seed, name in enumerate(("one", "two")):
        perturb(model.adapters.get("default"), seed)
        model.save_adapter(tmp_path / name)
        expected[name] = behaviour(model, arch)
    fresh = build(arch, tuning)
    for name in expected:
        fresh.load_adapter(tmp_path / name, name=name)
    of_heads = ("visual embeds", "text embeds") if tuning == "linear" else ()
    assert_differ(expected["one"], expected["two"], but=of_heads)
    for name in ("one", "two", "one"):
        fresh.set_adapter(name)
        assert_same(expected[name], behaviour(fresh, arch))


def test_deleting_an_adapter_frees_it(build, tmp_path):
    model = build(MODELS[0])
    model.save_adapter(tmp_path / "adapter")
    before = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for p in model.adapters.get("default").parameters())
    model.load_adapter(tmp_path / "adapter", name="flickr")
    assert sum(p.numel() for p in model.parameters()) == before + own
    with pytest.raises(ValueError, match="active"):
        model.delete_adapter("flickr")
    model.set_adapter("default")
    model.delete_adapter("flickr")
    assert sum(p.numel() for p in model.parameters()) == before
    for verb in (model.delete_adapter, model.set_adapter):
        with pytest.raises(KeyError, match="flickr"):
            verb("flickr")
    with pytest.raises(ValueError, match="trains"):
        model.delete_adapter("default")


# --- the folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_model_card_says_what_it_is(build, tmp_path, tuning):
    model = build(MODELS[0], tuning)
    model.save_adapter(tmp_path / "adapter", {"test_t2v_r1": 12.5})
    card = (tmp_path / "adapter" / "README.md").read_text()
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    for expected in (
        f"# {tuning} adapter for {MODELS[0]}",
        f"| parameters | {trained:,} |",
        "| test_t2v_r1 | 12.5 |",
        model.base_fingerprint,
        f'get_model_class("{MODELS[0]}")',
    ):
        assert expected in card
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
    ]


@pytest.mark.parametrize("tuning", BESIDE_A_BACKBONE)
def test_model_card_shows_code_that_works(build, tmp_path, tuning, small_med_config):
    """Built from a base checkpoint of its own, as a reader of the card would."""
    small = {"adapter": {"bottleneck": 4, "kv_bottleneck": 2}, "lora": {"targets": ["key"]}}
    torch.save(base_state_dict(build(MODELS[0])), tmp_path / "base.pth")
    model = build(MODELS[0], tuning, pretrained=str(tmp_path / "base.pth"), **small)
    perturb(model.adapters)
    model.save_adapter(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    sizes = {
        **{"vit": None, "image_size": 32, "med_config_path": small_med_config},
        "pretrained": str(tmp_path / "base.pth"),
    }
    code = code.replace("THIS_FOLDER", str(tmp_path / "adapter")).replace("MODEL_TYPE", "shapes")
    base = f"config = OmegaConf.merge(config, {sizes}, {{'vit': {VIT}}})\n"
    names: dict = {}
    exec(code.replace("# config.pretrained", f"{base}# config.pretrained"), names)
    assert_same(
        outputs(model, samples_for_outputs()), outputs(names["model"], samples_for_outputs())
    )


def test_folder_of_another_format_is_named(build, tmp_path):
    model = build(MODELS[0])
    model.save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({"format_version": 2, "adapter": {}}))
    with pytest.raises(CheckpointError, match="has format 2, and this version reads format 3"):
        model.load_adapter(tmp_path / "adapter")


def test_another_prompt_is_told(build, tmp_path, caplog):
    build(MODELS[2], prompt="there is ").save_adapter(tmp_path / "adapter")
    build(MODELS[2], prompt="a ").load_adapter(tmp_path / "adapter")
    assert "was trained with prompt 'there is ', and the model has 'a '" in caplog.text


def test_lora_set_is_empty_without_its_targets(build):
    model = build(MODELS[0], "lora", lora={"targets": ["attention_output"]})
    adapter_set = model.adapters.get("default")
    assert isinstance(adapter_set, LoraSet)
    roles = {role for delta in adapter_set.deltas.values() for role in delta}
    assert roles == {"attention_output"}
