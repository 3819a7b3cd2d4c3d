"""Adapter folders: the tensors, what they are, and a model card. Nothing is pickled.

``adapter.safetensors`` holds adapters and trained heads, ``adapter_config.json`` the method, its
configuration, the base checkpoint's name and fingerprint, metrics and versions, and ``README.md``
tells people the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import reprlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lavis.common.registry import registry
from torch import nn

from lavis_uniadapter.checkpoints.blip_files import describe_mismatch
from lavis_uniadapter.common.errors import CheckpointError, ConfigError, name_some
from lavis_uniadapter.version import __version__

logger = logging.getLogger(__name__)

TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
FORMAT_VERSION = 3

# What the entries of the configuration that decide anything must be.
_KINDS = {"method": str, "configuration": dict, "settings": dict, "base": dict, "blake2b": str}
_BASE_KINDS = {"name": str, "fingerprint": str}


def save(model: nn.Module, folder: str | os.PathLike, metrics: Mapping[str, float]) -> None:
    """Write the model's active adapter set; the folder appears whole or not at all."""
    active = model.adapters.active_set
    if active is None:
        raise ConfigError(
            f"There is no active adapter to save: the model's tuning is '{model.tuning}'."
        )
    tensors = {k: v.detach().cpu().contiguous() for k, v in active.state_dict().items()}
    folder = Path(folder)
    strangers = (
        [path.name for path in folder.iterdir() if path.name not in (TENSORS, CONFIG, CARD)]
        if folder.is_dir()
        else [folder.name] * folder.exists()
    )
    if strangers:
        raise ConfigError(
            f"'{folder}' is not an adapter folder to be replaced: it holds {name_some(strangers)}. "
            "Name a new folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        safetensors.torch.save_file(tensors, new / TENSORS)
        config = {
            "format_version": FORMAT_VERSION,
            "arch": type(model).__name__,
            "method": model.tuning,
            "configuration": model.method_config.model_dump(mode="json"),
            "settings": {name: getattr(model, name) for name in model.SETTINGS},
            "base": {"name": model.base_name, "fingerprint": model.base_fingerprint},
            "keys": len(tensors),
            "blake2b": _hash_file(new / TENSORS),
            "metrics": dict(metrics),
            "versions": {
                "lavis_uniadapter": __version__,
                **{n: importlib.metadata.version(n) for n in ("torch", "salesforce-lavis")},
            },
        }
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (new / CARD).write_text(_model_card(model, config, tensors))
        written = _read_tensors(new, config)
        if not all(torch.equal(written[key], value) for key, value in tensors.items()):
            raise CheckpointError(f"'{folder}': what was written does not read back the same.")
        new.chmod(0o755)
        _replace_folder(new, folder)
    finally:
        if new.exists():
            shutil.rmtree(new)


def load(model: nn.Module, folder: str | os.PathLike, name: str, force: bool) -> None:
    """Read a folder into the model's set ``name``, after checking everything about it."""
    folder = Path(folder)
    config = _read_config(folder)
    if config["method"] != model.tuning:
        raise CheckpointError(
            f"'{folder}' was tuned by '{config['method']}' and this model is built for "
            f"'{model.tuning}'. Set model.tuning: {config['method']}."
        )
    config_cls = type(model.method_config)
    try:
        theirs = config_cls.read(config["configuration"], "configuration").model_dump()
    except ConfigError as error:
        raise _damaged(folder, error) from error
    ours = model.method_config.model_dump()
    different = [k for k in ours if ours[k] != theirs[k] and k not in config_cls.TRAINING_FIELDS]
    if different:
        changes = ", ".join(f"{k}: {theirs[k]} (model: {ours[k]})" for k in different)
        raise CheckpointError(
            f"'{folder}' has another adapter configuration than the model: {changes}. "
            f"Set model.{config_cls.SECTION} to the folder's values."
        )
    for key, value in config["settings"].items():
        own = getattr(model, key) if key in model.SETTINGS else None
        if own != value:
            logger.warning(
                "'%s' was trained with %s %r, and the model has %r.", folder, key, value, own
            )
    tensors = _read_tensors(folder, config)
    base = config["base"]
    if base["fingerprint"] != model.base_fingerprint and not force:
        raise CheckpointError(
            f"'{folder}' was trained on another base checkpoint: '{base['name']}' "
            f"({base['fingerprint'][:8]}), and the model holds '{model.base_name}' "
            f"({model.base_fingerprint[:8]}). Load that base, or try all the same by "
            "load_adapter(folder, force=True)."
        )
    new = name not in model.adapters.names()
    target = model._build_set() if new else model.adapters.get(name)
    problems = describe_mismatch(target.state_dict(), tensors)
    if problems:
        raise CheckpointError(f"'{folder}' does not fit this model: {problems}.")
    target.load_state_dict(tensors)
    if new:
        target.requires_grad_(False)
        target.train(model.training)
        model.adapters.add(name, target)


def _model_card(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> str:
    """The folder's ``README.md``: what it is, how to load it, what it was measured to do."""
    number = sum(t.numel() for t in tensors.values())
    arch = _registered_name(model)
    rows = [
        ("model", f"`{arch}`"),
        ("tuning", f"`{config['method']}`"),
        *((f"{k}", f"`{v}`") for k, v in {**config["configuration"], **config["settings"]}.items()),
        ("parameters", f"{number:,}"),
        ("base checkpoint", f"{config['base']['name']}"),
        ("its fingerprint", f"`{config['base']['fingerprint']}`"),
        *config["versions"].items(),
    ]
    metrics = [(name, f"{value:g}") for name, value in config["metrics"].items()]
    return f"""---
library_name: lavis_uniadapter
tags: [{config["method"]}, blip, lavis]
---

# {config["method"]} adapter for {arch}

It holds what was trained beside a frozen BLIP, and works on that base checkpoint alone.

```python
from lavis.common.registry import registry
from omegaconf import OmegaConf

import lavis_uniadapter

model_cls = registry.get_model_class("{arch}")
config = OmegaConf.load(model_cls.default_config_path("MODEL_TYPE")).model
config = OmegaConf.merge(config, {_overrides(model, config)})
# config.pretrained is the base checkpoint
model = model_cls.from_config(config).eval()
model.load_adapter("THIS_FOLDER")
```

| | |
|---|---|
{_table_rows(rows)}

## Measured

{_metrics_table(metrics)}
"""


def _overrides(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's configuration must say for the adapter to fit."""
    section = type(model.method_config).SECTION
    own = {section: config["configuration"]} if section else {}
    return {"tuning": config["method"], **own, **config["settings"]}


def _registered_name(model: nn.Module) -> str:
    """The name under which LAVIS's registry has the model's class."""
    names = registry.mapping["model_name_mapping"]
    return next((n for n, cls in names.items() if cls is type(model)), type(model).__name__)


def _table_rows(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _metrics_table(metrics: list[tuple[str, str]]) -> str:
    if not metrics:
        return "Nothing was measured when this was saved."
    return "| metric | value |\n|---|---|\n" + _table_rows(metrics)


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"'{folder}' is not an adapter folder: it has no {name}. Give a folder that "
                "save_adapter wrote."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        version = config["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, repr(error)) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"'{folder}' has format {version!r}, and this version reads format {FORMAT_VERSION}."
        )
    for section, kinds in ((config, _KINDS), (config.get("base"), _BASE_KINDS)):
        for key, kind in kinds.items():
            if not isinstance(section.get(key), kind):
                raise _damaged(folder, f"'{key}' is {reprlib.repr(section.get(key))}")
    return config


def _damaged(folder: Path, what: object) -> CheckpointError:
    return CheckpointError(f"'{folder / CONFIG}' is damaged: {what}. Copy it again.")


def _read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = folder / TENSORS
    if _hash_file(path) != config["blake2b"]:
        raise CheckpointError(
            f"'{path}' is damaged: its bytes are not those that were saved. Copy it again."
        )
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a safetensors file: {error}.") from error


def _hash_file(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _replace_folder(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, old / folder.name)
    os.rename(new, folder)
    shutil.rmtree(old)
