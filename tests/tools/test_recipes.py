"""The recipes of the authors' three released configurations, value by value."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import TRAIN

from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError

# RERV/UniAdapter, commit 796c124. Batch sizes are those of one of 8 processes; None: not in use.
RELEASED = {
    "coco_retrieval": {
        "model.adapter.bottleneck": 512,
        "model.adapter.kv_bottleneck": 64,
        "model.adapter.scale": 0.1,
        "model.adapter.dropout": 0.0,
        "model.adapter.init": "released",
        "run.init_lr": 1e-5,
        "run.min_lr": 0,
        "run.lr_sched": "linear_warmup_cosine_lr",  # LAVIS's, without warm-up steps: plain cosine
        "run.warmup_steps": 0,
        "run.max_epoch": 6,
        "run.batch_size_train": 32,
        "model.image_size": 384,
        "model.negative_all_rank": True,
        "model.queue_size": 57600,
        "model.alpha": 0.4,
        "model.alpha_rampup_epochs": 1,
        "model.drop_path_rate": None,  # LAVIS's default of ViT-B, 0
        "model.vit_grad_ckpt": True,
        "model.vit_ckpt_layer": 4,
        "run.weight_decay": 0.05,
        "run.weight_decay_on": "all",
        "model.max_txt_len": 35,
        "max_words": 30,
        "run.k_test": 256,
        "run.itc_weight": 0,
        "run.valid_splits": [],  # the last epoch is tested
        "run.amp": None,
        "model.momentum": 0.995,
        "model.adapter_momentum": 0.990025,
    }
}
RELEASED["flickr_retrieval"] = {
    **RELEASED["coco_retrieval"],
    "model.negative_all_rank": False,
    "run.k_test": 128,
}
RELEASED["vqav2"] = {
    **{
        k: v
        for k, v in RELEASED["coco_retrieval"].items()
        if k.startswith(("model.ad", "run.")) and k not in ("run.k_test", "run.itc_weight")
    },
    "run.init_lr": 2e-5,
    "run.max_epoch": 10,
    "run.batch_size_train": 16,
    "model.image_size": 480,
    "model.drop_path_rate": 0.1,
    "model.vit_grad_ckpt": False,
    "model.text_ckpt_layer": 0,
    "run.num_ans_candidates": 128,
    "run.inference_method": "rank",
    "model.adapter_momentum": None,
}


def resolved(config, key: str):
    section, _, rest = key.partition(".")
    if key == "max_words":
        processors = [
            processor
            for dataset in config.datasets_cfg.values()
            for processor in dataset.text_processor.values()
        ]
        (words,) = {processor.max_words for processor in processors}
        return words
    value = config.model_cfg if section == "model" else config.run_cfg
    for part in rest.split("."):
        value = value.get(part)
    return list(value) if key.endswith("_splits") else value


@pytest.mark.parametrize("name", RELEASED)
def test_recipe_is_the_released_configuration(name):
    config = load_config(TRAIN / f"{name}.yaml")
    found = {key: resolved(config, key) for key in RELEASED[name]}
    numbers = {k: float(v) for k, v in found.items() if k.endswith(("_lr", "min_lr"))}
    assert found | numbers == RELEASED[name]


@pytest.mark.parametrize(
    "name", ["msrvtt_retrieval", "didemo_retrieval", "msrvtt_qa", "msvd_qa", "msrvtt_caption"]
)
def test_video_recipes_train_what_the_paper_counts(name):
    assert load_config(TRAIN / f"{name}.yaml").model_cfg.adapter.bottleneck == 128


@pytest.mark.parametrize("path", sorted(TRAIN.glob("*.yaml")), ids=lambda path: path.stem)
def test_first_line_says_what_a_recipe_is(path):
    assert path.read_text().startswith("# ")


# --- the keys that the recipes need -------------------------------------------------------------


def test_alpha_grows_over_the_epochs_that_are_asked_for(build_model):
    def ramp(epochs):
        model = build_model(alpha_rampup_epochs=epochs)
        return [model._rampup_factor(epoch, i, 4) for epoch in range(3) for i in range(0, 4, 2)]

    assert ramp(1) == [0, 0.5, 1, 1, 1, 1]
    assert ramp(2) == [0, 0.25, 0.5, 0.75, 1, 1]  # LAVIS's BlipRetrieval
    assert ramp(0) == [1] * 6


def decayed(runner) -> dict[str, float]:
    groups = [
        (id(p), g["weight_decay"]) for g in runner.optimizer.param_groups for p in g["params"]
    ]
    by_id = dict(groups)
    assert len(by_id) == len(groups)
    return {n: by_id[id(p)] for n, p in runner._model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("on", ["matrices", "all"])
def test_what_weight_decay_is_on(run, on):
    options = ("run.max_epoch=1", f"run.weight_decay_on={on}", "run.valid_splits=[]")
    runner = run("shapes_retrieval", *options, "run.test_splits=[]").runner
    shapes = {n: p.ndim for n, p in runner._model.named_parameters()}
    for name, decay in decayed(runner).items():
        assert decay == (0.05 if on == "all" or shapes[name] >= 2 else 0), name


def test_stochastic_depth_reaches_the_blocks(build_model):
    model = build_model(drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.visual_encoder.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.2]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["run.weight_decay_on=biases"], "one of matrices, all"),
        (["model.alpha_rampup_epochs=-1"], "model.alpha_rampup_epochs is -1"),
        (["model.adapter.share=both"], "one of none, down, up, all"),
        (["model.tuning=adapter", "model.adapter.query_residual=False"], "does not read it"),
        (["model.tuning=lora", "model.adapter.bottleneck=8"], "reads nothing of model.adapter"),
        (["model.lora.rank=4"], "model.lora.rank is given"),
        (["model.tuning=full", "model.adapter.init=identity"], "choose another model.tuning"),
    ],
)
def test_what_nothing_reads_is_an_error(options, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(TRAIN / "shapes_retrieval.yaml", options)


@pytest.mark.parametrize(
    "options",
    [
        ["model.tuning=adapter", "model.adapter.bottleneck=8", "model.adapter.init=identity"],
        ["model.tuning=lora", "model.lora.rank=8"],
        *(["model.tuning=" + name] for name in ("adapter", "lora", "bitfit", "linear", "full")),
    ],
    ids=" ".join,
)
def test_one_line_swaps_the_method(options):
    load_config(TRAIN / "shapes_retrieval.yaml", options)
