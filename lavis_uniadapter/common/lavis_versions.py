"""Differences between LAVIS 1.0.2, the release, and the main branch that matter to a plugin.

``task.train_step`` returns the loss (1.0.2), or the loss and all losses (main). Numbers in a batch
are a tensor (1.0.2), or a list (main). ``BlipBase`` needs transformers before 4.27 on main.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from lavis.models.alpro_models.alpro_retrieval import AlproRetrieval
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn

from lavis_uniadapter.common.errors import ConfigError


def init_blip(model: BaseModel) -> None:
    """Initialise a BLIP model without ``BlipBase.__init__``, which checks transformers on main."""
    BaseModel.__init__(model)


def check_dependencies(model_cls: type[BaseModel], run_cfg: Mapping[str, Any]) -> None:
    """Raise ConfigError if one of LAVIS's own models fails with the versions installed here."""
    problem = None
    # NumPy 2 has no Inf, but torchmetrics may have put it back.
    if issubclass(model_cls, AlproRetrieval) and not run_cfg["evaluate"] and not hasattr(np, "Inf"):
        problem = f"trains with np.Inf, which NumPy {np.__version__} does not have"
    generates = issubclass(model_cls, BlipCaption) or (
        issubclass(model_cls, BlipVQA) and run_cfg.get("inference_method") == "generate"
    )
    release = transformers.__version__
    if generates and tuple(map(int, release.split(".")[:2])) >= (4, 27):
        problem = f"generates text only with transformers before 4.27, and this is {release}"
    if problem:
        raise ConfigError(
            f"LAVIS's {model_cls.__name__} {problem}. Use LAVIS's own dependencies: "
            "DEPENDENCIES=lavis, constraints/lavis.txt."
        )


def losses(task: BaseTask, model: nn.Module, samples: dict[str, Any]) -> dict[str, Tensor]:
    """The losses of a batch by name, the one to minimise as ``loss``."""
    if type(task).train_step is BaseTask.train_step:
        output = model(samples)
        return {name: output[name] for name in output if name.startswith("loss")}
    result = task.train_step(model=model, samples=samples)
    loss, parts = result if isinstance(result, tuple) else (result, {})
    return {
        "loss": loss,
        **{k: torch.as_tensor(v, device=loss.device) for k, v in parts.items() if k != "loss"},
    }


def numbers(values: Tensor | Sequence[float], device: torch.device) -> Tensor:
    """Ids, counts or weights of a batch as a tensor."""
    return torch.as_tensor(values, device=device)


def train_step_result(loss: Tensor) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """What a task's ``train_step`` must return to the training loop of the installed LAVIS."""
    # Both versions have the same version number, so LAVIS's own task is called to find out.
    result = BaseTask().train_step(model=lambda samples: {"loss": loss}, samples={})
    return (loss, {"loss": loss}) if isinstance(result, tuple) else loss
