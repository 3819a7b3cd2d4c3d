"""All that a run needs to continue as if it had not stopped."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lavis.common.dist_utils import get_rank, get_world_size
from lavis.datasets.data_utils import apply_to_sample
from torch import Tensor, nn

from lavis_uniadapter.checkpoints.blip_files import describe_mismatch
from lavis_uniadapter.common.distributed import gather_to_main
from lavis_uniadapter.common.errors import CheckpointError, name_some
from lavis_uniadapter.runners import run_checkpoints, run_folders
from lavis_uniadapter.runners.epoch import EpochProgress

if TYPE_CHECKING:
    from lavis_uniadapter.runners.runner import RunnerUniAdapter

logger = logging.getLogger(__name__)


def collect(runner: RunnerUniAdapter, progress: EpochProgress) -> dict[str, Any] | None:
    """The state of a run, on the main process; None if a weight is not finite. Every rank calls."""
    mine = {"rng": _rng_state(runner.device), "progress": asdict(progress)}
    ranks = gather_to_main(apply_to_sample(Tensor.cpu, mine))
    if ranks is None:
        return None
    model = runner.unwrap_dist_model(runner.model)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        logger.warning("The weights are not finite; the states on disk are kept as they are.")
        return None
    # Training changes averages too, which are frozen parameters in LAVIS's own models.
    unchanged = _frozen(model) - momentum_parameters(model)
    return {
        "model": {k: v for k, v in model.state_dict().items() if k not in unchanged},
        "optimizer": runner.optimizer.state_dict(),
        "scaler": runner.scaler.state_dict() if runner.scaler else None,
        "config": runner.config.to_dict(),
        "identity": runner.identity and runner.identity.model_dump(),
        # LAVIS's meaning: the last epoch that is done
        "epoch": progress.epoch - 1,
        "steps_per_epoch": len(runner.train_loader),
        "best": runner.best,
        "ranks": ranks,
    }


def restore(runner: RunnerUniAdapter, path: str | Path) -> EpochProgress:
    """Load a state; returns how far this rank is.

    Checkpoints of LAVIS's runner are accepted, which lack random numbers and the best epoch.

    Raises:
        CheckpointError: if the file is damaged, or of a run that this one cannot continue.
    """
    content = run_checkpoints.read(path)
    ours = runner.config.model_cfg.get("tuning")
    theirs = (content.get("config") or {}).get("model", {}).get("tuning")
    if theirs != ours:
        raise CheckpointError(
            f"'{path}' is of a run with model.tuning '{theirs}', and this one has '{ours}'. Set "
            f"model.tuning: {theirs} to continue it."
        )
    if content.get("ranks"):  # of this runner, so with the same keys
        changed = run_folders.differences(content["config"], runner.config.to_dict())
        if changed:
            logger.warning("'%s' is of a run with another %s.", path, name_some(changed))
    progress = _restore_rank(runner, content, path)
    load_model_state(runner.unwrap_dist_model(runner.model), content["model"], path)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = True  # LAVIS's optimizer is not
    runner.optimizer.load_state_dict(content["optimizer"])
    if runner.scaler and content.get("scaler"):
        runner.scaler.load_state_dict(content["scaler"])
    runner.best = content.get("best", runner.best)
    where = f"step {progress.step} of epoch" if progress.step else "epoch"
    logger.info("Resumed from %s: %s %d follows.", path, where, progress.epoch + 1)
    return progress


def _restore_rank(runner, content: Mapping[str, Any], path: str | Path) -> EpochProgress:
    """This rank's progress; its random numbers are restored."""
    ranks, world = content.get("ranks") or [], get_world_size()
    steps, ours = content.get("steps_per_epoch"), len(runner.train_loader)
    in_the_middle = any(state["progress"]["step"] for state in ranks)
    if in_the_middle and (len(ranks) != world or steps != ours):
        raise CheckpointError(
            f"'{path}' is of the middle of an epoch of {steps} steps on {len(ranks)} process(es), "
            f"and this run has {ours} on {world}. Start it with the same number of processes, "
            "run.batch_size_train and data."
        )
    if len(ranks) != world:
        logger.warning(
            "'%s' has the random numbers of %d process(es), not of %d: new ones are used.",
            *(path, len(ranks), world),
        )
        return EpochProgress(content["epoch"] + 1)
    state = ranks[get_rank()]
    _restore_rng(state["rng"], runner.device)
    progress = EpochProgress(**state["progress"])
    progress.losses = apply_to_sample(lambda x: x.to(runner.device), progress.losses)
    return progress


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load what a runner saved of a model, from which only frozen parameters may be missing."""
    frozen = _frozen(model)
    own = {k: v for k, v in model.state_dict().items() if k not in frozen or k in state}
    if problems := describe_mismatch(own, state):
        raise CheckpointError(f"'{source}' does not fit {type(model).__name__}: {problems}.")
    model.load_state_dict(state, strict=False)
    if momentum_parameters(model).difference(state):  # which LAVIS's runner does not save
        model.copy_params()
        logger.warning("'%s' holds no momentum encoders: they start from the model.", source)


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def momentum_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of momentum encoders, which LAVIS's own models have."""
    momentum = {id(p) for pair in getattr(model, "model_pairs", ()) for p in pair[1].parameters()}
    return {name for name, p in model.named_parameters() if id(p) in momentum}


def _rng_state(device: torch.device) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def _restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])
