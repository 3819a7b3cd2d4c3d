"""Loading BLIP checkpoints, with every key accounted for."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from lavis.common.utils import is_url
from lavis.models.vit import interpolate_pos_embed
from timm.models.hub import download_cached_file
from torch import Tensor, nn

from lavis_uniadapter.common.distributed import on_main_process
from lavis_uniadapter.common.errors import CheckpointError, name_some

logger = logging.getLogger(__name__)

QUEUE_BUFFERS = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
AVERAGES = "momentum_average."
# Parts of a model that are not BLIP's own and never come from a base checkpoint.
NOT_BASE = ("adapters.", AVERAGES)
# Parts of BLIP that a model for another task lacks.
OTHER_TASKS = ("text_decoder.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.", "temp")


def read_state_dict(source: str | os.PathLike) -> dict[str, Tensor]:
    """Read a ``.pth`` file from a path or URL, with or without a ``model`` entry around it.

    Nothing but tensors and plain containers is unpickled.

    Raises:
        CheckpointError: if there is no such file, it is damaged, or it holds no state dict.
    """
    path = Path(_download(str(source)) if is_url(str(source)) else source)
    if not path.is_file():
        raise CheckpointError(
            f"No checkpoint at '{source}'. Give the path or URL of a BLIP .pth file as "
            "model.pretrained, or null for random weights."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"'{path}' cannot be read as a checkpoint: {error}") from error
    if isinstance(content, Mapping):
        for wrapper in ("model", "state_dict"):
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
    if not isinstance(content, Mapping) or not any(torch.is_tensor(v) for v in content.values()):
        raise CheckpointError(f"'{path}' holds no state dict.")
    return {key: value for key, value in content.items() if torch.is_tensor(value)}


def _download(url: str) -> str:
    """The cached file of a URL. The main process downloads it, and the others wait.

    LAVIS's own ``download_cached_file`` lets them wait no longer than for a step of training.
    """
    try:
        return on_main_process(download_cached_file, url, False, True, errors=(OSError,))
    except OSError as error:
        raise CheckpointError(f"'{url}' cannot be downloaded: {error}") from error


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The part of a model's state that is BLIP itself: no adapters, averages or queues."""
    return {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(NOT_BASE)
        and key not in QUEUE_BUFFERS
        and not key.endswith("position_ids")
    }


def load_base_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], source: str, may_be_missing: tuple[str, ...]
) -> list[str]:
    """Load BLIP's weights in LAVIS's layout, strictly.

    Momentum copies, queues and parts for other tasks in the checkpoint are left aside; the
    positional embedding is interpolated to the model's image size.

    Args:
        may_be_missing: prefixes of what may stay at its initial value (the task's heads).

    Returns:
        Names of what stays at its initial value.

    Raises:
        CheckpointError: naming each missing, unexpected or misshapen tensor.
    """
    own = base_state_dict(model)
    incoming = {}
    for key, value in state.items():
        if key.split(".")[0].endswith("_m") or key in QUEUE_BUFFERS:
            continue
        if key.startswith(NOT_BASE) or key.endswith("position_ids"):
            continue
        if key not in own and key.startswith(OTHER_TASKS):
            root = key.split(".")[0]
            if not any(name == root or name.startswith(root + ".") for name in own):
                continue
        incoming[key] = value

    if "visual_encoder.pos_embed" in incoming:
        incoming["visual_encoder.pos_embed"] = interpolate_pos_embed(
            incoming["visual_encoder.pos_embed"], model.visual_encoder
        )
    problems = describe_mismatch(own, incoming, may_be_missing)
    if problems and any("adapter" in part for key in incoming for part in key.split(".")):
        raise CheckpointError(
            f"'{source}' holds adapters in the layout of the authors' released code. Read it with "
            "lavis_uniadapter.load_released_checkpoint(model, path); model.pretrained is the base "
            "without them."
        )
    if problems and not any(key.startswith("visual_encoder.") for key in incoming):
        raise CheckpointError(
            f"'{source}' holds no BLIP backbone ({problems}). What a run with a frozen backbone "
            "saved goes over its base: --adapter with its adapter_best or adapter_latest folder, "
            "or run.resume_ckpt_path; model.pretrained is the base itself."
        )
    if problems:
        raise CheckpointError(
            f"'{source}' does not fit this {type(model).__name__}: {problems}. Check "
            "model.vit_type, model.med_config_path and that the file is a BLIP checkpoint."
        )
    model.load_state_dict(incoming, strict=False)
    return [key for key in own if key not in incoming]


