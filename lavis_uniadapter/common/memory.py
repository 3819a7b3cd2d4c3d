"""The least memory that a configuration takes, so that one that cannot fit is refused at once.

It counts what is certain: the main weights, what trains, and one full batch. A run needs more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_uniadapter.common import paths
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.model import ModelSection, RetrievalModel

FLOAT = 4  # bytes
WORKER = 30 * 10**6  # bytes of a process that reads data, without batches
TRAINING = 4  # a parameter, its gradient, and AdamW's two averages
# Where Linux says how much memory a container may use.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(
    section: ModelSection | None,
    datasets: Mapping[str, Any],
    run: Mapping[str, Any],
    gpu: int | None = None,
) -> None:
    """Raise ConfigError, with the estimate, if the machine or its GPU has too little memory.

    Args:
        section: the model's; None for LAVIS's own, of which the batches alone are counted.
        gpu: bytes of the GPU that the run computes on.
    """
    model = _weights(section, run)
    workers = {"run.num_workers": run["num_workers"] * WORKER}
    machine, processes = machine_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    modes = ["eval"] if run["test_splits"] or run["valid_splits"] else []
    for mode in modes if run["evaluate"] else ["train", *modes]:
        size = run[f"batch_size_{mode}"]
        pixels, states = (size * each for each in _item(section, datasets, mode, run["amp"]))
        key, computing = f"run.batch_size_{mode}", pixels + states
        if machine:
            batch = {key: computing if run["device"] == "cpu" else pixels}
            owner = f"each of {processes} processes" if processes > 1 else "this machine"
            _compare(model | batch | workers, machine // processes, owner)
        if gpu:
            _compare(model | {key: computing}, gpu, "the GPU")


def machine_memory() -> int | None:
    """Bytes that this process can have at most; None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    limits = [Path(path).read_text().strip() for path in LIMITS if os.path.exists(path)]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


def _compare(needed: Mapping[str, int], available: int, owner: str) -> None:
    total = sum(needed.values())
    if total > available:
        largest = sorted(needed, key=needed.__getitem__, reverse=True)[:2]
        parts = ", ".join(f"{key} {_gigabytes(needed[key])}" for key in largest)
        raise ConfigError(
            f"This run needs at least {_gigabytes(total)} of memory, and {owner} has "
            f"{_gigabytes(available)}. Reduce what needs most: {parts}."
        )


def _gigabytes(number: int) -> str:
    return f"{min(number, 10**24) / 1e9:,.1f} GB"


def _weights(section: ModelSection | None, run: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a model's larger parts, by the option that decides them."""
    if section is None:
        return {}
    vit, text = section.vit_sizes, _text_sizes(section)
    visual = vit.depth * vit.width
    method = section.method_config.model_dump()
    adapted = visual if method.get("visual", True) else text
    trained = {
        "model.adapter.bottleneck": 2 * adapted * method.get("bottleneck", 0),
        "model.adapter.kv_bottleneck": 4 * text * method.get("kv_bottleneck", 0),
        "model.lora.rank": 2 * visual * method.get("rank", 0) * len(method.get("targets", ())),
    }
    frozen = {"model.image_size": _tokens(section) * vit.width}
    if section.vit is not None:
        frozen["model.vit"] = 4 * visual * vit.width
    if isinstance(section, RetrievalModel):
        frozen["model.embed_dim"] = section.embed_dim * vit.width
        frozen["model.queue_size"] = section.embed_dim * section.queue_size * 2
    factor = FLOAT * (1 if run["evaluate"] else TRAINING)
    return {key: FLOAT * count for key, count in frozen.items()} | {
        key: factor * count for key, count in trained.items()
    }


def _text_sizes(section: ModelSection) -> int:
    """Width of the text model, of all layers; 0 for a file that does not say."""
    try:
        config = json.loads(Path(paths.find(section.med_config_path) or "").read_text())
        return int(config["hidden_size"]) * int(config["num_hidden_layers"])
    except (OSError, ValueError, TypeError, LookupError):  # refused where the model is built
        return 0


def _tokens(section: ModelSection) -> int:
    return (section.image_size // section.vit_sizes.patch_size) ** 2 + 1


def _item(
    section: ModelSection | None, datasets: Mapping[str, Any], mode: str, amp: str | None
) -> tuple[int, int]:
    """Bytes of an item's pixels, and of its states in one block of the visual encoder."""
    frames, pixels = 0, 0
    for dataset in datasets.values():
        processor = (dataset.get("vis_processor") or {}).get(mode) or {}
        side = processor.get("image_size") or (section.image_size if section else 0)
        number = processor.get("n_frms") or 1
        if isinstance(side, int) and isinstance(number, int):  # LAVIS's have any type
            frames = max(frames, number)
            pixels = max(pixels, number * 3 * side**2)
    if section is None:
        return pixels * FLOAT, 0
    vit = section.vit_sizes
    states = frames * _tokens(section) * vit.width * (1 + int(vit.mlp_ratio))
    return pixels * FLOAT, states * (FLOAT if amp is None else 2)
