"""What holds for any input: of sampling, padding, ranking metrics, shards, configuration files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf
from test_lavis_parity import Gallery
from test_two_stage import build_selective
from torch.utils.data import DataLoader

import lavis_uniadapter.runners.launch  # noqa: F401  (registers LAVIS's schedules)
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.common.schema.processors import VideoTrain
from lavis_uniadapter.datasets.sampling import TrainingShard
from lavis_uniadapter.evaluation import two_stage
from lavis_uniadapter.evaluation.ranking_metrics import (
    query_ranks,
    retrieval_metrics,
    retrieval_ranks,
)
from lavis_uniadapter.evaluation.two_stage import two_stage_scores
from lavis_uniadapter.processors.video import sample_frame_indices


def examples(number: int) -> settings:
    """How many to try where the profile's 100 take long or find little; others in proportion."""
    return settings(max_examples=max(1, settings.default.max_examples * number // 100))


# --- sampling -----------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 40), st.data())
def test_a_frame_of_each_segment(num_frames, n_frms, data):
    positions = st.floats(0, 1, exclude_max=True, width=32)
    if one := data.draw(st.booleans()):
        position = data.draw(positions)
    else:
        position = torch.tensor(data.draw(st.lists(positions, min_size=n_frms, max_size=n_frms)))
    indices = sample_frame_indices(num_frames, n_frms, position)
    assert len(indices) == n_frms and all(type(i) is int for i in indices)
    assert indices == sorted(indices)
    for segment, index in enumerate(indices):
        first, end = (n * num_frames // n_frms for n in (segment, segment + 1))
        assert first <= index < max(end, first + 1) <= num_frames
    if num_frames >= n_frms:
        assert len(set(indices)) == n_frms
    else:
        times = [indices.count(frame) for frame in range(num_frames)]
        assert min(times) >= 1 and max(times) - min(times) <= 1
    if one and position == 0:
        assert indices[0] == 0
    if n_frms == num_frames:
        assert indices == list(range(num_frames))


# --- padding ------------------------------------------------------------------------------------

WORDS = [
    word
    for word in (PACKAGE_ROOT / "configs/tokenizers/shapes/vocab.txt").read_text().split()
    if not word.startswith(("[", "##"))
]
texts = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)  # longer than max_txt_len, too


@pytest.fixture(scope="module")
def model(build_model):
    return build_selective(build_model).eval()


@examples(20)
@given(st.lists(texts, min_size=1, max_size=8), st.integers(0, 20), st.data())
def test_a_text_is_encoded_alike_in_any_company(model, group, padding, data):
    order = data.draw(st.permutations(range(len(group))))
    with torch.no_grad():
        alone = torch.cat([model.encode_text(text).feat for text in group])
        tokens = model.tokenize([group[i] for i in order])
        more = torch.zeros(len(group), padding, dtype=torch.long)
        tokens["input_ids"] = torch.cat(
            [tokens.input_ids, more + model.tokenizer.pad_token_id], dim=1
        )
        tokens["attention_mask"] = torch.cat([tokens.attention_mask, more], dim=1)
        together = model.encode_text(tokens).feat
    torch.testing.assert_close(together, alone[list(order)], rtol=0, atol=1e-5)


@examples(20)
@given(
    st.lists(texts, min_size=1, max_size=8),
    st.integers(1, 4),
    *(st.integers(1, 9) for _ in range(3)),
    st.booleans(),
    st.sampled_from([None, 3]),
)
def test_scores_do_not_depend_on_batches(
    model, group, number, rerank_batch, text_batch, loader_batch, on_disk, frames
):
    gallery = Gallery(number, frames=frames)
    gallery.text = group
    scores = {}
    for how, (pairs, at_once, size, memory) in {
        "one by one": (1, 1, 1, 16),  # without any padding
        "in batches": (rerank_batch, text_batch, loader_batch, 16 * (not on_disk)),
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(two_stage, "TEXT_BATCH", at_once)
            scores[how] = two_stage_scores(
                model,
                DataLoader(gallery, batch_size=size),
                k_test=100,
                itc_weight=0.5,
                rerank_batch=pairs,
                feature_memory=memory,
            )
    for one, other in zip(*scores.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# --- ranking metrics ----------------------------------------------------------------------------


@st.composite
def galleries(draw) -> tuple[list[list[int]], list[list[int]], dict[int, list[int]]]:
    """Whole scores from few values, so with many ties; several texts a visual input."""
    owners = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    names = {owner: visual for visual, owner in enumerate(dict.fromkeys(owners))}
    txt2img = {text: names[owner] for text, owner in enumerate(owners)}
    img2txt = {v: [t for t, owner in txt2img.items() if owner == v] for v in names.values()}
    row = st.lists(st.integers(-2, 3), min_size=len(owners), max_size=len(owners))
    matrix = st.lists(row, min_size=len(names), max_size=len(names))
    v2t, t2v_transposed = draw(matrix), draw(matrix)
    return v2t, [list(column) for column in zip(*t2v_transposed, strict=True)], img2txt


def naive_metrics(scores: list[list[int]], right: Mapping[int, list[int]]) -> dict[str, float]:
    ranks = []
    for query, candidates in right.items():
        best = max(scores[query][c] for c in candidates)
        rank = 1
        for candidate, score in enumerate(scores[query]):
            if candidate not in candidates and score >= best:
                rank += 1
        ranks.append(rank)
    ranks.sort()
    middle = [ranks[(len(ranks) - 1) // 2], ranks[len(ranks) // 2]]
    return {
        **{f"r{k}": 100 * sum(r <= k for r in ranks) / len(ranks) for k in (1, 5, 10)},
        "medr": sum(middle) / 2,
        "meanr": sum(ranks) / len(ranks),
    }


@given(galleries(), st.sampled_from(["video", "image"]))
def test_metrics_are_those_of_a_plain_loop(gallery, visual):
    v2t, t2v, img2txt = gallery
    txt2img = {text: v for v, own in img2txt.items() for text in own}
    expected = {
        f"{direction}_{name}": value
        for direction, scores, right in (
            (f"t2{visual[0]}", t2v, {t: [v] for t, v in txt2img.items()}),
            (f"{visual[0]}2t", v2t, img2txt),
        )
        for name, value in naive_metrics(scores, right).items()
    }
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in (v2t, t2v)]
    found = retrieval_metrics(retrieval_ranks(*tensors, txt2img, img2txt, visual))
    del found["mean_recall"]
    assert found == pytest.approx(expected, rel=0, abs=1e-9)


@given(
    galleries(),
    st.sampled_from([torch.exp, torch.atan, lambda x: x**3, lambda x: 1e4 * x - 7]),
)
def test_ranks_depend_on_the_order_of_scores_alone(gallery, increasing):
    v2t, _, right = gallery
    scores = torch.tensor(v2t, dtype=torch.float64)
    assert torch.equal(query_ranks(increasing(scores), right), query_ranks(scores, right))


@given(galleries(), st.data())
def test_ranks_do_not_depend_on_the_order_of_queries_and_candidates(gallery, data):
    v2t, _, right = gallery
    scores = torch.tensor(v2t, dtype=torch.float32)
    queries, candidates = (data.draw(st.permutations(range(n))) for n in scores.shape)
    moved = {new: [candidates.index(c) for c in right[old]] for new, old in enumerate(queries)}
    found = query_ranks(scores[queries][:, candidates], moved)
    assert torch.equal(found, query_ranks(scores, right)[queries])


# --- sharding -----------------------------------------------------------------------------------


@given(
    st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 50), st.data()
)
def test_training_ranks_share_an_epoch_out_and_may_begin_in_it(number, world, seed, epoch, data):
    def shares(first=0, of_epoch=epoch, of_seed=seed):
        shards = [TrainingShard(range(number), rank, world, of_seed) for rank in range(world)]
        for shard in shards:
            shard.start(of_epoch, first)
        return [list(shard) for shard in shards], [len(shard) for shard in shards]

    whole, lengths = shares()
    assert lengths == [number // world] * world == [len(share) for share in whole]
    seen = [index for share in whole for index in share]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(number))
    assert shares()[0] == whole  # the order is the seed's and the epoch's
    first = data.draw(st.integers(0, number // world))
    assert shares(first)[0] == [share[first:] for share in whole]
    if number // world >= 20:
        assert shares(of_epoch=epoch + 1)[0] != whole and shares(of_seed=seed ^ 1)[0] != whole


# --- configuration files ------------------------------------------------------------------------

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
    "model.pretrained": words | st.none(),
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
        (["run.init_lr=.inf"], "run.init_lr is inf; it must be a number"),
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
