"""What cannot fit into memory is refused, and nothing that fits."""

from __future__ import annotations

import re

import pytest

from lavis_uniadapter.common import memory
from lavis_uniadapter.common.config import validate
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.model import RetrievalModel
from lavis_uniadapter.tools import recipes

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 16 * GB)


@pytest.mark.parametrize(
    ("recipe", "options", "most"),
    [
        ("msrvtt_retrieval", ["run.num_workers=1000"], "run.num_workers 30.0 GB"),
        ("msrvtt_retrieval", ["run.batch_size_train=40000"], "run.batch_size_train"),
        ("msrvtt_retrieval", ["run.batch_size_eval=4000"], "run.batch_size_eval"),
        ("msrvtt_retrieval", ["model.adapter.bottleneck=1000000"], "model.adapter.bottleneck"),
        (
            "msrvtt_retrieval",
            ["model.adapter.kv_bottleneck=10000000", "model.adapter.visual=False"],
            "model.adapter.kv_bottleneck",
        ),
        ("msrvtt_retrieval", ["model.tuning=lora", "model.lora.rank=1000000"], "model.lora.rank"),
        ("msrvtt_retrieval", ["model.queue_size=100000000"], "model.queue_size"),
        ("msrvtt_retrieval", ["model.embed_dim=100000000"], "model.queue_size"),
        ("shapes_retrieval", ["model.vit.width=960000"], "model.vit"),
        ("blip_retrieval_flickr", ["run.batch_size_train=1" + "0" * 400], "run.batch_size_train"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_estimate(recipe, options, most):
    with pytest.raises(ConfigError) as error:
        validate(recipes.runs()[recipe], options)
    start = r"This run needs at least [\d,.]+ GB of memory, and this machine has 16\.0 GB\. "
    found = re.fullmatch(start + r"Reduce what needs most: (.+)\.", str(error.value))
    assert found and found[1].startswith(most), error.value


def test_a_part_that_does_not_matter_is_left_out():
    expected = "Reduce what needs most: run.num_workers 300.0 GB."
    with pytest.raises(ConfigError, match=re.escape(expected)):
        validate(recipes.runs()["msrvtt_retrieval"], ["run.num_workers=10000"])


def test_pictures_that_cannot_fit_are_refused():
    where = "datasets.msrvtt_retrieval.vis_processor"
    sizes = [f"{where}.{mode}.image_size=160000" for mode in ("train", "eval")]
    with pytest.raises(ConfigError, match="This run needs at least"):
        validate(recipes.runs()["msrvtt_retrieval"], ["model.image_size=160000", *sizes])


@pytest.mark.usefixtures("emoji_folder")
@pytest.mark.parametrize("name", recipes.runs())
def test_every_recipe_fits(name):
    validate(recipes.runs()[name])


def test_processes_share_a_machine(monkeypatch):
    options = ["run.num_workers=100"]
    validate(recipes.runs()["msrvtt_caption"], options)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="each of 8 processes has 2.0 GB"):
        validate(recipes.runs()["msrvtt_caption"], options)


def test_what_the_machine_holds_may_be_too_much_for_its_gpu():
    content = validate(recipes.runs()["msrvtt_retrieval"], ["run.batch_size_train=64"])
    section = RetrievalModel.read(content["model"], "model")
    memory.check_memory(section, content["datasets"], content["run"], 40 * GB)
    with pytest.raises(ConfigError, match="and the GPU has 1.0 GB"):
        memory.check_memory(section, content["datasets"], content["run"], GB)


@pytest.mark.parametrize("tuning", ["uniadapter", "adapter", "lora", "linear"])
@pytest.mark.parametrize("share", ["none", "all"])
def test_models_are_no_smaller_than_estimated(build_model, tuning, share):
    model = build_model(tuning=tuning, adapter={"share": share, "reuse_textual_up": False})
    estimate = memory._weights(model.section, evaluate=True)
    tensors = [*model.parameters(), *model.buffers()]
    assert 0 < sum(estimate.values()) <= sum(t.numel() * t.element_size() for t in tensors)


def test_a_container_has_less_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.undo()
    physical = memory.machine_memory()
    for limit, expected in ((b"max\n", physical), (b"1000000\n", 10**6)):
        (tmp_path / "memory.max").write_bytes(limit)
        monkeypatch.setattr(memory, "LIMITS", (str(tmp_path / "memory.max"), "/none"))
        assert memory.machine_memory() == expected
