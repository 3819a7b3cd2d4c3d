"""Configuration files and options of any content are read or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf

import lavis_uniadapter.runners.launch  # noqa: F401  (registers LAVIS's schedules)
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.processors import VideoTrain

ARCH, DATASET = "blip_uniadapter_retrieval", "shapes_retrieval"
MINIMAL = {
    "model": {"arch": ARCH, "model_type": "shapes"},
    "datasets": {DATASET: {}},
    "run": {
        "task": "uniadapter_retrieval",
        "num_workers": 0,
        "batch_size_eval": 1,
        "batch_size_train": 1,
        "output_dir": "out",
        "max_epoch": 1,
        "lr_sched": "linear_warmup_cosine_lr",
        "init_lr": 0.1,
        "min_lr": 0,
        "weight_decay": 0,
    },
}
PROCESSOR = f"datasets.{DATASET}.vis_processor.train"

whole = st.integers(1, 99)
share = st.floats(0, 0.875, width=16)
# neither ${interpolation} nor ???, OmegaConf's word for a missing value
printable = st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="$?")
words = st.text(printable, min_size=1, max_size=8)
KEYS: dict[str, st.SearchStrategy] = {
    "model.queue_size": whole,
    "model.alpha": share,
    "model.max_txt_len": st.integers(2, 512),
    "model.negative_all_rank": st.booleans(),
    "model.tuning": st.sampled_from(["uniadapter", "adapter", "lora", "bitfit", "linear", "full"]),
    "model.pretrained": words.map("https://example.org/{}.pth".format) | st.none(),
    "model.adapter.bottleneck": whole,
    "model.adapter.dropout": share,
    "model.adapter.share": st.sampled_from(["none", "down", "up", "all"]),
    "model.adapter.reuse_textual_up": st.booleans(),
    "model.adapter.init": st.sampled_from(["identity", "released"]),
    "model.lora.rank": whole,
    "model.lora.targets": st.sampled_from([["query"], ["ffn_in"], ["query", "ffn_in"]]),
    f"datasets.{DATASET}.generate.seed": whole,
    f"datasets.{DATASET}.build_info.videos.storage": words,
    f"datasets.{DATASET}.build_info.annotations.val.storage": words | st.lists(words),
    f"datasets.{DATASET}.skip_missing": st.booleans(),
    f"{PROCESSOR}.min_scale": st.floats(0.125, 0.875, width=16),
    f"{PROCESSOR}.n_frms": whole,
    "run.init_lr": share,
    "run.seed": st.integers(0, 2**32 - 1),
    "run.k_test": whole,
    "run.itc_weight": share,
    "run.amp": st.sampled_from([None, "bf16", "fp16"]),
    "run.output_dir": words,
    "run.valid_splits": st.lists(st.sampled_from(["val", "test"]), max_size=2),
}
NOWHERE = object()  # a value that neither the file nor an option gives


def set_at(tree: dict, path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = value


def get_at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return NOWHERE
        tree = tree[key]
    return tree


def minimal() -> dict:
    return json.loads(json.dumps(MINIMAL))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "config.yaml"


@pytest.fixture(scope="module")
def defaults() -> dict:
    """What stands in the packaged configurations of the model and of the dataset's builder."""
    model_cls, builder = registry.get_model_class(ARCH), registry.get_builder_class(DATASET)
    return {
        "model": yaml.safe_load(open(model_cls.default_config_path("shapes")))["model"],
        "datasets": yaml.safe_load(open(builder.default_config_path()))["datasets"],
        "run": {"seed": 42, "amp": None},
    }


PROCESSOR_GIVEN = {"name": "blip_video_train", "image_size": 64}
SCHEMA_DEFAULTS = {
    "model": {"pretrained": None},
    "datasets": {DATASET: {"skip_missing": False}},
    "run": {"k_test": 128, "itc_weight": 0.0, "valid_splits": []},
}


@examples(30)
@given(st.data())
def test_options_win_over_the_file_and_the_file_over_defaults(config_file, defaults, data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=8))
    content, options, expected = minimal(), [], dict.fromkeys(KEYS, NOWHERE)
    # keys that the tuning method does not read are refused
    if any(key.startswith("model.adapter.") for key in chosen):
        chosen = [k for k in chosen if k != "model.tuning" and not k.startswith("model.lora.")]
    elif any(key.startswith("model.lora.") for key in chosen):
        chosen = [key for key in chosen if key != "model.tuning"]
        set_at(content, "model.tuning", "lora")
    for tree in (SCHEMA_DEFAULTS, defaults, content):
        for key in KEYS:
            if (value := get_at(tree, key)) is not NOWHERE:
                expected[key] = value
    for key in chosen:
        places = data.draw(st.sampled_from(["file", "option", "both"]))
        if places != "option":
            expected[key] = data.draw(KEYS[key])
            set_at(content, key, expected[key])
        if places != "file":
            expected[key] = data.draw(KEYS[key])
            options.append(f"{key}={json.dumps(expected[key], ensure_ascii=False)}")
    if any(key.startswith(PROCESSOR) for key in chosen):
        for option, value in {**VideoTrain().model_dump(mode="json"), **PROCESSOR_GIVEN}.items():
            if (key := f"{PROCESSOR}.{option}") not in chosen:
                expected[key] = value
        for option, value in PROCESSOR_GIVEN.items():
            set_at(content, f"{PROCESSOR}.{option}", value)
    config_file.write_text(yaml.safe_dump(content), encoding="utf-8")
    config = load_config(config_file, options)
    found = OmegaConf.to_container(config.config)
    for key, value in expected.items():
        assert get_at(found, key) == value or (value is NOWHERE and get_at(found, key) is value)
    assert found["run"]["evaluate"] is False


