"""Configuration files: LAVIS's, with every key checked."""

from __future__ import annotations

import inspect
import io
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from lavis.common.config import Config
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import load_dataset_config
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_uniadapter.common.distributed import choose_device
from lavis_uniadapter.common.errors import ConfigError, nearest, reject_unknown_keys
from lavis_uniadapter.runners import stock_runners
from lavis_uniadapter.runners.precision import AMP_DTYPES, MATMUL_PRECISIONS, choose_amp

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
    "matmul_precision",
    "max_grad_norm",
    "weight_decay_on",
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
MAX_SEED = 2**32 - 1  # NumPy's
WEIGHT_DECAY_ON = ("matrices", "all")
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
    given = _read(Path(cfg_path), options)
    try:
        return _checked(given, str(cfg_path))
    except OmegaConfBaseException as error:  # such as a ${name} that leads nowhere, or a ???
        raise ConfigError(f"'{cfg_path}' is not a valid configuration: {error}") from error


def _read(path: Path, options: Sequence[str]) -> DictConfig:
    """What the file and the options over it say, unchecked."""
    if not path.is_file():
        raise ConfigError(f"No configuration file '{path}'.")
    # PyYAML lets through what Python raises for a value (ValueError for the date 2020-99-99, say),
    # and each of its types has others.
    try:
        given = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"'{path}' is not a valid configuration: {error}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(
            f"'{path}' is not a valid configuration: it must have the sections "
            f"{', '.join(SECTIONS)}, each 'section:' with its keys below."
        )
    for option in options:
        if "=" not in option:
            raise ConfigError(
                f"Option '{option}' has no '='. Write --options section.key=value, e.g. "
                "run.init_lr=1e-4."
            )
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([option]))
        except Exception as error:
            raise ConfigError(
                f"Option '{option}' cannot be read: {error}. Write --options section.key=value, "
                "with a value as in YAML."
            ) from error
    return given


def _checked(given: DictConfig, source: str) -> Config:
    for section in SECTIONS:
        if not isinstance(given.get(section), DictConfig):
            raise ConfigError(f"'{source}' has no section '{section}:'.")
    reject_unknown_keys(given.keys(), SECTIONS, "configuration")
    _check_model(given.model)
    _check_datasets(given.datasets)
    given.datasets = {name: _with_defaults(name, s) for name, s in given.datasets.items()}
    given.run.seed = given.run.get("seed", 42)
    given.run.evaluate = given.run.get("evaluate", False)
    given.run.runner = given.run.get("runner", stock_runners.OURS)
    _check_run(given.run, registry.get_model_class(given.model.arch))
    given.run.device = choose_device(given.run.get("device", "auto"))
    given.run.amp = choose_amp(given.run.get("amp"), given.run.device)
    config = Config(Namespace(cfg_path=io.StringIO(OmegaConf.to_yaml(given)), options=[]))
    # LAVIS adds its defaults under their own name, which for some builders is another.
    for name in set(config.datasets_cfg) - set(given.datasets):
        del config.datasets_cfg[name]
    check = getattr(registry.get_model_class(given.model.arch), "check_config", None)
    if check is not None:
        check(config.model_cfg)
    _check_image_sizes(config)
    # whatever refers to something else, so that nothing fails later for leading nowhere
    OmegaConf.to_container(config.config, resolve=True, throw_on_missing=True)
    return config


def _section(value: object, where: str) -> Mapping:
    """A section of a configuration, empty where nothing is given."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}; it must be a section, with its keys below.")
    return value


def _check_containers(given: DictConfig, defaults: DictConfig, where: str) -> None:
    """Refuse a list for what is a section by default, and the reverse: they cannot be merged."""
    for key, default in defaults.items():
        if OmegaConf.is_interpolation(given, key):  # perhaps of what is a default itself
            continue
        value = given.get(key)
        if isinstance(value, DictConfig) and isinstance(default, DictConfig):
            _check_containers(value, default, f"{where}.{key}")
        elif OmegaConf.is_list(value) and OmegaConf.is_dict(default):
            raise ConfigError(f"{where}.{key} is {value!r}; it must be a section.")
        elif OmegaConf.is_dict(value) and OmegaConf.is_list(default):
            raise ConfigError(f"{where}.{key} is {value!r}; it must be a list.")


def _check_image_sizes(config: Config) -> None:
    # LAVIS's ALPRO has a section for its visual encoder, which also fixes the number of frames.
    where = "model.timesformer" if "timesformer" in config.model_cfg else "model"
    encoder = OmegaConf.select(config.config, where)
    for name, section in config.datasets_cfg.items():
        for mode, processor in (section.get("vis_processor") or {}).items():
            for key in {"image_size", "n_frms"}.intersection(encoder, processor or {}):
                if processor[key] != encoder[key]:
                    raise ConfigError(
                        f"datasets.{name}.vis_processor.{mode}.{key} is {processor[key]} and "
                        f"{where}.{key} is {encoder[key]}. Give both the same."
                    )


def _check_model(model: Mapping) -> None:
    names = registry.list_models()
    arch = model.get("arch")
    if arch not in names:
        raise ConfigError(f"model.arch is '{arch}'.{nearest(str(arch), names)} See model_zoo.")
    model_cls = registry.get_model_class(arch)
    types = model_cls.PRETRAINED_MODEL_CONFIG_DICT
    if model.get("model_type") not in list(types):
        raise ConfigError(
            f"model.model_type is '{model.get('model_type')}'; '{arch}' has {', '.join(types)}."
        )
    defaults = OmegaConf.load(model_cls.default_config_path(model.model_type)).model
    _check_containers(model, defaults, "model")
    if hasattr(model_cls, "check_config"):
        model_cls.check_config(model)
        model_cls.check_given(model, model.get("tuning", defaults.tuning))


def _with_defaults(name: str, section: DictConfig | None) -> DictConfig:
    """A dataset's section over the defaults of its builder."""
    section = OmegaConf.create() if section is None else section
    builder = registry.get_builder_class(name)
    path = builder.default_config_path(type=section.get("type", "default"))
    defaults = load_dataset_config(path)
    _check_containers(section, defaults, f"datasets.{name}")
    return OmegaConf.merge(defaults, section)


