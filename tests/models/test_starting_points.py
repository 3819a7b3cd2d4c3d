"""BLIP's files of every task as a starting point for every model: nothing is lost unsaid."""

from __future__ import annotations

import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from lavis.common.registry import registry
from lavis.models import load_model_and_preprocess
from lavis.models.blip_models.blip import BlipBase
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_pretrain import BlipPretrain
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.models.med import XBertLMHeadDecoder
from omegaconf import OmegaConf
from small_models import TYPES, VIT, skip_init

from lavis_uniadapter.backbone.build import (
    build_text_decoder,
    build_text_encoder,
    build_visual_encoder,
)
from lavis_uniadapter.common.errors import CheckpointError
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.models import TunedBlip

TOKENIZER = "configs/tokenizers/shapes"
TASKS = ("retrieval", "vqa", "caption")
HEADS = ["temp"] + [
    f"{head}.{leaf}"
    for head in ("vision_proj", "text_proj", "itm_head")
    for leaf in ("weight", "bias")
]


@pytest.fixture
def med_config(tmp_path):
    """A text model of exactly the tokenizer's size, which is what BLIP's pre-training makes it."""
    config = json.loads((PACKAGE_ROOT / "configs/models/shapes_med_config.json").read_text())
    config.update(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    config["vocab_size"] = len(TunedBlip.build_tokenizer(TOKENIZER, 10**6))
    (tmp_path / "med.json").write_text(json.dumps(config))
    return str(tmp_path / "med.json")


@pytest.fixture
def lavis_file(med_config, monkeypatch, tmp_path):
    """Write what LAVIS's or BLIP's own model of a task saves."""
    tokenizer = TunedBlip.build_tokenizer(TOKENIZER, 10**6)
    monkeypatch.setattr(BlipBase, "init_tokenizer", classmethod(lambda cls: tokenizer))

    def write(task, *, wrapped=True, momentum=True):
        torch.manual_seed(11)
        visual = build_visual_encoder("custom", 32, VIT)
        encoder = build_text_encoder(med_config, 32)
        decoder = XBertLMHeadDecoder(build_text_decoder(med_config, 32).config)
        model = {
            "pretrain": lambda: BlipPretrain(visual, encoder, decoder, 8, embed_dim=16),
            "retrieval": lambda: BlipRetrieval(visual, encoder, 8, embed_dim=16),
            "vqa": lambda: BlipVQA(visual, encoder, decoder),
            "caption": lambda: BlipCaption(visual, decoder, prompt="a picture of "),
        }[task]()
        state = model.state_dict()
        if not momentum:
            state = {k: v for k, v in state.items() if not k.split(".")[0].endswith("_m")}
        path = tmp_path / f"{task}.pth"
        torch.save({"model": state, "epoch": 3} if wrapped else state, path)
        return path, state

    return write


@pytest.fixture
def build(med_config):
    def from_config(task, path, **overrides):
        cls = registry.get_model_class(f"blip_uniadapter_{task}")
        config = OmegaConf.load(cls.default_config_path("shapes")).model
        small = {"vit": VIT, "image_size": 32, "med_config_path": med_config}
        if task == "retrieval":
            small |= {"embed_dim": 16, "queue_size": 8}
        return cls.from_config(
            OmegaConf.merge(config, {"vit": None}, small, {"pretrained": str(path)}, overrides)
        )

    return from_config


# What stays random when a model starts from a file; or what the file lacks, which is refused.
EXPECTED = {
    ("pretrain", "retrieval"): [],
    ("pretrain", "vqa"): [],
    ("pretrain", "caption"): [],
    ("retrieval", "retrieval"): [],
    ("retrieval", "vqa"): "text_decoder",
    ("retrieval", "caption"): "text_decoder",
    ("vqa", "retrieval"): HEADS,
    ("vqa", "vqa"): [],
    ("vqa", "caption"): [],
    ("caption", "retrieval"): "text_encoder",
    ("caption", "vqa"): "text_encoder",
    ("caption", "caption"): [],
}


@pytest.mark.parametrize(("source", "task"), EXPECTED)
def test_every_file_in_every_model(lavis_file, build, caplog, source, task):
    path, state = lavis_file(source)
    expected = EXPECTED[source, task]
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=f"missing: {expected}"):
            build(task, path)
        return
    with caplog.at_level("WARNING"):
        model = build(task, path)
    assert model.randomly_initialised == expected
    assert ("start at random values" in caplog.text) == bool(expected)
    never_saw_an_image = (source, task) == ("vqa", "caption")
    assert ("never seen an image" in caplog.text) == never_saw_an_image
    for name in expected:
        assert name in caplog.text
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("adapters", "momen"))}
    shared = [k for k in own if k in state and "queue" not in k]
    assert any(k.startswith("visual_encoder.") for k in shared)
    for key in shared:
        assert torch.equal(own[key], state[key]), key


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
def test_wrapped_or_not_with_or_without_momentum(lavis_file, build, task, wrapped, momentum):
    path, state = lavis_file("pretrain", wrapped=wrapped, momentum=momentum)
    model = build(task, path)
    assert model.randomly_initialised == []
    assert torch.equal(model.visual_encoder.cls_token, state["visual_encoder.cls_token"])