# Where keys are checked, and the keys that are known there.
SECTIONS = {
    "model": ["queue_size", "alpha", "tuning", "adapter", "image_size"],
    "model.adapter": ["bottleneck", "scale", "dropout", "kv_bottleneck", "frame_aware"],
    "model.lora": ["rank", "alpha", "dropout", "targets"],
    f"datasets.{DATASET}": ["build_info", "vis_processor", "generate", "skip_missing"],
    f"datasets.{DATASET}.build_info": ["annotations", "videos", "images"],
    f"datasets.{DATASET}.build_info.annotations.train": ["storage", "url"],
    f"datasets.{DATASET}.vis_processor": ["train", "eval"],
    PROCESSOR: ["image_size", "n_frms", "min_scale", "randaug_ops"],
    "run": ["init_lr", "max_epoch", "batch_size_train", "k_test", "rerank_batch", "seed"],
}
letters = st.sampled_from("abcdefghijklmnopqrstuvwxyz_0")


@st.composite
def slips(draw, word: str) -> str:
    """A word with a letter too few, too many or wrong, or two of them in the wrong order."""
    at = draw(st.integers(0, len(word) - 1))
    kind = draw(st.sampled_from(["less", "more", "other", "swap"]))
    rest = word[at + 1 :]
    if kind == "less":
        return word[:at] + rest
    if kind == "swap":
        return word[:at] + rest[:1] + word[at] + rest[1:]
    return word[:at] + draw(letters) + (word[at:] if kind == "more" else rest)


@examples(60)
@given(st.sampled_from(sorted(SECTIONS)), st.booleans(), st.data())
def test_an_unknown_key_is_named(config_file, section, as_option, data):
    key = data.draw(st.sampled_from(SECTIONS[section]).flatmap(slips))
    known = {key for keys in SECTIONS.values() for key in keys} | {"features", "md5", "vit", "amp"}
    if key in known or not key:
        return
    content = minimal()
    set_at(content, PROCESSOR, dict(PROCESSOR_GIVEN))
    if not as_option:
        set_at(content, f"{section}.{key}", 1)
    config_file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as raised:
        load_config(config_file, [f"{section}.{key}=1"] if as_option else [])
    assert f"'{section}.{key}'" in str(raised.value)


def load_or_refuse(path, options=()) -> None:
    """Load a configuration; nothing but ConfigError, with a message, may come out."""
    try:
        load_config(path, options)
    except ConfigError as error:
        assert str(error)


# --- what nobody should write, and somebody will ------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**400, 10**401)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["${run.seed}", "${nothing}", "${", "???", "a" * 5000, "1e-4", "\0", ""])
)
anything = st.recursive(
    scalars,
    lambda value: (
        st.lists(value, max_size=3)
        | st.dictionaries(scalars.filter(lambda v: v == v), value, max_size=3)
    ),
    max_leaves=6,
)


