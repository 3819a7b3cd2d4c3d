"""Configuration files: LAVIS's, with every key checked."""

from __future__ import annotations

import inspect
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from lavis.common.config import Config
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import load_dataset_config
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_uniadapter.distributed import choose_device
from lavis_uniadapter.errors import ConfigError, nearest, reject_unknown_keys

SECTIONS = ("model", "datasets", "run")
DATASET_KEYS = (
    "type",
    "data_type",
    "build_info",
    "vis_processor",
    "text_processor",
    "generate",
    "skip_missing",
    "allow_missing",
)
BUILD_INFO_KEYS = ("annotations", "images", "videos", "features")
ANNOTATION_KEYS = ("url", "storage", "md5")
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
    "accum_grad_iters",
    "num_workers",
    "batch_size_train",
    "batch_size_eval",
    "train_splits",
    "valid_splits",
    "test_splits",
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
# selection_metric is read by this package's tasks, and stays when LAVIS's are swapped in.
RUNNER_KEYS = (
    "cache_root",
    "job_id",
    "max_grad_norm",
    "selection_metric",
    "compile",
    "resume",
    "checkpoint_freq",
    "data_timeout",
    "unreadable_threshold",
    "max_skipped_steps",
    "check_files",
)
# Read by LAVIS's other runner alone.
RUNNER_ITER_KEYS = ("max_iters", "iters_per_inner_epoch", "train_dataset_ratios")
# (least, whole): what a number must be; a run that only evaluates may leave it out.
RUN_NUMBERS = {
    "batch_size_train": (1, True),
    "batch_size_eval": (1, True),
    "max_epoch": (1, True),
    "num_workers": (0, True),
    "accum_grad_iters": (1, True),
    "log_freq": (1, True),
    "seed": (0, True),
    "k_test": (0, True),
    "warmup_steps": (0, True),
    "num_beams": (1, True),
    "max_len": (1, True),
    "min_len": (0, True),
    "num_ans_candidates": (1, True),
    "checkpoint_freq": (0, True),
    "max_skipped_steps": (1, True),
    "data_timeout": (0, False),
    "unreadable_threshold": (0, False),
    "max_grad_norm": (0, False),
    "init_lr": (0, False),
    "min_lr": (0, False),
    "weight_decay": (0, False),
}
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NEEDED = ("num_workers", "batch_size_eval", "output_dir")
NEEDED_TO_TRAIN = ("batch_size_train", "max_epoch", "lr_sched", "init_lr", "min_lr", "weight_decay")


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
    given.datasets = {name: _with_defaults(name, s or {}) for name, s in given.datasets.items()}
    _check_run(given.run, registry.get_model_class(given.model.arch))
    given.run.device = choose_device(given.run.get("device", "auto"))
    given.run.seed = given.run.get("seed", 42)
    given.run.evaluate = given.run.get("evaluate", False)
    config = Config(Namespace(cfg_path=io.StringIO(OmegaConf.to_yaml(given)), options=[]))
    # LAVIS adds its defaults under their own name, which for some builders is another.
    for name in set(config.datasets_cfg) - set(given.datasets):
        del config.datasets_cfg[name]
    check = getattr(registry.get_model_class(given.model.arch), "check_config", None)
    if check is not None:
        check(config.model_cfg)
        _check_image_sizes(config)
    return config


def _check_image_sizes(config: Config) -> None:
    size = config.model_cfg.get("image_size")
    for name, section in config.datasets_cfg.items():
        for mode, processor in (section.get("vis_processor") or {}).items():
            given = (processor or {}).get("image_size", size)
            if given != size:
                raise ConfigError(
                    f"datasets.{name}.vis_processor.{mode}.image_size is {given} and "
                    f"model.image_size is {size}. Give both the same."
                )


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


def _with_defaults(name: str, section: Mapping) -> DictConfig:
    """A dataset's section over the defaults of its builder."""
    builder = registry.get_builder_class(name)
    path = builder.default_config_path(type=section.get("type", "default"))
    return OmegaConf.merge(load_dataset_config(path), section)