def test_a_file_behind_a_url(lavis_file, build, tmp_path, monkeypatch):
    """Fetched once into the cache of torch.hub, as LAVIS does."""
    path, state = lavis_file("retrieval")
    (tmp_path / "served").mkdir()
    path.rename(tmp_path / "served/blip.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/blip.pth"
        model = build("retrieval", url)
        server.shutdown()
    assert torch.equal(model.visual_encoder.cls_token, state["visual_encoder.cls_token"])
    assert model.base_name == "blip.pth"
    again = build("retrieval", url)  # nobody serves it any more
    assert again.base_fingerprint == model.base_fingerprint


@pytest.mark.parametrize("task", TASKS)
def test_positional_embedding_at_another_image_size(lavis_file, build, task):
    path, state = lavis_file("pretrain")
    larger = build(task, path, image_size=64).visual_encoder.pos_embed
    assert larger.shape == (1, 17, 32)
    assert torch.equal(larger[:, 0], state["visual_encoder.pos_embed"][:, 0])


@pytest.mark.parametrize(
    ("arch", "model_type"), [(arch, t) for arch, types in TYPES.items() for t in types]
)
def test_load_model_and_preprocess_of_every_type(arch, model_type, tmp_path, monkeypatch):
    """As a user would, but for the weights and the hub's tokenizer."""
    skip_init(monkeypatch)
    cls = registry.get_model_class(arch)
    config = OmegaConf.load(cls.default_config_path(model_type))
    if model_type != "shapes":
        assert str(config.model.pretrained).startswith("https://")
    config.model.update(pretrained=None, tokenizer=TOKENIZER)
    if arch == "blip_uniadapter_retrieval":
        config.model.queue_size = 16
    OmegaConf.save(config, tmp_path / "type.yaml")
    monkeypatch.setitem(cls.PRETRAINED_MODEL_CONFIG_DICT, model_type, str(tmp_path / "type.yaml"))
    model, vis, txt = load_model_and_preprocess(arch, model_type, is_eval=True)
    assert isinstance(model, cls) and not model.training
    released = {"coco_retrieval", "flickr_retrieval", "vqav2_vqa"}  # r=512
    default = 18_945_024 if f"{model_type}_{arch.split('_')[-1]}" in released else 4_784_640
    assert model.parameter_counts()["adapters"] == (38_976 if model_type == "shapes" else default)
    assert set(vis) == set(txt) == {"train", "eval"}
    video = model_type not in ("coco", "flickr", "vqav2")
    assert hasattr(getattr(vis["eval"], "options", None), "n_frms") == video
    assert model.method_config.frame_aware == (video and arch == "blip_uniadapter_retrieval")
    side = {"coco": 384, "flickr": 384, "vqav2": 480, "shapes": 64}.get(model_type, 224)
    assert config.model.image_size == side
    for mode in ("train", "eval"):
        assert config.preprocess.vis_processor[mode].image_size == side
    if arch == "blip_uniadapter_caption":
        assert txt["train"]("A dog.") == f"{model.prompt}a dog"
