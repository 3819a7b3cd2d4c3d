"""LoRA and BitFit against references."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import RETRIEVAL, WORDS, perturb
from torch import nn

from lavis_uniadapter.adapters.lora import LoraConfig, LoraSet
from lavis_uniadapter.common.errors import CheckpointError, ConfigError


def test_lora_changes_exactly_its_rows(build_small):
    model = build_small(RETRIEVAL, "lora", lora={"targets": ["value"], "rank": 3, "alpha": 6})
    perturb(model.adapters)
    qkv = model.visual_encoder.blocks[0].attn.qkv
    low_rank = model.adapters["default"].deltas["visual_encoder/blocks/0/attn/qkv"]["value"]
    x = torch.randn(2, 5, 32)
    change = qkv(x) - nn.functional.linear(x, qkv.weight, qkv.bias)
    expected = x @ (2.0 * low_rank.up.weight @ low_rank.down.weight).t()
    assert not change[..., :64].any()
    torch.testing.assert_close(change[..., 64:], expected, rtol=1e-4, atol=1e-5)


def test_lora_equals_peft(build_small):
    """Outputs and gradients of the text encoder, with the same low-rank matrices."""
    peft = pytest.importorskip("peft")
    model = build_small(RETRIEVAL, "lora", lora={"rank": 3, "alpha": 6})
    perturb(model.adapters)
    theirs = nn.Module()
    theirs.text_encoder = copy.deepcopy(build_small(RETRIEVAL, "full").text_encoder)
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["query", "value"])
    theirs = peft.inject_adapter_in_model(config, theirs)
    deltas = model.adapters["default"].deltas
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


def test_lora_of_another_rank_or_target_is_refused(build_small, tmp_path):
    build_small(RETRIEVAL, "lora").save_adapter(tmp_path / "adapter")
    for section, expected in (({"rank": 3}, "rank: 2"), ({"targets": ["key"]}, "targets")):
        with pytest.raises(CheckpointError, match=expected):
            build_small(RETRIEVAL, "lora", lora=section).load_adapter(tmp_path / "adapter")
    # what matters in training alone, and the order of targets, may differ
    reordered = {"dropout": 0.1, "targets": ["value", "query"]}
    build_small(RETRIEVAL, "lora", lora=reordered).load_adapter(tmp_path / "adapter", force=True)


def test_bitfit_leaves_out_what_cannot_matter(build_small):
    """A bias of keys adds the same to all logits of a query."""
    names = list(build_small(RETRIEVAL, "bitfit").adapters["default"].deltas)
    assert not any(name.endswith("/key") for name in names)
    assert "text_encoder/encoder/layer/0/crossattention/self/query" in names
    assert "visual_encoder/patch_embed/proj" in names and "visual_encoder/norm" in names


def test_biases_are_one_dimensional_and_keep_the_precision(build_small):
    """Weight decay is for matrices; and a float32 bias must not undo autocast."""
    model = build_small(RETRIEVAL, "bitfit")
    deltas = model.adapters["default"].deltas
    assert {p.ndim for p in deltas.parameters()} == {1}
    perturb(deltas)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.visual_encoder.blocks[0].mlp.fc1(torch.randn(2, 32)).dtype == torch.bfloat16


def test_lora_changes_its_targets_alone(build_small):
    model = build_small(RETRIEVAL, "lora", lora={"targets": ["attention_output"]})
    adapter_set = model.adapters["default"]
    assert isinstance(adapter_set, LoraSet)
    roles = {role for delta in adapter_set.deltas.values() for role in delta}
    assert roles == {"attention_output"}
