"""Loading BLIP checkpoints, with every key accounted for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping

import torch
from lavis.common.utils import is_url
from lavis.models.vit import interpolate_pos_embed
from torch import Tensor, nn

from lavis_uniadapter.checkpoints import identity, pickled
from lavis_uniadapter.checkpoints.download import download
from lavis_uniadapter.common.distributed import on_main_process
from lavis_uniadapter.common.errors import CheckpointError, name_some

logger = logging.getLogger(__name__)

QUEUE_BUFFERS = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
AVERAGES = "momentum_average."
# Parts of BLIP that not every task has.
TASK_PARTS = ("text_decoder.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.", "temp")


def read_state_dict(source: str | os.PathLike) -> dict[str, Tensor]:
    """Read a ``.pth`` file from a path or URL, with or without a ``model`` entry around it.

    Nothing but tensors and plain containers is unpickled.

    Raises:
        CheckpointError: if there is no such file, it is damaged, or it holds no state dict.
    """
    if not (is_url(str(source)) or os.path.isfile(source)):
        raise CheckpointError(
            f"No checkpoint at '{source}'. Give the path or URL of a BLIP .pth file."
        )
    path, again = source, "Copy or download it again."
    if is_url(str(source)):
        # Without on_main_process the others wait no longer than for a step of training.
        on_main_process(download, str(source), errors=(CheckpointError,))
        path = download(str(source))  # again only on machines that do not share its cache
        again = "Delete it, so that it is downloaded again."
    content = pickled.load(path, again)
    for wrapper in ("model", "state_dict"):
        content = content.get(wrapper, content) if isinstance(content, Mapping) else {}
    items = content.items() if isinstance(content, Mapping) else ()
    state = {key: value for key, value in items if torch.is_tensor(value)}
    if not state:
        raise CheckpointError(f"'{path}' holds no state dict.")
    return state


def is_base(key: str) -> bool:
    """Whether a tensor is BLIP's own: no adapter, average, momentum copy, queue or constant."""
    return not (
        key.startswith(("adapters.", AVERAGES))
        or key.split(".", maxsplit=1)[0].endswith("_m")
        or key in QUEUE_BUFFERS
        or key.endswith("position_ids")
    )


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The part of a model's state that is BLIP itself."""
    return {key: value for key, value in model.state_dict().items() if is_base(key)}


def base_part(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state that is a model's BLIP; parts for other tasks are left out."""
    own = base_state_dict(model)
    others = tuple(part for part in TASK_PARTS if not any(key.startswith(part) for key in own))
    return {k: v for k, v in state.items() if is_base(k) and not k.startswith(others)}


def load_base_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], source: str, may_be_missing: tuple[str, ...]
) -> list[str]:
    """Load BLIP's weights in LAVIS's layout, strictly.

    Momentum copies, queues and parts for other tasks in the checkpoint are skipped; the positional
    embedding is interpolated to the model's image size.

    Args:
        may_be_missing: prefixes of the task's heads.

    Returns:
        Names of what stays at its initial value.

    Raises:
        CheckpointError: naming each missing, unexpected or misshapen tensor.
    """
    own, incoming = base_state_dict(model), base_part(model, state)
    interpolate_positions(model, incoming)
    if problems := describe_mismatch(own, incoming, may_be_missing):
        raise CheckpointError(
            f"'{source}' does not fit this {type(model).__name__}: {problems}. It must be a BLIP "
            "checkpoint of the sizes that model.vit_type and model.med_config_path give. What a "
            "run with a frozen backbone saved is loaded over its base, by --adapter or "
            "run.resume_ckpt_path; a checkpoint of the authors' released code, by "
            "lavis_uniadapter.load_released_checkpoint(model, path)."
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


def with_queues_and_averages(
    model: nn.Module, state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """A trained state with what training alone reads, if the state lacks it.

    Queues that are absent or of another length stay as the model has them. Averages, if there are
    none, start from the parameters.
    """
    own = model.state_dict()
    has_averages = any(key.startswith(AVERAGES) for key in state)
    whole = {key: value for key, value in state.items() if key in own or key not in QUEUE_BUFFERS}
    for name, value in own.items():
        if name in QUEUE_BUFFERS and whole.setdefault(name, value).shape != value.shape:
            logger.warning("'%s': %s has another length and is skipped.", source, name)
            whole[name] = value
        if name.startswith(AVERAGES) and not has_averages:
            parameter = name.removeprefix(AVERAGES).replace("/", ".")
            whole[name] = state.get(parameter, own[parameter])
    return whole


def load_trained(model: nn.Module, source: str, force: bool) -> None:
    """Load what a runner saved of a tuned model; see ``TunedBlip.load_checkpoint``."""
    state = with_queues_and_averages(model, read_state_dict(source), source)
    saved = identity.of_checkpoint(source)
    identity.check(saved, identity.of_model(model), source, force, identity.EVALUATION_MAY_DIFFER)
    try:
        model.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"'{source}', tuning '{model.tuning}': {error}") from None


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and values in float32."""

    def contents() -> Iterator[bytes | memoryview]:
        for key, value in sorted(tensors.items()):
            yield f"{key}{tuple(value.shape)}".encode()
            yield value.detach().cpu().float().contiguous().numpy().data

    return identity.hash_bytes(contents())