def describe_mismatch(
    own: Mapping[str, Tensor], incoming: Mapping[str, Tensor], may_be_missing: tuple[str, ...] = ()
) -> str:
    """Say which tensors are missing, unexpected or misshapen; empty if they fit."""
    missing = [k for k in own if k not in incoming and not k.startswith(may_be_missing or ("\0",))]
    unexpected = [k for k in incoming if k not in own]
    misshapen = [
        f"{k} is {tuple(incoming[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in incoming and incoming[k].shape != own[k].shape
    ]
    return "; ".join(
        f"{label}: {name_some(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    )


def without_foreign_queues(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """A state without the queues that the model lacks or has in another length."""
    kept = dict(state)
    for name in QUEUE_BUFFERS:
        if name in kept and (name not in own or kept[name].shape != own[name].shape):
            logger.warning("'%s': %s has another length and is left aside.", source, name)
            del kept[name]
    return kept


def load_trained(model: nn.Module, source: str) -> None:
    """Load what a runner saved of a tuned model (path or URL), strictly.

    Frozen parameters, averages and queues may be absent, and queues of another length are skipped.

    Raises:
        CheckpointError: naming what is missing, unexpected or misshapen.
    """
    own = model.state_dict()
    state = without_foreign_queues(read_state_dict(source), own, source)
    has_averages = any(key.startswith(AVERAGES) for key in state)
    may_be_missing = QUEUE_BUFFERS + (() if has_averages else (AVERAGES,))
    kept = {key: value for key, value in own.items() if key.startswith(may_be_missing)}
    try:
        model.load_state_dict({**kept, **state})
    except CheckpointError as error:
        raise CheckpointError(f"'{source}', tuning '{model.tuning}': {error}") from None
    if not has_averages:
        model.reset_momentum()


def fingerprint(model: nn.Module, leave_out: Collection[str] = ()) -> str:
    """Hash of the frozen BLIP under the adapters: names, shapes and bytes.

    Args:
        leave_out: tensors that the checkpoint did not have; they differ from run to run.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(base_state_dict(model).items()):
        if key in leave_out:
            continue
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the layout of the authors' released code ---------------------------------------------------

_RELEASED_ADAPTER_NAMES = {
    "adapter_layer_norm_before": "norm_in.shared",
    "adapter_layer_norm_cross_modal": "norm_cross_modal",
    "down_proj": "down.shared",
    "up_proj": "up.textual",
    "multi_up_proj": "up.cross_modal",
    "visual_up_proj": "up.visual",
}
_RELEASED_KEY_VALUE_NAMES = {"video_key_adapter": "key", "video_value_adapter": "value"}


def _canonical_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name each adapter tensor once: it stands under up to four names in released files."""
    canonical: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "adapters_dec":  # built by the released VQA model and never used
            continue
        suffix = "_m" if parts[0].endswith("_m") else ""
        if "adapter" in parts:  # visual_encoder.blocks.3.adapter.X, text_encoder….layer.3.adapter.X
            at = parts.index("adapter")
            key = ".".join([f"adapters{suffix}", parts[at - 1], *parts[at + 1 :]])
        elif "adapters" in parts[1:]:  # visual_encoder.adapters.3.X
            at = parts.index("adapters")
            key = ".".join([f"adapters{suffix}", *parts[at + 1 :]])
        if key in canonical and not torch.equal(canonical[key], value):
            raise CheckpointError(
                f"'{key}' stands in the checkpoint under several names with different values."
            )
        canonical[key] = value
    return canonical


def released_to_ours(state: Mapping[str, Tensor], set_name: str) -> dict[str, Tensor]:
    """Rename the released implementation's keys to this package's, for an adapter set."""
    ours: dict[str, Tensor] = {}
    for key, value in _canonical_released(state).items():
        parts = key.split(".")
        root = parts[0].removesuffix("_m")
        prefix = f"adapters.{set_name}"
        if parts[0].endswith("_m"):
            prefix = f"momentum_average.{prefix}"
        if root == "adapters":
            name = _RELEASED_ADAPTER_NAMES.get(parts[2], parts[2])
            ours[".".join([prefix, "layers", parts[1], name, *parts[3:]])] = value
        elif any(name in parts for name in _RELEASED_KEY_VALUE_NAMES):
            at = next(i for i, part in enumerate(parts) if part in _RELEASED_KEY_VALUE_NAMES)
            if not parts[0].endswith("_m"):  # momentum features never use the key/value adapter
                name = _RELEASED_KEY_VALUE_NAMES[parts[at]]
                leaf = ".".join(parts[at + 1 :]).replace("_proj", "")
                ours[f"{prefix}.key_value.{root}.{name}.{leaf}"] = value
        elif root in ("vision_proj", "text_proj", "itm_head"):
            ours[".".join([prefix, "heads", root, *parts[1:]])] = value
            if not parts[0].endswith("_m"):
                ours[key] = value
        elif parts[0].endswith("_m"):
            continue  # copies of a backbone that is frozen
        else:
            ours["queue_ptr" if key == "ptr_queue" else key] = value
    return ours


def load_released_checkpoint(
    model: nn.Module, path_or_state_dict: str | os.PathLike | Mapping[str, Tensor]
) -> None:
    """Load a checkpoint of the authors' released UniAdapter code into a tuned model.

    Backbone, adapters, heads, momentum averages and, where its length is the same, the queue.

    Args:
        model: built with ``tuning: uniadapter`` and the sizes of the checkpoint.
        path_or_state_dict: a ``.pth`` path or URL, or its state dict.

    Raises:
        CheckpointError: naming each missing, unexpected or misshapen tensor.
    """
    if isinstance(path_or_state_dict, Mapping):
        state, source = path_or_state_dict, "the state dict"
    else:
        state, source = read_state_dict(path_or_state_dict), str(path_or_state_dict)
    if model.adapters.active is None:
        raise CheckpointError(
            "The model has no adapters to load a released UniAdapter checkpoint into. "
            "Build it with tuning: uniadapter."
        )
    incoming = released_to_ours(state, model.adapters.active)
    active = f"adapters.{model.adapters.active}."
    own = {
        k: v
        for k, v in model.state_dict().items()
        if not k.endswith("position_ids") and (not k.startswith("adapters.") or active in k)
    }
    incoming = {k: v for k, v in incoming.items() if not k.endswith("position_ids")}
    if "visual_encoder.pos_embed" in incoming:
        incoming["visual_encoder.pos_embed"] = interpolate_pos_embed(
            incoming["visual_encoder.pos_embed"], model.visual_encoder
        )
    incoming = without_foreign_queues(incoming, own, source)
    has_averages = any(k.startswith("momentum_average.") for k in incoming)
    own_to_fill = {
        k: v for k, v in own.items() if has_averages or not k.startswith("momentum_average.")
    }
    problems = describe_mismatch(own_to_fill, incoming, QUEUE_BUFFERS)
    if problems:
        raise CheckpointError(f"{source} does not fit this {type(model).__name__}: {problems}.")
    model.load_state_dict(incoming, strict=False)
    if not has_averages:
        model.reset_momentum()
    model.randomly_initialised = []
    model.base_changed(source)