def _paths(tree: Mapping, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


PLACES = sorted(
    {
        *_paths(MINIMAL),
        *KEYS,
        *SECTIONS,
        *(f"model.{key}" for key in ("image_size", "vit", "adapter_ckpt", "finetuned")),
        *(f"run.{key}" for key in ("resume_ckpt_path", "device", "runner", "min_len", "max_len")),
        *(f"run.{key}" for key in ("compile", "test_splits", "accum_grad_iters")),
        *(f"datasets.{DATASET}.{key}" for key in ("type", "data_type", "text_processor")),
        f"datasets.{DATASET}.build_info.annotations",
        f"datasets.{DATASET}.build_info.videos",
        f"{PROCESSOR}.name",
        f"{PROCESSOR}.image_size",
        "datasets.nothing",
    }
)


@examples(60)
@given(st.lists(st.tuples(st.sampled_from(PLACES), anything), min_size=1, max_size=2))
def test_any_value_anywhere_is_read_or_refused(config_file, changes):
    content = minimal()
    for path, value in changes:
        try:
            set_at(content, path, value)
        except (AttributeError, TypeError):  # the first change left no section there
            continue
    config_file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    load_or_refuse(config_file)


@examples(60)
@given(
    st.lists(
        st.text(max_size=20)
        | st.builds("{}={}".format, st.sampled_from(PLACES), st.text(max_size=8))
        | st.builds("{}{}=1".format, st.sampled_from(PLACES), st.text(alphabet=".[]0a", max_size=4))
        | st.builds("{}={}".format, st.sampled_from(PLACES), st.text("{}[]:,'\"&*!?|-$ .1a")),
        min_size=1,
        max_size=2,
    )
)
def test_any_option_is_read_or_refused(config_file, options):
    config_file.write_text(yaml.safe_dump(MINIMAL))
    load_or_refuse(config_file, options)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["model.adapter=5"], "model.adapter is 5; it must be a section"),
        (["model.lora=[1]"], "model.lora is .*; it must be a section"),
        (["model.vit=[]"], "model.vit is .*; it must be a section"),
        (["model.tuning=[lora]"], "model.tuning is .*one of uniadapter"),
        (["model.model_type=[shapes]"], "model.model_type is .*one of coco"),
        ([f"datasets.{DATASET}=5"], f"datasets.{DATASET} is 5; it must be a section"),
        (["datasets.5={}"], "Unknown dataset '5'"),
        ([f"datasets.{DATASET}.type=[1]"], f"datasets.{DATASET}.type is"),
        ([f"datasets.{DATASET}.vis_processor=x"], "vis_processor is 'x'; it must be a section"),
        ([f"{PROCESSOR}=blip_video_train"], f"{PROCESSOR} is 'blip_video_train'; it must be"),
        ([f"datasets.{DATASET}.generate=[1]"], "generate is .*; it must be a section"),
        ([f"datasets.{DATASET}.build_info.videos=x"], "build_info.videos is 'x'; it must be a"),
        (["run.max_epoch=True"], "run.max_epoch is True; it must be a whole number"),
        (["run.init_lr=.inf"], "run.init_lr is inf; it must be a finite number"),
        (
            [f"run.max_epoch=-{'9' * 400}"],
            r"run.max_epoch is -9+\.\.\.9+; it must be greater than or equal to 1",
        ),
        ([f"run.seed={2**32}"], "run.seed is 4294967296; it must be .* to 4294967295"),
        (["run.resume_ckpt_path=5"], "run.resume_ckpt_path: no file '5'"),
        ([f"run.resume_ckpt_path={'a' * 5000}"], r"run.resume_ckpt_path: no file 'a+\.\.\.a+'"),
        (["run.valid_splits=val"], r"run.valid_splits is 'val'; .* as in \[val\]"),
        (["run.prompt=${nothing}"], "nothing"),
        (["run.output_dir=${nothing}"], "nothing"),
        (["run.prompt=???"], "run.prompt"),
        (["run.seed={"], "Option 'run.seed={' cannot be read"),
        (["run.lr"], "'run.lr' has no '='"),
    ],
)
def test_impossible_options_are_named(config_file, options, expected):
    content = minimal()
    content["run"]["output_dir"] = "out"
    config_file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=expected):
        load_config(config_file, options)


@pytest.mark.parametrize(
    "content",
    [b"5", b"- model", b"\xff", b"a: 2020-99-99", b"a: &x [*x]", b"[" * 5000, b"a: {", b""],
)
def test_what_is_no_configuration_is_named(config_file, content):
    config_file.write_bytes(content)
    with pytest.raises(ConfigError, match="config.yaml"):
        load_config(config_file)


def test_one_value_may_refer_to_another(config_file):
    content = minimal()
    set_at(content, PROCESSOR, {"name": "blip_video_train", "image_size": "${model.image_size}"})
    set_at(content, f"datasets.{DATASET}.generate.image_size", "${model.image_size}")
    config_file.write_text(yaml.safe_dump(content))
    config = load_config(config_file, ["run.output_dir=seed-${run.seed}"])
    assert config.datasets_cfg[DATASET].generate.image_size == 64
    assert config.datasets_cfg[DATASET].vis_processor.train.image_size == 64
    assert config.run_cfg.output_dir == "seed-42"


@examples(60)
@given(
    st.binary(max_size=40)
    | st.text("{}[]:,'\"&*!?|>-$ .\n\t#%@1a", max_size=40).map(str.encode)
    | st.builds(
        lambda at, text: yaml.safe_dump(MINIMAL).encode()[:at] + text,
        st.integers(0, len(yaml.safe_dump(MINIMAL))),
        st.binary(max_size=4) | st.text("{}[]:,'\"&*!?|>-$ .\n\t1a").map(str.encode),
    )
)
def test_any_file_is_read_or_refused(config_file, content):
    config_file.write_bytes(content)
    load_or_refuse(config_file)
