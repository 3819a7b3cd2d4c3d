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


def is_base(key: str) -> bool:
    """Whether a tensor is BLIP's own: no adapter, average, queue or constant."""
    return not (key.startswith(NOT_BASE) or key in QUEUE_BUFFERS or key.endswith("position_ids"))


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The part of a model's state that is BLIP itself: no adapters, averages or queues."""
    return {key: value for key, value in model.state_dict().items() if is_base(key)}


def load_base_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], source: str, may_be_missing: tuple[str, ...]
) -> list[str]:
    """Load BLIP's weights in LAVIS's layout, strictly.

    Momentum copies, queues and parts for other tasks in the checkpoint are skipped; the positional
    embedding is interpolated to the model's image size.

    Args:
        may_be_missing: prefixes of what may stay at its initial value (the task's heads).

    Returns:
        Names of what stays at its initial value.

    Raises:
        CheckpointError: naming each missing, unexpected or misshapen tensor.
    """
    own = base_state_dict(model)
    roots = {key.split(".")[0] for key in own}
    incoming = {}
    for key, value in state.items():
        root = key.split(".")[0]
        of_another_task = key.startswith(OTHER_TASKS) and root not in roots
        if is_base(key) and not root.endswith("_m") and not of_another_task:
            incoming[key] = value
    interpolate_positions(model, incoming)
    problems = describe_mismatch(own, incoming, may_be_missing)
    if problems and any("adapter" in part for key in incoming for part in key.split(".")):
        raise CheckpointError(
            f"'{source}' holds adapters in the layout of the authors' released code. Read it with "
            "lavis_uniadapter.load_released_checkpoint(model, path); model.pretrained is the base "
            "without them."
        )
    if problems and not any(key.startswith("visual_encoder.") for key in incoming):
        raise CheckpointError(
            f"'{source}' holds no BLIP backbone ({problems}). Load what a run with a frozen "
            "backbone saved over its base: by --adapter with its adapter_best or adapter_latest "
            "folder, or by run.resume_ckpt_path. model.pretrained is the base itself."
        )
    if problems:
        raise CheckpointError(
            f"'{source}' does not fit this {type(model).__name__}: {problems}. Check "
            "model.vit_type, model.med_config_path and that the file is a BLIP checkpoint."
        )
    model.load_state_dict(incoming, strict=False)
    return [key for key in own if key not in incoming]


def interpolate_positions(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Resize a state's positional embedding, in place, to the model's image size."""
    name = "visual_encoder.pos_embed"
    if name in state:
        state[name] = interpolate_pos_embed(state[name], model.visual_encoder)


def describe_mismatch(
    own: Mapping[str, Tensor], incoming: Mapping[str, Tensor], may_be_missing: tuple[str, ...] = ()
) -> str:
    """Say which tensors are missing, unexpected or misshapen; empty if they fit."""
    problems = {
        "missing": [k for k in own if k not in incoming and not k.startswith(may_be_missing)],
        "unexpected": [k for k in incoming if k not in own],
        "misshapen": [
            f"{k} is {tuple(incoming[k].shape)}, expected {tuple(own[k].shape)}"
            for k in own
            if k in incoming and incoming[k].shape != own[k].shape
        ],
    }
    return "; ".join(f"{label}: {name_some(names)}" for label, names in problems.items() if names)


def without_foreign_queues(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """A state without the queues that the model lacks or has in another length."""
    kept = dict(state)
    for name in QUEUE_BUFFERS:
        if name in kept and (name not in own or kept[name].shape != own[name].shape):
            logger.warning("'%s': %s has another length and is skipped.", source, name)
            del kept[name]
    return kept


def may_lack(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Prefixes of what a trained state may lack: queues, and averages if it has none at all."""
    has_averages = any(key.startswith(AVERAGES) for key in state)
    return QUEUE_BUFFERS if has_averages else (*QUEUE_BUFFERS, AVERAGES)


def load_trained(model: nn.Module, source: str) -> None:
    """Load what a runner saved of a tuned model (path or URL), strictly.

    Frozen parameters, averages and queues may be absent, and queues of another length are skipped.

    Raises:
        CheckpointError: naming what is missing, unexpected or misshapen.
    """
    own = model.state_dict()
    state = without_foreign_queues(read_state_dict(source), own, source)
    kept = {key: value for key, value in own.items() if key.startswith(may_lack(state))}
    try:
        model.load_state_dict({**kept, **state})
    except CheckpointError as error:
        raise CheckpointError(f"'{source}', tuning '{model.tuning}': {error}") from None
    if AVERAGES in may_lack(state):
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
