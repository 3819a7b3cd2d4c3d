"""Adapter folders: the tensors, what they are, and a model card. Nothing is pickled."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from lavis.common.registry import registry
from pydantic import Field, ValidationError
from torch import Tensor

from lavis_uniadapter.checkpoints import identity
from lavis_uniadapter.checkpoints.blip_files import describe_mismatch
from lavis_uniadapter.checkpoints.identity import Identity, Source, hash_bytes
from lavis_uniadapter.common.atomic import flush, write_text
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.version import __version__

logger = logging.getLogger(__name__)

TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
SEAL = b"<!-- save_adapter replaces this text unless you edit it"

_writing = threading.Lock()  # of one thread at a time


class AdapterAbout(Identity, extra="forbid", ser_json_inf_nan="constants"):
    """What an adapter is, as ``adapter_config.json`` says it."""

    format_version: Literal[5] = 5
    arch: str  # the model in LAVIS's registry
    method: str  # model.tuning
    configuration: dict[str, Any]  # of the method
    settings: dict[str, Any]  # other options of the model that decide what the adapter computes
    base: Source
    vocabulary: Source
    blake2b: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # hash of the file of tensors
    metrics: dict[str, float]
    versions: dict[str, str]


def save(
    model: Any,
    folder: str | os.PathLike,
    metrics: Mapping[str, float],
    known: Identity | None = None,
) -> None:
    """Write a TunedBlip's active adapter set; an adapter that the folder holds is replaced.

    Other files in the folder stay, among them a model card that somebody edited or wrote.

    Args:
        known: identity of the run that trained it; by default, that of the model.

    Raises:
        ConfigError: for a file, for a folder with another library's adapter, without an active
            adapter, and for weights that are not finite.
    """
    active = model.adapters.active_set
    if active is None:
        raise ConfigError(f"No adapter is active: the model's tuning is '{model.tuning}'.")
    folder = Path(folder).expanduser().resolve()
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in active.state_dict().items()}
    if problem := _unusable(tensors):
        raise ConfigError(f"The adapter is not saved to '{folder}': {problem}.")
    content = safetensors.torch.save(tensors)
    about = AdapterAbout(
        **dict(known or identity.of_model(model)),
        arch=_arch(model),
        method=model.tuning,
        configuration=model.method_config.model_dump(mode="json"),
        settings=_settings(model),
        blake2b=hash_bytes([content]),
        metrics={name: float(value) for name, value in metrics.items()},
        versions={
            "lavis_uniadapter": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "salesforce-lavis")},
        },
    )
    with _writing:
        if folder.is_file() or not _is_free(folder):
            raise ConfigError(
                f"'{folder}' is a file, or a folder whose {CONFIG} or {TENSORS} save_adapter did "
                "not write. Name a new folder."
            )
        _write(folder, about, content, _model_card(model, about, tensors))


def _is_free(folder: Path) -> bool:
    """Whether it has no adapter, or one of ours: PEFT's and AdapterHub's files have our names."""
    if not (folder / CONFIG).exists():
        return not (folder / TENSORS).exists()
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format_version", "blake2b"} <= content.keys()


def _write(folder: Path, about: AdapterAbout, content: bytes, card: str) -> None:
    """Write the files so that a process killed at any time leaves a whole adapter.

    New tensors wait under a name with their hash, where `load` finds them, until the configuration
    has that hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = folder / _waiting(about.blake2b)
    waiting.write_bytes(content)
    flush(waiting)
    write_text(folder / CONFIG, about.model_dump_json(indent=2) + "\n")
    os.replace(waiting, folder / TENSORS)
    for pattern in (_waiting("*"), f".{CONFIG}.*.tmp", f".{CARD}.*.tmp"):
        for path in folder.glob(pattern):  # of a process that was killed
            path.unlink(missing_ok=True)
    if not (folder / CARD).exists() or _is_unedited(folder / CARD):
        write_text(folder / CARD, card)
    else:
        logger.info("'%s' was edited or is somebody's own, and is kept.", folder / CARD)


def _waiting(blake2b: str) -> str:
    return f".{TENSORS}.{blake2b}"


