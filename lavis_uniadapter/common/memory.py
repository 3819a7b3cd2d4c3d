"""The least memory that a configuration takes, so that one that cannot fit is refused at once.

It counts what is certain: the main weights, what trains, and one full batch. A run needs more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.model import ModelSection, RetrievalModel

WORKER = 30 * 10**6  # bytes of a process that reads data, without batches
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
    model = _weights(section, run["evaluate"]) if section else {}
    workers = {"run.num_workers": run["num_workers"] * WORKER}
    machine, processes = machine_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    modes = ["eval"] if run["test_splits"] or run["valid_splits"] else []
    for mode in modes if run["evaluate"] else ["train", *modes]:
        key = f"run.batch_size_{mode}"
        pixels, states = (run[f"batch_size_{mode}"] * n for n in _item(section, datasets, mode))
        if machine:
            batch = {key: pixels + states if run["device"] == "cpu" else pixels}
            owner = f"each of {processes} processes" if processes > 1 else "this machine"
            _compare(model | batch | workers, machine // processes, owner)
        if gpu:
            _compare(model | {key: pixels + states}, gpu, "the GPU")


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
        # the next largest too, if it matters
        largest = sorted(needed, key=needed.__getitem__, reverse=True)[:2]
        largest = [key for key in largest if 100 * needed[key] > total]
        parts = ", ".join(f"{key} {_gigabytes(needed[key])}" for key in largest)
        raise ConfigError(
            f"This run needs at least {_gigabytes(total)} of memory, and {owner} has "
            f"{_gigabytes(available)}. Reduce what needs most: {parts}."
        )


def _gigabytes(number: int) -> str:
    return f"{min(number, 10**24) / 1e9:,.1f} GB"


def _weights(section: ModelSection, evaluate: bool) -> dict[str, int]:
    """Bytes of a model's larger float32 tensors, by the option that decides their size."""
    vit, method = section.vit_sizes, section.method_config.model_dump()
    layers = vit.depth * vit.width if method.get("visual", True) else 1
    trained = 4 if evaluate else 16  # with the gradient and AdamW's two averages
    queue = section.embed_dim * section.queue_size if isinstance(section, RetrievalModel) else 0
    return {
        "model.vit": 4 * 4 * vit.depth * vit.width**2,
        "model.image_size": 4 * section.tokens * vit.width,
        "model.queue_size": 4 * 2 * queue,
        "model.adapter.bottleneck": trained * 2 * layers * method.get("bottleneck", 0),
        "model.adapter.kv_bottleneck": trained * 2 * vit.width * method.get("kv_bottleneck", 0),
        "model.lora.rank": trained * 2 * layers * method.get("rank", 0),
    }


def _item(section: ModelSection | None, datasets: Mapping[str, Any], mode: str) -> tuple[int, int]:
    """Bytes of an item's pixels, and of its bf16 states in one block of the visual encoder."""
    frames, pixels = 0, 0
    for dataset in datasets.values():
        processor = (dataset.get("vis_processor") or {}).get(mode) or {}
        side = processor.get("image_size") or (section.image_size if section else 0)
        number = processor.get("n_frms") or 1
        if isinstance(side, int) and isinstance(number, int):  # LAVIS's have any type
            frames, pixels = max(frames, number), max(pixels, number * 3 * side**2)
    if section is None:
        return 4 * pixels, 0
    vit = section.vit_sizes
    return 4 * pixels, 2 * frames * section.tokens * vit.width * (1 + int(vit.mlp_ratio))
