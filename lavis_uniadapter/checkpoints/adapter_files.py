"""Adapter folders: the tensors, what they are, and a model card. Nothing is pickled."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from lavis.common.registry import registry
from pydantic import BaseModel, ValidationError
from torch import Tensor

from lavis_uniadapter.checkpoints.blip_files import describe_mismatch
from lavis_uniadapter.common.atomic import flush
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.version import __version__

logger = logging.getLogger(__name__)

TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"


class BaseCheckpoint(BaseModel, extra="forbid"):
    """The BLIP that an adapter was trained on: its file's name, and a hash of its weights."""

    name: str
    fingerprint: str


class AdapterAbout(BaseModel, extra="forbid", ser_json_inf_nan="constants"):
    """What an adapter is, as ``adapter_config.json`` says it."""

    format_version: Literal[4] = 4
    arch: str  # the model in LAVIS's registry
    method: str  # model.tuning
    configuration: dict[str, Any]  # of the method
    settings: dict[str, Any]  # other options of the model that decide what the adapter computes
    base: BaseCheckpoint
    blake2b: str  # hash of the file of tensors
    metrics: dict[str, float]
    versions: dict[str, str]


def save(model: Any, folder: str | os.PathLike, metrics: Mapping[str, float]) -> None:
    """Write a TunedBlip's active adapter set; an adapter that the folder holds is replaced.

    Other files in the folder stay. ConfigError for a file, and for a folder whose files of the same
    names are not an adapter's.
    """
    active = model.adapters.active_set
    if active is None:
        raise ConfigError(f"No adapter is active: the model's tuning is '{model.tuning}'.")
    folder = Path(folder)
    taken = (folder / CARD).exists() or (folder / CONFIG).exists()
    if folder.is_file() or (taken and not _is_ours(folder / CONFIG)):
        raise ConfigError(
            f"'{folder}' is a file, or a folder whose {CARD} or {CONFIG} save_adapter did not "
            "write. Name a new folder."
        )
    tensors = {k: v.detach().cpu().contiguous() for k, v in active.state_dict().items()}
    content = safetensors.torch.save(tensors)
    names = registry.mapping["model_name_mapping"]
    about = AdapterAbout(
        arch=next((n for n, cls in names.items() if cls is type(model)), type(model).__name__),
        method=model.tuning,
        configuration=model.method_config.model_dump(mode="json"),
        settings=_settings(model),
        base=BaseCheckpoint(name=model.base_name, fingerprint=model.base_fingerprint),
        blake2b=_hash(content),
        metrics={name: float(value) for name, value in metrics.items()},
        versions={
            "lavis_uniadapter": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "salesforce-lavis")},
        },
    )
    _swap_in(
        folder.resolve(),
        {
            TENSORS: content,
            CONFIG: (about.model_dump_json(indent=2) + "\n").encode(),
            CARD: _model_card(model, about, tensors).encode(),
        },
    )


def _is_ours(config: Path) -> bool:
    """Whether save_adapter wrote it: PEFT's and AdapterHub's files have the same name."""
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format_version", "blake2b"} <= content.keys()


def _swap_in(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace a folder by a new one with these files, and move its other files there.

    A killed process leaves the old folder, the new one, or, between two renames, both of them
    whole, as ``.<name>.<random>.old`` and ``.new``. Files that were not moved are in ``.old``.
    """
    stem = f".{folder.name}.{secrets.token_hex(4)}"
    new, old = folder.with_name(f"{stem}.new"), folder.with_name(f"{stem}.old")
    new.mkdir(parents=True)
    try:
        for name, content in contents.items():
            (new / name).write_bytes(content)
            flush(new / name)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    if old.exists():
        for path in [*old.iterdir()]:
            if path.name not in contents:
                path.rename(folder / path.name)
        shutil.rmtree(old)


def load(model: Any, folder: str | os.PathLike, name: str, force: bool) -> None:
    """Read a folder into a TunedBlip's set ``name``, after checking everything about it."""
    model.adapters.check_name(name)
    folder = Path(folder)
    about = _read_about(folder)
    _check_method(model, folder, about)
    if about.settings != _settings(model):
        logger.warning(
            "'%s' was trained with %s, and the model has %s.",
            *(folder, about.settings, _settings(model)),
        )
    tensors = _read_tensors(folder / TENSORS, about.blake2b)
    if about.base.fingerprint != model.base_fingerprint and not force:
        raise CheckpointError(
            f"'{folder}' was trained on another base checkpoint, '{about.base.name}', than the "
            f"model holds, '{model.base_name}': their tensors differ. Load that base, or load the "
            "adapter anyway with load_adapter(folder, force=True)."
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


def _settings(model: Any) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.SETTINGS}


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


def _check_method(model: Any, folder: Path, about: AdapterAbout) -> None:
    """Refuse an adapter of another method, or that computes something else."""
    config = model.method_config
    ours = {"tuning": model.tuning, **config.model_dump(mode="json")}
    theirs = {"tuning": about.method, **about.configuration}
    different = [
        f"{key}: {theirs.get(key)} (model: {ours.get(key)})"
        for key in {**ours, **theirs}
        if theirs.get(key) != ours.get(key) and key not in config.TRAINING_FIELDS
    ]
    if different:
        raise CheckpointError(
            f"'{folder}' was trained with {', '.join(different)}. Give the model the folder's "
            "values; if the folder never had them, it is damaged."
        )


def _read_tensors(path: Path, blake2b: str) -> dict[str, Tensor]:
    content = path.read_bytes()
    damaged = f"'{path}' is damaged: its bytes are not those that were saved. Copy it again."
    if _hash(content) != blake2b:
        raise CheckpointError(damaged)
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(damaged) from error


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _model_card(model: Any, about: AdapterAbout, tensors: Mapping[str, Tensor]) -> str:
    """The folder's ``README.md``: what it is, how to load it, what it was measured to do."""
    overrides = {"tuning": about.method, **about.settings}
    if section := model.method_config.SECTION:
        overrides[section] = about.configuration
    measured = ", ".join(f"{name} {value:g}" for name, value in about.metrics.items())
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

* Base checkpoint: {about.base.name} ({about.base.fingerprint})
* Parameters: {sum(t.numel() for t in tensors.values()):,}
* Measured: {measured or "nothing"}
"""