def load(model: Any, folder: str | os.PathLike, name: str, force: bool) -> None:
    """Read a folder into a TunedBlip's set ``name``, after checking everything about it."""
    model.adapters.check_name(name)
    folder = Path(folder).expanduser()
    with _writing:
        about = read_about(folder)
        _check_method(model, folder, about)
        tensors = _read_tensors(folder, about.blake2b)
    if about.settings != _settings(model):
        logger.warning(
            "'%s' was trained with %s, and the model has %s.",
            *(folder, about.settings, _settings(model)),
        )
    identity.check(about, identity.of_model(model), folder, force, identity.EVALUATION_MAY_DIFFER)
    new = name not in model.adapters
    target = model.new_adapter_set() if new else model.adapters[name]
    problems = describe_mismatch(target.state_dict(), tensors) or _unusable(tensors)
    if problems:
        raise CheckpointError(f"'{folder}' does not fit this model: {problems}.")
    target.load_state_dict(tensors)
    if new:
        target.requires_grad_(False)
        target.train(model.training)
        model.adapters.add(name, target)


def _settings(model: Any) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.SETTINGS}


def _arch(model: Any) -> str:
    names = registry.mapping["model_name_mapping"].items()
    return next((name for name, cls in names if cls is type(model)), type(model).__name__)


def _unusable(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the values of an adapter."""
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            return f"{name} is {value.dtype}, not float32"
        if not torch.isfinite(value).all():
            return f"{name} has values that are not finite"
    return None


def read_about(folder: str | os.PathLike) -> AdapterAbout:
    """Read ``adapter_config.json``; CheckpointError if there is none or it is damaged."""
    folder = Path(folder)
    _check_there(folder / CONFIG)
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
    ours = {"arch": _arch(model), "tuning": model.tuning, **config.model_dump(mode="json")}
    theirs = {"arch": about.arch, "tuning": about.method, **about.configuration}
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


def _check_there(path: Path) -> None:
    if not path.is_file():
        inside = [each.parent for each in sorted(path.parent.glob(f"*/{CONFIG}"))]
        hint = f" Did you mean '{inside[0]}'?" if inside else ""
        raise CheckpointError(
            f"'{path.parent}' is not an adapter folder: it has no {path.name}. Give a folder that "
            f"save_adapter wrote.{hint}"
        )


def _read_tensors(folder: Path, blake2b: str) -> dict[str, Tensor]:
    paths = [path for path in (folder / TENSORS, folder / _waiting(blake2b)) if path.is_file()]
    if not paths:
        _check_there(folder / TENSORS)
    content = next((c for c in map(Path.read_bytes, paths) if hash_bytes([c]) == blake2b), b"")
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"'{folder / TENSORS}' is damaged: its bytes are not those that were saved. Copy it "
            "again."
        ) from error


def _is_unedited(card: Path) -> bool:
    """Whether save_adapter wrote a card, and nobody changed it: its last line has a hash."""
    text, _, last = card.read_bytes().rpartition(SEAL)
    return SEAL + last == _seal(text)


def _seal(text: bytes) -> bytes:
    return SEAL + f" {hash_bytes([text])} -->\n".encode()


def _code(name: str) -> str:
    """A name as Markdown shows it letter by letter, in one line."""
    text = " ".join(name.split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def _model_card(model: Any, about: AdapterAbout, tensors: Mapping[str, Tensor]) -> str:
    """The folder's ``README.md``: what it is, how to load it, what it was measured to do."""
    overrides = {"tuning": about.method, **about.settings}
    if section := model.method_config.SECTION:
        overrides[section] = about.configuration
    measured = ", ".join(f"{_code(name)} {value:g}" for name, value in about.metrics.items())
    text = f"""---
library_name: lavis_uniadapter
tags: [{about.method}, blip, lavis]
---

# {about.method} adapter for {about.arch}

It holds what was trained beside a frozen BLIP, and works on that base checkpoint alone.

```python
from lavis.common.registry import registry
from omegaconf import OmegaConf

import lavis_uniadapter

model_cls = registry.get_model_class({json.dumps(about.arch)})
config = OmegaConf.load(model_cls.default_config_path("MODEL_TYPE")).model
config = OmegaConf.merge(config, {overrides})
# config.pretrained is the base checkpoint
model = model_cls.from_config(config).eval()
model.load_adapter("THIS_FOLDER")
```

* Base checkpoint: {_code(about.base.name)} ({about.base.fingerprint})
* Vocabulary: {about.vocabulary.name} ({about.vocabulary.fingerprint})
* Parameters: {sum(t.numel() for t in tensors.values()):,}
* Measured: {measured or "nothing"}

"""
    return text + _seal(text.encode()).decode()