def _check_datasets(datasets: Mapping) -> None:
    names = registry.list_datasets()
    if not datasets:
        raise ConfigError("The section 'datasets:' names no dataset.")
    for name, section in datasets.items():
        if name not in names:
            raise ConfigError(f"Unknown dataset '{name}'.{nearest(str(name), names)}")
        where = f"datasets.{name}"
        section = _section(section, where)
        reject_unknown_keys(section, DATASET_KEYS, where)
        types = registry.get_builder_class(name).DATASET_CONFIG_DICT
        if section.get("type", "default") not in list(types):
            raise ConfigError(f"{where}.type is '{section.type}'; it has {', '.join(types)}.")
        for key in ("skip_missing", "allow_missing"):
            _check_flag(f"{where}.{key}", section.get(key, False))
        for kind in ("vis_processor", "text_processor"):
            processors = _section(section.get(kind), f"{where}.{kind}")
            reject_unknown_keys(processors, ("train", "eval"), f"{where}.{kind}")
            for mode, processor in processors.items():
                if processor is not None:
                    place = f"{where}.{kind}.{mode}"
                    _check_processor(_section(processor, place), place)
        where = f"{where}.build_info"
        build_info = _section(section.get("build_info"), where)
        reject_unknown_keys(build_info, BUILD_INFO_KEYS, where)
        for kind, info in build_info.items():
            _section(info, f"{where}.{kind}")
        for split, info in (build_info.get("annotations") or {}).items():
            place = f"{where}.annotations.{split}"
            reject_unknown_keys(_section(info, place), ANNOTATION_KEYS, place)


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
    if not hasattr(model_cls, "check_config"):
        # LAVIS's own, which a comparison gives the same options as this package's
        model_keys = our_run_keys()
    iter_keys = RUNNER_ITER_KEYS if run.get("runner") == "runner_iter" else ()
    known = (*LAVIS_RUN_KEYS, *RUNNER_KEYS, *iter_keys, *model_keys)
    reject_unknown_keys(run.keys(), known, "run")
    for key, (least, whole) in RUN_NUMBERS.items():
        if key in run and (run[key] is not None or key not in RUNNER_KEYS):
            _check_number(f"run.{key}", run[key], least, whole)
    if run.get("seed", 0) > MAX_SEED:
        raise ConfigError(f"run.seed is {run.seed}; it must be at most {MAX_SEED}.")
    if run.get("min_len", 0) > run.get("max_len", float("inf")):
        raise ConfigError(f"run.min_len {run.min_len} exceeds run.max_len {run.max_len}.")
    amp = run.get("amp") or None
    if amp not in (None, True, "auto", *AMP_DTYPES):  # LAVIS's True is fp16
        raise ConfigError(f"run.amp is {amp!r}; it must be auto, bf16, fp16 or null.")
    for key, known in (
        ("weight_decay_on", WEIGHT_DECAY_ON),
        ("matmul_precision", MATMUL_PRECISIONS),
    ):
        value = run.get(key) or known[0]
        if value not in known:
            raise ConfigError(f"run.{key} is {value!r}; it must be one of {', '.join(known)}.")
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
    if resumed and not (isinstance(resumed, str) and os.path.isfile(resumed)):
        raise ConfigError(f"run.resume_ckpt_path: no file '{resumed}'.")
    for key in ("train_splits", "valid_splits", "test_splits"):
        splits = run.get(key)
        are_names = isinstance(splits, ListConfig) and all(isinstance(s, str) for s in splits)
        if splits is not None and not are_names:
            raise ConfigError(f"run.{key} is {splits!r}; it must be a list of names, as in [val].")
    if run.get("evaluate") and not run.get("test_splits"):
        raise ConfigError("run.test_splits is empty: there is nothing to evaluate on.")
    stock_runners.check(run)


def our_run_keys() -> set[str]:
    """Keys of ``run:`` that models of this package read, and LAVIS does not."""
    models = registry.mapping["model_name_mapping"].values()
    keys = {key for model_cls in models for key in getattr(model_cls, "RUN_KEYS", ())}
    return keys.difference(LAVIS_RUN_KEYS)


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be True or False.")


def _check_number(name: str, value: object, least: float, whole: bool) -> None:
    try:
        # YAML reads 1e-4 as a string; no float is as large as a whole number may be.
        number = value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if (
        not least <= number < float("inf")
        or isinstance(value, bool)
        or (whole and not isinstance(value, int))
    ):
        kind = "whole number" if whole else "number"
        raise ConfigError(f"{name} is {value!r}; it must be a {kind} >= {least}.")
