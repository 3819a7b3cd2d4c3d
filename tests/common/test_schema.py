"""The schema by itself: what it imports, its page in the documentation, and its messages."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.common.config import validate
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.common.schema import MODELS, Evaluation, RunSection, document
from lavis_uniadapter.common.schema.methods import METHODS

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
