"""Checkpoints of the authors' released code (RERV/UniAdapter, commit 796c124)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lavis_uniadapter.checkpoints.blip_files import (
    AVERAGES,
    describe_mismatch,
    interpolate_positions,
    read_state_dict,
    with_queues_and_averages,
)
from lavis_uniadapter.common.errors import CheckpointError

# An adapter is adapters.3, visual_encoder.adapters.3, visual_encoder.blocks.3.adapter and
# text_encoder.encoder.layer.3.adapter there; momentum copies have _m after the first part.
ADAPTER = re.compile(r"(?:.+\.)?(?:adapters\.(\d+)|(?:blocks|layer)\.(\d+)\.adapter)\.(\w+)")
ADAPTER_NAMES = {
    "adapter_layer_norm_before": "norm_in.shared",
    "adapter_layer_norm_cross_modal": "norm_cross_modal",
    "down_proj": "down.shared",
    "up_proj": "up.textual",
    "multi_up_proj": "up.cross_modal",
    "visual_up_proj": "up.visual",
}
KEY_VALUE = re.compile(r".+\.video_(key|value)_adapter\.")
HEADS = ("vision_proj", "text_proj", "itm_head")


def released_to_ours(state: Mapping[str, Tensor], set_name: str) -> dict[str, Tensor]:
    """Rename the released implementation's keys to this package's, for an adapter set.

    Raises:
        CheckpointError: if names of the same tensor have different values.
    """
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        for name in _our_names(key, set_name):
            if name in ours and not torch.equal(ours[name], value):
                raise CheckpointError(
                    f"'{key}' and another name of the same tensor have different values."
                )
            ours[name] = value
    return ours


def _our_names(key: str, set_name: str) -> list[str]:
    first, _, rest = key.partition(".")
    root = first.removesuffix("_m")
    prefix = f"adapters.{set_name}"
    if root != first:  # an average; the frozen backbone and key/value adapters have none here
        ours = [name for name in _our_names(f"{root}.{rest}", set_name) if prefix in name]
        return [AVERAGES + n.replace(".", "/") for n in ours if ".key_value." not in n]
    # adapters_dec is built by the released VQA model and never used
    if root == "adapters_dec" or key.endswith("position_ids"):
        return []
    if match := ADAPTER.match(key):
        name = ADAPTER_NAMES.get(match[3], match[3])
        return [f"{prefix}.layers.{match[1] or match[2]}.{name}{key[match.end() :]}"]
    if root in HEADS:
        return [f"{prefix}.heads.{root}.{rest}", key]
    if match := KEY_VALUE.match(key):
        leaf = key[match.end() :].replace("_proj", "")
        return [f"{prefix}.key_value.{root}.{match[1]}.{leaf}"]
    return ["queue_ptr" if key == "ptr_queue" else key]


def load_released_checkpoint(
    model: Any, path_or_state_dict: str | os.PathLike | Mapping[str, Tensor]
) -> None:
    """Load a checkpoint of the authors' released UniAdapter code into a tuned model.

    Backbone, adapters, heads, momentum averages and, where its length is the same, the queue.

    Args:
        model: built with ``tuning: uniadapter`` and the checkpoint's sizes.
        path_or_state_dict: a ``.pth`` path or URL, or its state dict.

    Raises:
        CheckpointError: naming each missing, unexpected or misshapen tensor.
    """
    if isinstance(path_or_state_dict, Mapping):
        state, source = path_or_state_dict, "the state dict"
    else:
        state, source = read_state_dict(path_or_state_dict), str(path_or_state_dict)
    active = model.adapters.active
    if active is None:
        raise CheckpointError("The model has no adapters. Build it with tuning: uniadapter.")
    own = {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(f"adapters.{active}.")
        or not (key.startswith("adapters.") or key.endswith("position_ids"))
    }
    incoming = with_queues_and_averages(model, released_to_ours(state, active), source)
    interpolate_positions(model, incoming)
    if problems := describe_mismatch(own, incoming):
        raise CheckpointError(f"{source} does not fit this {type(model).__name__}: {problems}.")
    model.load_state_dict(incoming, strict=False)
    model.randomly_initialised = []
    model.base_changed(source)