def _check_datasets(datasets: Mapping) -> None:
    names = registry.list_datasets()
    if not datasets:
        raise ConfigError("The section 'datasets:' names no dataset.")
    for name, section in datasets.items():
        if name not in names:
            raise ConfigError(f"Unknown dataset '{name}'.{nearest(name, names)}")
        section, where = section or {}, f"datasets.{name}"
        reject_unknown_keys(section, DATASET_KEYS, where)
        types = registry.get_builder_class(name).DATASET_CONFIG_DICT
        if section.get("type", "default") not in types:
            raise ConfigError(f"{where}.type is '{section.type}'; it has {', '.join(types)}.")
        for key in ("skip_missing", "allow_missing"):
            _check_flag(f"{where}.{key}", section.get(key, False))
        for kind in ("vis_processor", "text_processor"):
            reject_unknown_keys(section.get(kind) or {}, ("train", "eval"), f"{where}.{kind}")
            for mode, processor in (section.get(kind) or {}).items():
                if processor is not None:
                    _check_processor(processor, f"{where}.{kind}.{mode}")
        build_info = section.get("build_info") or {}
        reject_unknown_keys(build_info, BUILD_INFO_KEYS, f"{where}.build_info")
        for split, info in (build_info.get("annotations") or {}).items():
            reject_unknown_keys(
                info or {}, ANNOTATION_KEYS, f"{where}.build_info.annotations.{split}"
            )


def _check_processor(processor: Mapping, where: str) -> None:
    known = registry.list_processors()
    name = processor.get("name")
    if name not in known:
        raise ConfigError(f"{where}: unknown processor '{name}'.{nearest(str(name), known)}")
    # LAVIS's processors hand every option that they read to their constructor, by its name.
    options = inspect.signature(registry.get_processor_class(name).__init__).parameters
    reject_unknown_keys(processor, ("name", *(o for o in options if o != "self")), where)


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
    model_keys = getattr(model_cls, "RUN_KEYS", ())
    iter_keys = RUNNER_ITER_KEYS if run.get("runner") == "runner_iter" else ()
    known = (*LAVIS_RUN_KEYS, *RUNNER_KEYS, *iter_keys, *model_keys)
    reject_unknown_keys(run.keys(), known, "run")
    for key, (least, whole) in RUN_NUMBERS.items():
        if key in run and (run[key] is not None or key not in RUNNER_KEYS):
            _check_number(f"run.{key}", run[key], least, whole)
    if int(run.get("min_len", 0)) > int(run.get("max_len", 10**9)):
        raise ConfigError(f"run.min_len {run.min_len} exceeds run.max_len {run.max_len}.")
    amp = run.get("amp") or None
    if amp not in (None, True, *AMP_DTYPES):  # LAVIS's True is fp16
        raise ConfigError(f"run.amp is {amp!r}; it must be bf16, fp16 or null.")
    for key in ("compile", "check_files"):
        _check_flag(f"run.{key}", run.get(key, False))
    for key in (*NEEDED, *(() if run.get("evaluate") else NEEDED_TO_TRAIN)):
        if run.get(key) is None:
            raise ConfigError(f"run.{key} is missing.")
    resumed = run.get("resume_ckpt_path")
    if run.get("resume") not in (None, "auto"):
        raise ConfigError(f"run.resume is {run.resume!r}; it must be auto or null.")
    if resumed and run.get("resume"):
        raise ConfigError("run.resume and run.resume_ckpt_path are both set; keep one of them.")
    if resumed and not Path(resumed).is_file():
        raise ConfigError(f"run.resume_ckpt_path: no file '{resumed}'.")
    if run.get("evaluate") and not run.get("test_splits"):
        raise ConfigError("run.test_splits is empty: there is nothing to evaluate on.")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be True or False.")


def _check_number(name: str, value: object, least: float, whole: bool) -> None:
    try:
        number = float(value)  # YAML reads 1e-4 as a string
    except (TypeError, ValueError):
        number = float("nan")
    if not number >= least or (whole and not isinstance(value, int)):
        kind = "whole number" if whole else "number"
        raise ConfigError(f"{name} is {value!r}; it must be a {kind} >= {least}.")
