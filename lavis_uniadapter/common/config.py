"""Configuration files: LAVIS's layout, validated by the schema before LAVIS is imported."""

from __future__ import annotations

import copy
import logging
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from lavis_uniadapter.common import registered
from lavis_uniadapter.common.errors import ConfigError, nearest, reject_unknown_keys
from lavis_uniadapter.common.memory import check_memory
from lavis_uniadapter.common.registered import Registry, Sources
from lavis_uniadapter.common.schema import MODELS, RunSection, Section, read_dataset
from lavis_uniadapter.common.schema.methods import reject_unread_keys
from lavis_uniadapter.common.schema.model import LavisModel, ModelSection, RetrievalModel
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

    Defaults of LAVIS's own models and datasets are left to ``load_config``.

    Raises:
        ConfigError: naming the first thing that is wrong.
    """
    given = read_yaml(Path(cfg_path), options)
    _check_sections(given)
    try:
        sections = Sections.read(given, "")
        arch = sections.model.get("arch")
        section_cls = MODELS.get(arch) if isinstance(arch, str) else None
        content = _resolved(given, section_cls)
    except (ConfigError, OmegaConfBaseException) as error:  # a ${name} that does not exist, or ???
        where = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) else ""
        reason = where + str(error).splitlines()[0]
        raise ConfigError(f"'{cfg_path}' is not a valid configuration: {reason}") from error
    _check_finite(content)
    if section_cls:
        section = section_cls.read(content["model"], "model")
        reject_unread_keys(given["model"], section.tuning)
        content["model"] = section.model_dump(mode="json")
    else:
        content["model"] = LavisModel.read(content["model"], "model").model_dump(exclude_unset=True)
    content["datasets"] = {name: read_dataset(name, s) for name, s in content["datasets"].items()}
    content["run"] = RunSection.read(content["run"], "run").filled_in()
    unread = [key for key in RETRIEVAL_KEYS if key in given["run"]]
    if section_cls not in (None, RetrievalModel) and unread:
        raise ConfigError(f"run.{unread[0]} is given, and model.arch '{arch}' does not read it.")
    if section_cls is None and (ignored := [key for key in unread if key != "k_test"]):
        logger.info("LAVIS's '%s' does not read run.%s.", arch, ", run.".join(ignored))
    if sources := registered.in_sources():
        _check_names(content, sources)
    _check_sizes(content)
    return content


def _check_sections(given: Mapping[Any, Any]) -> None:
    """Raise ConfigError for a key of a section that is given without the section's name."""
    sections: dict[str, type[Section]] = {"run": RunSection, "model": ModelSection}
    for name, section in sections.items():
        if stray := [key for key in given if key in section.model_fields]:
            raise ConfigError(f"'{stray[0]}' is not a section. Did you mean '{name}.{stray[0]}'?")


def _check_finite(value: object, where: str = "") -> None:
    """Raise ConfigError for infinity or NaN, which the options of LAVIS's own parts may be too."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value}; it must be a finite number.")
    pairs = value.items() if isinstance(value, Mapping) else ()
    for key, below in enumerate(value) if isinstance(value, list) else pairs:
        _check_finite(below, f"{where}.{key}" if where else str(key))


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
            given.merge_with_dotlist([option])
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
    content: Any = copy.deepcopy(_overlay(defaults, given))
    # creating it anew takes most of the time of a comparison's check
    if any(sign in repr(content) for sign in ("${", "???")):
        merged = OmegaConf.create(content)
        content = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    return {**content, "run": {key: content["run"][key] for key in given["run"]}}


@cache
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

    from lavis_uniadapter.common.distributed import choose_device, gpu_memory
    from lavis_uniadapter.runners.precision import choose_amp

    model, run = content["model"], content["run"]
    _check_names(content, Registry())
    if model["arch"] not in MODELS:
        model_cls = registry.get_model_class(model["arch"])
        path = model_cls.default_config_path(model["model_type"])
        model = _overlay(_load(path)["model"], model)
    datasets = {
        name: _complete_dataset(section, registry.get_builder_class(name))
        for name, section in content["datasets"].items()
    }
    run["device"] = choose_device(run["device"])
    run["amp"] = choose_amp(run["amp"], run["device"])
    complete = {"model": model, "datasets": datasets, "run": run}
    _check_sizes(complete, gpu_memory(run["device"]))
    config = Config.__new__(Config)  # its __init__ reads a file and merges, which is done already
    config.args = Namespace(cfg_path=None, options=[])
    config.config = OmegaConf.create(complete)
    registry.register("configuration", config)
    return config


def _check_names(content: Mapping[str, Any], known: Registry | Sources) -> None:
    """Raise ConfigError for a name that is not registered, and for options of LAVIS's parts."""
    run, model, names = content["run"], content["model"], known.names
    _check_name("run.task", run["task"], names["task"])
    _check_name("run.runner", run["runner"], names["runner"])
    _check_name("run.lr_sched", run["lr_sched"], [None, *names["lr_scheduler"]])
    _check_name("model.arch", model.get("arch"), names["model"])
    if model["arch"] not in MODELS:
        types = known.types("model", model["arch"])
        _check_name("model.model_type", model.get("model_type"), types)
    for name, section in content["datasets"].items():
        if name not in names["builder"]:
            raise ConfigError(f"Unknown dataset '{name}'.{nearest(str(name), names['builder'])}")
        types = known.types("builder", name)
        _check_name(f"datasets.{name}.type", section.get("type", "default"), types)
        for where, processor in _processors(f"datasets.{name}", section):
            _check_name(f"{where}.name", processor["name"], names["processor"])
            options = known.options(processor["name"])
            if processor["name"] not in PROCESSORS and options is not None:
                reject_unknown_keys(processor, ("name", *options), where)


def _processors(where: str, section: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A dataset's processors, each with its place in the configuration."""
    for kind in ("vis_processor", "text_processor"):
        for mode, processor in (section.get(kind) or {}).items():
            if processor:
                yield f"{where}.{kind}.{mode}", processor


def _complete_dataset(section: dict[str, Any], builder: Any) -> dict[str, Any]:
    from lavis.datasets.builders.base_dataset_builder import load_dataset_config

    default_path = builder.default_config_path(type=section.get("type", "default"))
    defaults: Any = OmegaConf.to_container(load_dataset_config(default_path))
    return _overlay({"skip_missing": False, "allow_missing": False, **defaults}, section)


def _check_sizes(content: Mapping[str, Any], gpu: int | None = None) -> None:
    """Raise ConfigError for sizes that do not fit together, or exceed the memory."""
    model, datasets = content["model"], content["datasets"]
    for name, section in datasets.items():
        _check_image_sizes(name, section, model)
    section_cls = MODELS.get(model["arch"])
    section = section_cls.read(model, "model") if section_cls else None
    check_memory(section, datasets, content["run"], gpu)


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


def _check_name(key: str, name: object, known: Iterable[str | None] | None) -> None:
    """Raise ConfigError for a name that is not among those known; None: they cannot be known."""
    if known is not None and name not in (known := list(known)):
        names = list(filter(None, known))
        hint = nearest(str(name), names)
        raise ConfigError(f"{key} is {name!r}.{hint} Known: {', '.join(names)}.")
