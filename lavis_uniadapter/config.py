"""Configuration files: LAVIS's, with every key checked."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_uniadapter.distributed import choose_device
from lavis_uniadapter.errors import ConfigError, nearest, reject_unknown_keys

SECTIONS = ("model", "datasets", "run", "preprocess")
DATASET_KEYS = (
    "type",
    "data_type",
    "build_info",
    "vis_processor",
    "text_processor",
    "generate",
)
# What LAVIS's runner_base and its tasks read.
LAVIS_RUN_KEYS = (
    "runner",
    "task",
    "lr_sched",
    "init_lr",
    "min_lr",
    "warmup_lr",
    "warmup_steps",
    "lr_decay_rate",
    "weight_decay",
    "beta2",
    "max_epoch",
    "max_iters",
    "iters_per_inner_epoch",
    "accum_grad_iters",
    "num_workers",
    "batch_size_train",
    "batch_size_eval",
    "train_splits",
    "valid_splits",
    "test_splits",
    "train_dataset_ratios",
    "device",
    "world_size",
    "dist_url",
    "distributed",
    "gpu",
    "rank",
    "use_dist_eval_sampler",
    "seed",
    "output_dir",
    "evaluate",
    "amp",
    "resume_ckpt_path",
    "log_freq",
    "k_test",
    "max_len",
    "min_len",
    "num_beams",
    "num_ans_candidates",
    "inference_method",
    "prompt",
    "annotation_file",
    "report_metric",
)
RUNNER_KEYS = ("cache_root", "job_id", "max_grad_norm")


def load_config(cfg_path: str | Path, options: Sequence[str] = ()) -> Config:
    """Read a YAML file and options over it, check them, and merge LAVIS's defaults below them.

    Args:
        cfg_path: YAML file with the sections ``model``, ``datasets`` and ``run``.
        options: ``section.key=value`` strings, which win over the file.

    Raises:
        ConfigError: naming the first thing that is wrong.
    """
    path = Path(cfg_path)
    if not path.is_file():
        raise ConfigError(f"No configuration file '{cfg_path}'.")
    for option in options:
        if "=" not in option:
            raise ConfigError(
                f"Option '{option}' has no '='. Write --options section.key=value, e.g. "
                "run.init_lr=1e-4."
            )
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(options)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"'{cfg_path}' is not a valid configuration: {error}") from error
    for section in ("model", "datasets", "run"):
        if not isinstance(given.get(section), DictConfig):
            raise ConfigError(f"'{cfg_path}' has no section '{section}:'.")
    reject_unknown_keys(given.keys(), SECTIONS, "configuration")
    _check_model(given.model)
    _check_datasets(given.datasets)
    _check_run(given.run, registry.get_model_class(given.model.arch))
    given.run.device = choose_device(given.run.get("device", "auto"))
    given.run.seed = given.run.get("seed", 42)
    given.run.evaluate = given.run.get("evaluate", False)
    config = Config(Namespace(cfg_path=io.StringIO(OmegaConf.to_yaml(given)), options=[]))
    check = getattr(registry.get_model_class(given.model.arch), "check_config", None)
    if check is not None:
        check(config.model_cfg)
    return config


def _check_model(model: Mapping) -> None:
    names = registry.list_models()
    arch = model.get("arch")
    if arch not in names:
        raise ConfigError(f"model.arch is '{arch}'.{nearest(str(arch), names)} See model_zoo.")
    types = registry.get_model_class(arch).PRETRAINED_MODEL_CONFIG_DICT
    if model.get("model_type") not in types:
        raise ConfigError(
            f"model.model_type is '{model.get('model_type')}'; '{arch}' has {', '.join(types)}."
        )
    check = getattr(registry.get_model_class(arch), "check_config", None)
    if check is not None:
        check(model)


def _check_datasets(datasets: Mapping) -> None:
    names = registry.list_datasets()
    if not datasets:
        raise ConfigError("The section 'datasets:' names no dataset.")
    for name, section in datasets.items():
        if name not in names:
            raise ConfigError(f"Unknown dataset '{name}'.{nearest(name, names)}")
        reject_unknown_keys((section or {}).keys(), DATASET_KEYS, f"datasets.{name}")
        for kind in ("vis_processor", "text_processor"):
            for processor in ((section or {}).get(kind) or {}).values():
                known = registry.list_processors()
                if processor is not None and processor.get("name") not in known:
                    raise ConfigError(
                        f"datasets.{name}.{kind}: unknown processor '{processor.get('name')}'."
                        f"{nearest(str(processor.get('name')), known)}"
                    )


def _check_run(run: Mapping, model_cls: type) -> None:
    for key, names in (
        ("task", registry.list_tasks()),
        ("runner", registry.list_runners()),
        ("lr_sched", registry.list_lr_schedulers()),
    ):
        if key == "task" or key in run:
            if run.get(key) not in names:
                raise ConfigError(
                    f"run.{key} is '{run.get(key)}'.{nearest(str(run.get(key)), names)} "
                    f"Known: {', '.join(names)}."
                )
    task_keys = getattr(registry.get_task_class(run.task), "RUN_KEYS", ())
    model_keys = getattr(model_cls, "RUN_KEYS", ())
    reject_unknown_keys(run.keys(), (*LAVIS_RUN_KEYS, *RUNNER_KEYS, *task_keys, *model_keys), "run")
    for key in ("batch_size_train", "batch_size_eval", "max_epoch"):
        if key in run and (not isinstance(run[key], int) or run[key] < 1):
            raise ConfigError(f"run.{key} is {run[key]!r}; it must be a whole number >= 1.")
