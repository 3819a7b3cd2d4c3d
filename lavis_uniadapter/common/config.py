"""Configuration files: LAVIS's layout, validated by the schema before LAVIS is imported."""

from __future__ import annotations

import inspect
import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from lavis_uniadapter.common.errors import ConfigError, nearest, reject_unknown_keys
from lavis_uniadapter.common.schema import MODELS, RunSection, Section, read_dataset
from lavis_uniadapter.common.schema.methods import reject_unread_keys
from lavis_uniadapter.common.schema.model import ModelSection, RetrievalModel
from lavis_uniadapter.common.schema.processors import PROCESSORS
from lavis_uniadapter.common.schema.section import shown

if TYPE_CHECKING:
    from lavis.common.config import Config

logger = logging.getLogger("lavis_uniadapter")

# Evaluation settings that only retrieval models read; LAVIS's own read k_test alone.
RETRIEVAL_KEYS = ("feature_memory", "itc_weight", "rerank_batch", "k_test")


class Sections(Section):
    """A configuration file."""

    model: dict[str, Any]
    datasets: Annotated[dict[Any, Any], Field(min_length=1)]
    run: dict[str, Any]


def load_config(cfg_path: str | Path, options: Sequence[str] = ()) -> Config:
    """Read a YAML file and ``section.key=value`` options over it, and fill in all defaults.

    Raises:
        ConfigError: naming the first thing that is wrong.
    """
    return _complete(validate(cfg_path, options))


def validate(cfg_path: str | Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Validate a YAML file and options by the schema, without importing LAVIS or torch.

    Names and defaults of LAVIS's own models and datasets are left to ``load_config``.

    Raises:
        ConfigError: naming the first thing that is wrong.
    """
    given = read_yaml(Path(cfg_path), options)
    try:
        sections = Sections.read(given, "configuration")
        arch = sections.model.get("arch")
        section_cls = MODELS.get(arch) if isinstance(arch, str) else None
        content = _resolved(given, section_cls)
    except (ConfigError, OmegaConfBaseException) as error:  # a ${name} that does not exist, or ???
        where = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) else ""
        reason = where + str(error).splitlines()[0]
        raise ConfigError(f"'{cfg_path}' is not a valid configuration: {reason}") from error
    if section_cls:
        section = section_cls.read(content["model"], "model")
        reject_unread_keys(given["model"], section.tuning)
        content["model"] = section.model_dump(mode="json")
    content["datasets"] = {name: read_dataset(name, s) for name, s in content["datasets"].items()}
    for name, section in content["datasets"].items():
        _check_image_sizes(name, section, content["model"])
    content["run"] = RunSection.read(content["run"], "run").filled_in()
    unread = [key for key in RETRIEVAL_KEYS if key in given["run"]]
    if section_cls not in (None, RetrievalModel) and unread:
        raise ConfigError(f"run.{unread[0]} is given, and model.arch '{arch}' does not read it.")
    if section_cls is None and (ignored := [key for key in unread if key != "k_test"]):
        logger.info("LAVIS's '%s' does not read run.%s.", arch, ", run.".join(ignored))
    return content


def read_yaml(path: Path, options: Sequence[str] = ()) -> dict[Any, Any]:
    """A YAML file and options over it, with ``${...}`` left as they are, or a ConfigError."""
    if not path.is_file():
        raise ConfigError(f"No configuration file '{path}'.")
    # PyYAML lets through what Python raises for a value (ValueError for the date 2020-99-99, say),
    # and each of its types has others.
    try:
        given: Any = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"'{path}' is not a valid configuration: {error}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"'{path}' is not a valid configuration: it must consist of sections.")
    for option in options:
        if "=" not in option:
            raise ConfigError(f"Option '{option}' has no '='. Write section.key=value.")
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([option]))
        except Exception as error:
            raise ConfigError(
                f"Option '{option}' cannot be read as section.key=value: {error}"
            ) from error
    content: Any = OmegaConf.to_container(given)
    return content


def _resolved(given: Mapping[str, Any], section_cls: type[ModelSection] | None) -> dict[str, Any]:
    """The sections with each ``${...}`` replaced, and the model type's defaults filled in."""
    optional = {k: f for k, f in RunSection.model_fields.items() if not f.is_required()}
    defaults: dict[str, Any] = {"run": {key: field.default for key, field in optional.items()}}
    files, model_type = section_cls.files() if section_cls else {}, given["model"].get("model_type")
    if isinstance(model_type, str) and model_type in files:
        defaults |= _load(files[model_type])
    merged = OmegaConf.create(_overlay(defaults, given))
    content: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    return {**content, "run": {key: content["run"][key] for key in given["run"]}}


def _load(path: str | Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path))


