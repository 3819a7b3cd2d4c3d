"""Adapter folders: the tensors, what they are, and a model card. Nothing is pickled.

``adapter.safetensors`` holds adapters and trained heads; ``adapter_config.json`` is an
AdapterAbout; ``README.md`` tells people the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from lavis.common.registry import registry
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from lavis_uniadapter.checkpoints.blip_files import describe_mismatch
from lavis_uniadapter.common.errors import CheckpointError, ConfigError, name_some
from lavis_uniadapter.version import __version__

logger = logging.getLogger(__name__)

TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"


class BaseCheckpoint(BaseModel, extra="forbid"):
    """The BLIP that an adapter was trained on: its file's name, and a hash of its weights."""

    name: str
    fingerprint: str


class AdapterAbout(BaseModel):
    """What an adapter is.

    Attributes:
        arch: name of the model in LAVIS's registry.
        method, configuration: ``model.tuning`` and its configuration.
        settings: other options of the model that decide what the adapter computes.
        blake2b: hash of the file of tensors.
        metrics: what it was measured to do.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[4] = 4
    arch: str
    method: str
    configuration: dict[str, Any]
    settings: dict[str, Any]
    base: BaseCheckpoint
    blake2b: str
    metrics: dict[str, float]
    versions: dict[str, str]


def save(model: nn.Module, folder: str | os.PathLike, metrics: Mapping[str, float]) -> None:
    """Write the model's active adapter set; the folder appears whole or not at all."""
    active = model.adapters.active_set
    if active is None:
        raise ConfigError(
            f"There is no active adapter to save: the model's tuning is '{model.tuning}'."
        )
    folder = Path(folder)
    _refuse_other_content(folder)
    tensors = {k: v.detach().cpu().contiguous() for k, v in active.state_dict().items()}
    content = safetensors.torch.save(tensors)
    names = registry.mapping["model_name_mapping"]
    about = AdapterAbout(
        arch=next((n for n, cls in names.items() if cls is type(model)), type(model).__name__),
        method=model.tuning,
        configuration=model.method_config.model_dump(mode="json"),
        settings={name: getattr(model, name) for name in model.SETTINGS},
        base=BaseCheckpoint(name=model.base_name, fingerprint=model.base_fingerprint),
        blake2b=_hash(content),
        metrics={name: float(value) for name, value in metrics.items()},
        versions={
            "lavis_uniadapter": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "salesforce-lavis")},
        },
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        (new / TENSORS).write_bytes(content)
        (new / CONFIG).write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (new / CARD).write_text(_model_card(model, about, tensors), encoding="utf-8")
        old = Path(temporary) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _refuse_other_content(folder: Path) -> None:
    """Raise ConfigError if replacing a folder would delete anything but an adapter."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file, and an adapter is a folder. Name a new folder.")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if others := set(names) - {TENSORS, CONFIG, CARD}:
        raise ConfigError(
            f"'{folder}' is not an adapter folder and is not replaced: it holds "
            f"{name_some(sorted(others))}. Name a new folder."
        )


def load(model: nn.Module, folder: str | os.PathLike, name: str, force: bool) -> None:
    """Read a folder into the model's set ``name``, after checking everything about it."""
    folder = Path(folder)
    about = _read_about(folder)
    _check_configuration(model, folder, about)
    for key, value in about.settings.items():
        own = getattr(model, key) if key in model.SETTINGS else None
        if own != value:
            logger.warning(
                "'%s' was trained with %s %r, and the model has %r.", folder, key, value, own
            )
    tensors = _read_tensors(folder / TENSORS, about.blake2b)
    if about.base.fingerprint != model.base_fingerprint and not force:
        raise CheckpointError(
            f"'{folder}' was trained on another base checkpoint: '{about.base.name}' "
            f"({about.base.fingerprint[:8]}), and the model holds '{model.base_name}' "
            f"({model.base_fingerprint[:8]}). Load that base, or load the adapter "
            "anyway with load_adapter(folder, force=True)."
        )
    new = name not in model.adapters
    target = model.new_adapter_set() if new else model.adapters[name]
    if problems := describe_mismatch(target.state_dict(), tensors):
        raise CheckpointError(f"'{folder}' does not fit this model: {problems}.")
    target.load_state_dict(tensors)
    if new:
        target.requires_grad_(False)
        target.train(model.training)
        model.adapters.add(name, target)


def _read_about(folder: Path) -> AdapterAbout:
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"'{folder}' is not an adapter folder: it has no {name}. Give a folder that "
                "save_adapter wrote."
            )
    try:
        return AdapterAbout.model_validate_json((folder / CONFIG).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"'{folder / CONFIG}' is damaged or was written by another version: "
            f"{'.'.join(map(str, first['loc']))} {first['msg']}. Copy it again, or save the "
            "adapter with this version."
        ) from error


def _check_configuration(model: nn.Module, folder: Path, about: AdapterAbout) -> None:
    """Refuse an adapter of another method, or that computes something else."""
    if about.method != model.tuning:
        raise CheckpointError(
            f"'{folder}' was tuned by '{about.method}' and this model is built for "
            f"'{model.tuning}'. Set model.tuning: {about.method}."
        )
    config_cls = type(model.method_config)
    try:
        theirs = config_cls.read(about.configuration, "configuration").model_dump(mode="json")
    except ConfigError as error:
        raise CheckpointError(f"'{folder / CONFIG}' is damaged: {error}") from error
    ours = model.method_config.model_dump(mode="json")
    different = [k for k in ours if ours[k] != theirs[k] and k not in config_cls.TRAINING_FIELDS]
    if different:
        changes = ", ".join(f"{k}: {theirs[k]} (model: {ours[k]})" for k in different)
        raise CheckpointError(
            f"'{folder}' has another adapter configuration than the model: {changes}. "
            f"Set model.{config_cls.SECTION} to the folder's values."
        )


def _read_tensors(path: Path, blake2b: str) -> dict[str, Tensor]:
    content = path.read_bytes()
    if _hash(content) != blake2b:
        raise CheckpointError(
            f"'{path}' is damaged: its bytes are not those that were saved. Copy it again."
        )
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a safetensors file: {error}.") from error


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _model_card(model: nn.Module, about: AdapterAbout, tensors: Mapping[str, Tensor]) -> str:
    """The folder's ``README.md``: what it is, how to load it, what it was measured to do."""
    section = type(model.method_config).SECTION
    overrides = {"tuning": about.method, **about.settings}
    if section:
        overrides[section] = about.configuration
    facts = {
        **{"model": about.arch, "tuning": about.method, **about.configuration, **about.settings},
        "parameters": f"{sum(t.numel() for t in tensors.values()):,}",
        "base checkpoint": about.base.name,
        "its fingerprint": about.base.fingerprint,
        **about.versions,
    }
    metrics = {name: f"{value:g}" for name, value in about.metrics.items()}
    return f"""---
library_name: lavis_uniadapter
tags: [{about.method}, blip, lavis]
---

# {about.method} adapter for {about.arch}

It holds what was trained beside a frozen BLIP, and works on that base checkpoint alone.

```python
from lavis.common.registry import registry
from omegaconf import OmegaConf

import lavis_uniadapter

model_cls = registry.get_model_class("{about.arch}")
config = OmegaConf.load(model_cls.default_config_path("MODEL_TYPE")).model
config = OmegaConf.merge(config, {overrides})
# config.pretrained is the base checkpoint
model = model_cls.from_config(config).eval()
model.load_adapter("THIS_FOLDER")
```

{_table(facts)}

## Measured

{_table(metrics) if metrics else "Nothing was measured when this was saved."}
"""


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
