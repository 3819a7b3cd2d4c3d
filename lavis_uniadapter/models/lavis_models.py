"""What LAVIS's own models need in order to run with this package's runner and tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from lavis.common.config import Config
from lavis.common.dist_utils import get_world_size
from lavis.common.registry import registry
from lavis.common.utils import is_url
from lavis.models.albef_models import AlbefBase
from lavis.models.alpro_models import AlproBase
from lavis.models.base_model import BaseModel, SharedQueueMixin
from lavis.models.blip_models.blip import BlipBase
from lavis.models.clip_models.model import CLIP
from omegaconf import DictConfig, OmegaConf
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema import Evaluation


def is_lavis_model(model_cls: type) -> bool:
    """Whether a registered model is LAVIS's own; this package's have a ``CONFIG`` schema."""
    return not hasattr(model_cls, "CONFIG")


def check_lavis_model(config: Config, datasets: Mapping[str, Mapping[str, Dataset]]) -> None:
    """ConfigError for what would stop one of LAVIS's own models in the middle of a run."""
    run, model = config.run_cfg, config.model_cfg
    model_cls = registry.get_model_class(model.arch)
    if not is_lavis_model(model_cls):
        return
    lavis_versions.check_dependencies(model_cls, run)
    if issubclass(model_cls, BlipBase | AlbefBase | AlproBase):
        key = "finetuned" if model.get("load_finetuned", True) else "pretrained"
        path = model.get(key)
        if not isinstance(path, str) or not (is_url(path) or os.path.isfile(path)):
            raise ConfigError(
                f"model.{key} is {path!r}; LAVIS's '{model.arch}' needs the path or URL of its "
                "weights there."
            )
        visual = "videos" if issubclass(model_cls, AlproBase) else "images"
        for name, dataset in config.datasets_cfg.items():
            if dataset.data_type != visual:
                raise ConfigError(
                    f"datasets.{name} has {dataset.data_type}; LAVIS's '{model.arch}' reads "
                    f"{visual}. Choose another model.arch."
                )
    if issubclass(model_cls, SharedQueueMixin) and not run.evaluate:
        batch = run.batch_size_train * get_world_size()
        if model.queue_size < batch or model.queue_size % batch:
            raise ConfigError(
                f"model.queue_size is {model.queue_size}; LAVIS's '{model.arch}' needs a multiple "
                f"of run.batch_size_train times the number of processes ({batch})."
            )
    reranks = hasattr(model_cls, "compute_sim_matrix") and not issubclass(model_cls, CLIP)
    if reranks and run.k_test < 1:
        raise ConfigError(
            f"run.k_test is {run.k_test}; LAVIS's '{model.arch}' always reranks. Set it to at "
            "least 1."
        )
    for name, splits in datasets.items() if reranks else ():
        for split, dataset in splits.items():
            queries = [len(getattr(dataset, kind, ())) for kind in ("text", "image")]
            if not all(map(_each_process_has_a_share, filter(None, queries))):
                raise ConfigError(
                    f"datasets.{name}, {split} is too small for {get_world_size()} processes: "
                    f"LAVIS's '{model.arch}' would leave one without a query. Use fewer."
                )


def _each_process_has_a_share(queries: int) -> bool:
    processes = get_world_size()
    return (processes - 1) * (queries // processes + 1) < queries


def lavis_similarities(
    model: BaseModel, loader: DataLoader, run_cfg: DictConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(visuals, texts) and (texts, visuals) scores by a model's own ``compute_sim_matrix``.

    In float32: under autocast LAVIS cannot write scores into its matrices. Candidates that are not
    reranked all score -100 and rank last; recalls up to ``k_test`` are exact.
    """
    k_test = Evaluation.pick(run_cfg, "run").k_test
    k_test = min(k_test, len(loader.dataset.text), len(loader.dataset.image))
    task_cfg = OmegaConf.merge(run_cfg, {"k_test": k_test})
    with torch.autocast(model.device.type, enabled=False), _IndicesFollow():
        return model.compute_sim_matrix(loader, task_cfg=task_cfg)


class _IndicesFollow(TorchFunctionMode):
    """Inside, an index tensor is moved to the device of the tensor that it indexes.

    LAVIS's ALPRO keeps features on the CPU and indexes them on CUDA, which PyTorch refuses.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].to(args[0].device))
        return func(*args, **(kwargs or {}))
