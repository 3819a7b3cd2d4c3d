"""What an index is built with: kept beside it, compared with what is asked for, and rebuilt."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavis_uniadapter.common.atomic import atomic
from lavis_uniadapter.common.config import read_yaml
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.search.engine import Engine
from lavis_uniadapter.search.manifest import FILE, Manifest
from lavis_uniadapter.search.store import Store, open_store

logger = logging.getLogger("lavis_uniadapter")

RECIPE = "recipe.yaml"
ADAPTER = "adapter"
DEFAULTS = {"store": "numpy", "window": 10.0}


def check_arguments(source: Path, window: float | None) -> None:
    """Refuse a folder that is not there, and a window of no length."""
    if not source.is_dir():
        raise ConfigError(f"There is no folder '{source}'.")
    if window is not None and not 0 < window < math.inf:
        raise ConfigError(f"The window is {window:g} s; it must be more than 0 and finite.")


def given_of(asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked for explicitly."""
    return {key: value for key, value in asked.items() if value is not None}


def clear(folder: Path, engine: Engine) -> dict[str, Any]:
    """Delete an index but for its recipe and adapter; returns the store and window it had."""
    about: dict[str, Any] = {}
    if (folder / FILE).is_file():
        try:
            manifest = Manifest(folder)
            about = manifest.about
            manifest.close()
        except ConfigError as error:
            logger.warning("The old index is deleted. %s", error)
    if about:
        old = open_own_store(folder, about, engine, create=True)
        old.drop()
        old.close()
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", "vectors.f16", "ids.i64"):
        (folder / name).unlink(missing_ok=True)
    return {key: about[key] for key in DEFAULTS if key in about}


def keep(folder: Path, engine: Engine) -> None:
    """Keep the engine's recipe and adapter in the index."""
    content = read_yaml(Path(engine.cfg), engine.options)
    adapter = engine.config.model_cfg.adapter_ckpt
    content["model"].pop("adapter_ckpt", None)
    for key in ("pretrained", "tokenizer", "med_config_path"):
        path = engine.config.model_cfg.get(key)  # of the recipe, or its model type's default
        if path and os.path.exists(path):  # relative to the current folder
            content["model"][key] = os.path.abspath(path)
    with atomic(folder / RECIPE) as temporary:
        OmegaConf.save(OmegaConf.create(content), temporary)
    kept = folder / ADAPTER
    if adapter and Path(adapter).resolve() == kept.resolve():
        return  # of the index that is built anew
    shutil.rmtree(kept, ignore_errors=True)
    if adapter:
        shutil.copytree(adapter, kept)


def adapter_of(folder: Path) -> Path | None:
    """The adapter of an index."""
    return folder / ADAPTER if (folder / ADAPTER).is_dir() else None


def new_collection() -> str:
    """A name for a collection in Milvus."""
    return f"uniadapter_{secrets.token_hex(8)}"


def open_own_store(
    folder: Path, about: dict[str, Any], engine: Engine, create: bool = False
) -> Store:
    """The store of an index."""
    return open_store(about["store"], folder, engine.model.embed_dim, about["collection"], create)


def check_store(folder: Path, manifest: Manifest, store: Store) -> None:
    """Check that the store has the vectors of all segments."""
    before = manifest.state()
    held, (segments, pending) = len(store), manifest.state()
    if before == (segments, pending) and abs(held - segments) > pending:
        command = rebuild_command(folder, Path(manifest.about["root"]))
        raise ConfigError(
            f"The index in '{folder}' is damaged: it has {segments} segments, and the vectors of "
            f"{held}. To rebuild it, run: {command}"
        )


def rebuild_command(
    folder: Path,
    source: Path,
    cfg: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
    store: str | None = None,
    window: float | None = None,
    options: Sequence[str] = (),
) -> str:
    """The command that rebuilds an index, with what is given in place of what it was built with."""
    given = {"--cfg": cfg, "--adapter": adapter, "--store": store, "--window": window}
    words = ["uniadapter", "search", "index", str(source), "--index", str(folder), "--rebuild"]
    for name, value in given.items():
        words += [name, str(value)] if value is not None else []
    return shlex.join([*words, *(["--options", *options] if options else [])])


def check_same(
    folder: Path, source: Path, about: dict[str, Any], asked: dict[str, Any], command: str
) -> None:
    """Check that an index was built with what is asked for now."""
    root = Path(about["root"])
    if source != root and root not in source.parents:
        raise ConfigError(
            f"The index in '{folder}' is of '{root}', and '{source}' is not inside. Name another "
            "--index."
        )
    for key in DEFAULTS:
        if about[key] != asked.get(key, about[key]):
            raise ConfigError(
                f"The index in '{folder}' was built with {key} {about[key]}, not {asked[key]}. "
                f"Leave out --{key}, or rebuild the index: {command}"
            )
    check_fingerprint(folder, about, asked["fingerprint"], command)


def check_fingerprint(
    folder: Path, about: dict[str, Any], now: dict[str, str], command: str
) -> None:
    """Check that the model and its processors are those of the index."""
    different = [part for part, value in about["fingerprint"].items() if value != now[part]]
    if different:
        raise ConfigError(
            f"The index in '{folder}' was built with another {', '.join(different)}. To rebuild "
            f"it, run: {command}"
        )