def _overlay(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given over defaults, section by section."""
    merged = dict(defaults)
    for key, value in given.items():
        below = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _overlay(below, value)
        merged[key] = value
    return merged


def _complete(content: dict[str, Any]) -> Config:
    """Check names against LAVIS's registries, and add LAVIS's defaults."""
    import lavis.common.optims  # noqa: F401  (registers the learning-rate schedules)
    import lavis.runners  # noqa: F401  (registers LAVIS's runners)
    from lavis.common.config import Config
    from lavis.common.registry import registry

    from lavis_uniadapter.common.distributed import choose_device
    from lavis_uniadapter.runners.precision import choose_amp

    model, run = content["model"], content["run"]
    _check_name("run.task", run["task"], registry.list_tasks())
    _check_name("run.runner", run["runner"], registry.list_runners())
    _check_name("run.lr_sched", run["lr_sched"], [None, *registry.list_lr_schedulers()])
    _check_name("model.arch", model.get("arch"), registry.list_models())
    if model["arch"] not in MODELS:
        model_cls = registry.get_model_class(model["arch"])
        types = model_cls.PRETRAINED_MODEL_CONFIG_DICT
        _check_name("model.model_type", model.get("model_type"), types)
        path = model_cls.default_config_path(model["model_type"])
        model = _overlay(_load(path)["model"], model)
    datasets = {n: _complete_dataset(n, s, registry) for n, s in content["datasets"].items()}
    for name, section in datasets.items():
        _check_image_sizes(name, section, model)
    run["device"] = choose_device(run["device"])
    run["amp"] = choose_amp(run["amp"], run["device"])
    config = Config.__new__(Config)  # its __init__ reads a file and merges, which is done already
    config.args = Namespace(cfg_path=None, options=[])
    config.config = OmegaConf.create({"model": model, "datasets": datasets, "run": run})
    registry.register("configuration", config)
    return config


def _complete_dataset(name: str, section: dict[str, Any], registry: Any) -> dict[str, Any]:
    from lavis.datasets.builders.base_dataset_builder import load_dataset_config

    names = registry.list_datasets()
    if name not in names:
        raise ConfigError(f"Unknown dataset '{name}'.{nearest(str(name), names)}")
    builder, type_ = registry.get_builder_class(name), section.get("type", "default")
    _check_name(f"datasets.{name}.type", type_, builder.DATASET_CONFIG_DICT)
    for kind in ("vis_processor", "text_processor"):
        for mode, processor in (section.get(kind) or {}).items():
            if processor and processor["name"] not in PROCESSORS:
                where = f"datasets.{name}.{kind}.{mode}"
                _check_name(f"{where}.name", processor["name"], registry.list_processors())
                # LAVIS's processors pass every option that they read to their constructor.
                init = registry.get_processor_class(processor["name"]).__init__
                known = set(inspect.signature(init).parameters) - {"self"}
                reject_unknown_keys(processor, ("name", *known), where)
    default_path = builder.default_config_path(type=type_)
    defaults: Any = OmegaConf.to_container(load_dataset_config(default_path))
    return _overlay({"skip_missing": False, "allow_missing": False, **defaults}, section)


def _check_image_sizes(name: str, section: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    # LAVIS's ALPRO has a section for its visual encoder, which also fixes the number of frames.
    where = "model.timesformer" if "timesformer" in model else "model"
    encoder = model.get("timesformer", model)
    if not isinstance(encoder, Mapping):
        raise ConfigError(f"{where} is {shown(encoder)}; it must be a section.")
    for mode, processor in (section.get("vis_processor") or {}).items():
        for key in ("image_size", "n_frms"):
            if key in encoder and key in (processor or {}) and processor[key] != encoder[key]:
                raise ConfigError(
                    f"datasets.{name}.vis_processor.{mode}.{key} is {processor[key]} and "
                    f"{where}.{key} is {encoder[key]}. Give both the same."
                )


def _check_name(key: str, name: object, known: Iterable[str | None]) -> None:
    known = list(known)
    if name not in known:
        names = list(filter(None, known))
        hint = nearest(str(name), names)
        raise ConfigError(f"{key} is {name!r}.{hint} Known: {', '.join(names)}.")
