"""The schema by itself: what it imports, its page in the documentation, and its messages."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from lavis.common.registry import registry
from pydantic import ValidationError

import lavis_uniadapter.runners.launch  # noqa: F401  (registers LAVIS's schedules)
from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.common import registered
from lavis_uniadapter.common.config import validate
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.common.schema import MODELS, Evaluation, RunSection, document
from lavis_uniadapter.common.schema.methods import METHODS
from lavis_uniadapter.common.schema.processors import PROCESSORS
from lavis_uniadapter.tools import recipes

NEEDED = {"task": "vqa", "output_dir": "out", "batch_size_eval": 1, "num_workers": 0}
EVALUATED = {**NEEDED, "evaluate": True, "test_splits": ["test"]}


def test_a_configuration_is_validated_without_torch_and_lavis():
    """Of the package, whose own ``__init__`` is passed over, and of everything that it imports."""
    code = f"""
import sys, types
package = types.ModuleType("lavis_uniadapter")
package.__path__ = [{str(PACKAGE_ROOT)!r}]
sys.modules["lavis_uniadapter"] = package
from lavis_uniadapter.common.config import validate
from lavis_uniadapter.tools.compare.plan import read_plan
validate({str(PACKAGE_ROOT.parent / "projects/uniadapter/train/shapes_retrieval.yaml")!r})
print(*{{"torch", "lavis", "transformers"}}.intersection(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_page_of_the_documentation_is_up_to_date():
    assert document.PAGE.read_text(encoding="utf-8") == document.render(), (
        "python -m lavis_uniadapter.common.schema.document"
    )


def test_every_key_has_a_meaning():
    for title, section in document.SECTIONS:
        for key, field in section.model_fields.items():
            inherited = section in MODELS.values() and key in ("arch", "model_type")
            assert field.description or inherited, f"{title}: {key}"


def test_the_schema_and_the_methods_name_the_same():
    assert list(METHODS) == list(TUNING_METHODS)
    for section in MODELS.values():
        assert section.model_fields["tuning"].annotation.__args__ == tuple(METHODS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init_rl": 1}, "Unknown configuration key 'run.init_rl'. Did you mean 'init_lr'?"),
        ({"zzz": 1}, "Unknown configuration key 'run.zzz'. Known keys: accum_grad_iters, amp"),
        ({5: 1}, "Unknown configuration key 'run.5'."),
        ({"task": None}, "run.task is None; it must be a text."),
        ({"beta2": 1}, "run.beta2 is 1; it must be less than 1."),
        ({"max_grad_norm": 0}, "run.max_grad_norm is 0; it must be greater than 0."),
        ({"device": "gpu"}, "run.device is 'gpu'; it must be one of auto, cpu, cuda."),
        ({"init_lr": "1e-4"}, "run.init_lr is '1e-4'; it must be a number."),
        ({"train_dataset_ratios": {"coco": -1}}, "run.train_dataset_ratios.coco is -1; it must"),
        ({"min_len": 12}, "run.min_len 12 exceeds run.max_len 10."),
        ({"evaluate": False}, "run.batch_size_train is missing: training needs it."),
        ({"job_id": [1]}, "run.job_id is [1]; it must be a text."),
        ({"job_id": "a/b"}, "run.job_id is 'a/b'; it must be a name without / or \\."),
        ({"amp": [1]}, "run.amp is [1]; it must be one of auto, bf16, fp16."),
        ({"train_splits": "a"}, "run.train_splits is 'a'; it must be a list, as in [val]."),
    ],
)
def test_a_message_names_the_key_the_value_and_what_it_must_be(changes, expected):
    with pytest.raises(ConfigError) as error:
        RunSection.read({**EVALUATED, **changes}, "run")
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
    del (values := dict(EVALUATED))["task"]
    with pytest.raises(ConfigError, match=r"^run\.task is missing\.$"):
        RunSection.read(values, "run")


def test_defaults_depend_on_the_task_where_they_must():
    caption = RunSection.read({**EVALUATED, "task": "uniadapter_captioning"}, "run")
    assert (caption.max_len, caption.min_len, caption.selection_metric) == (30, 5, "cider")
    other = Evaluation.for_task("uniadapter_retrieval", {"k_test": 3, "unrelated": 1})
    assert (other.max_len, other.k_test, other.selection_metric) == (10, 3, "mean_recall")


PLACE = re.compile(r"(path|_dir|_root|_ckpt|_file|storage|url|pretrained|finetuned|tokenizer)$")


def properties():
    """Every key of the schema, with its section and what it must be."""
    for title, section in document.SECTIONS:
        for key, schema in section.model_json_schema()["properties"].items():
            yield title, section, key, document._value(schema)


def test_every_place_is_a_path():
    for title, _, key, value in properties():
        if PLACE.search(key) and key != "dist_url" and value != "boolean":
            assert value.startswith("path"), f"{title}: {key} is a {value}"


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        *(("shapes_retrieval", f"model.{key}") for key in ("pretrained", "tokenizer")),
        *(("shapes_retrieval", f"model.{key}") for key in ("adapter_ckpt", "med_config_path")),
        *(("shapes_retrieval", f"run.{key}") for key in ("output_dir", "cache_root")),
        ("shapes_retrieval", "datasets.shapes_retrieval.build_info.videos.storage"),
        ("custom_retrieval", "datasets.custom_retrieval.build_info.annotations.test.storage"),
        ("blip_retrieval_flickr", "model.pretrained"),
    ],
)
def test_the_home_folder_has_a_short_name(tmp_path, monkeypatch, recipe, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    if key == "model.pretrained":
        (tmp_path / "x").touch()
    else:
        (tmp_path / "x").mkdir()
    content = validate(recipes.runs()[recipe], [f"{key}=~/x"])
    for part in key.split("."):
        content = content[part]
    assert content == str(tmp_path / "x")


def test_every_number_is_finite():
    for title, section, key, value in properties():
        if not value.startswith("number"):
            continue
        for number in (math.inf, -math.inf, math.nan, 1e300, 10**400):
            with pytest.raises(ValidationError) as error:
                section.model_validate({key: number})
            assert any(e["loc"][0] == key for e in error.value.errors()), f"{title}: {key}"


@pytest.mark.parametrize(
    ("recipe", "option", "expected"),
    [
        ("shapes_retrieval", "run.itc_weight=.inf", "run.itc_weight is inf; it must be a finite"),
        ("shapes_retrieval", "run.itc_weight=-1", "run.itc_weight is -1; it must be greater"),
        ("shapes_retrieval", "run.init_lr=1e4", "run.init_lr is 10000.0; it must be less than"),
        ("blip_retrieval_flickr", "model.alpha=.nan", "model.alpha is nan; it must be a finite"),
        (
            "flickr_retrieval",
            "datasets.flickr30k.vis_processor.train.min_scale=.inf",
            "datasets.flickr30k.vis_processor.train.min_scale is inf; it must be a finite",
        ),
        (
            "msrvtt_retrieval",
            "datasets.msrvtt_retrieval.vis_processor.eval.std=[1,0,1]",
            "datasets.msrvtt_retrieval.vis_processor.eval.std.1 is 0; it must be greater than 0",
        ),
    ],
)
def test_numbers_without_sense_are_refused(recipe, option, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        validate(recipes.runs()[recipe], [option])


def test_the_sources_say_what_is_registered():
    found, known = registered.Sources(), registered.Registry()
    packaged = {
        kind: [n for n in known.names[kind] if classes[n].__module__.startswith("lavis")]
        for kind in registered.KINDS
        for classes in [registry.mapping[f"{kind}_name_mapping"]]
    }
    assert found.names == packaged
    for kind in registered.TYPES:
        for name in packaged[kind]:
            types = found.types(kind, name)
            assert types is None or list(types) == list(known.types(kind, name)), name
    assert found.types("model", "blip_retrieval") == ["coco", "flickr"]
    assert found.types("builder", "msrvtt_retrieval") == ["default"]
    for name in set(packaged["processor"]) - set(PROCESSORS):  # of these the schema knows them
        options = found.options(name)
        assert options is None or options == known.options(name), name
    assert found.options("blip_caption") == ["prompt", "max_words"]


def test_names_that_look_like_numbers_are_names():
    assert RunSection.read({**EVALUATED, "job_id": 20240101}, "run").job_id == "20240101"


RECIPES = PACKAGE_ROOT.parent / "projects"


@pytest.mark.parametrize(
    ("recipe", "option", "expected"),
    [
        (
            "uniadapter/train/shapes_retrieval.yaml",
            "datasets.shapes_retrieval.vis_processor.eval.image_size=96",
            "datasets.shapes_retrieval.vis_processor.eval.image_size is 96 and model.image_size is",
        ),
        (
            "baselines/alpro_retrieval_msrvtt.yaml",
            "model.timesformer.n_frms=4",
            "vis_processor.train.n_frms is 8 and model.timesformer.n_frms is 4. Give both the same",
        ),
        (
            "baselines/alpro_retrieval_msrvtt.yaml",
            "model.timesformer=5",
            "model.timesformer is 5; it must be a section.",
        ),
        (
            "baselines/alpro_retrieval_msrvtt.yaml",
            "model.timesformer=null",
            "model.timesformer is None; it must be a section.",
        ),
    ],
)
def test_sizes_of_processors_and_models_are_compared_before_lavis_is_imported(
    recipe, option, expected
):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        validate(RECIPES / recipe, [option])


def test_retrieval_settings_are_refused_for_other_models():
    recipes = PACKAGE_ROOT.parent / "projects/uniadapter/train"
    with pytest.raises(ConfigError, match="run.rerank_batch is given, and model.arch"):
        validate(recipes / "shapes_qa.yaml", ["run.rerank_batch=8"])
    validate(recipes / "shapes_retrieval.yaml", ["run.rerank_batch=8"])
